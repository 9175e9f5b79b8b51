"""Mask says who sees whom: its formula, and that allows, kv_range and materialize tell the same."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn import InvalidInput, Mask

SIDES = (None, 0, 1, 2, 5)
SINKS = (0, 1, 3, 9)


def sees(position: int, key: int, left: int | None, right: int | None, sinks: int) -> bool:
    """The contract, word by word."""
    not_too_new = True if right is None else key <= position + right
    not_too_old = True if left is None else key >= position - left
    return not_too_new and (not_too_old or key < sinks)


def small_masks() -> Iterator[Mask]:
    for left, right, sinks in itertools.product(SIDES, SIDES, SINKS):
        yield Mask(left, right, sinks)


def test_allows_is_the_formula() -> None:
    for mask in small_masks():
        for position, key in itertools.product(range(-7, 15), range(9)):
            assert mask.allows(position, key) == sees(position, key, mask.left, mask.right, mask.sinks)


def test_kv_range_is_exact() -> None:
    """The two ranges hold what some query of the tile sees, the full one what every query sees inside its window."""
    for mask in small_masks():
        for first, height, lk in itertools.product(range(-7, 13), (1, 2, 5), (0, 1, 4, 9)):
            last = first + height - 1
            positions = range(first, last + 1)
            got = mask.kv_range(first, last, lk)
            ranges = set(range(got.sinks)) | set(range(got.start, got.stop))
            assert ranges == {j for j in range(lk) if any(mask.allows(p, j) for p in positions)}
            windowed = Mask(mask.left, mask.right)
            full = [j for j in range(lk) if all(windowed.allows(p, j) for p in positions)]
            assert list(range(got.full_start, got.full_stop)) == full
            assert 0 <= got.sinks <= got.start <= got.full_start <= got.stop <= lk
            assert got.full_stop <= got.stop


def test_materialize_is_allows() -> None:
    for mask in small_masks():
        for lq, lk, from_end, offset in itertools.product((0, 1, 5), (0, 1, 6), (False, True), (-3, 0, 4)):
            mask = Mask(mask.left, mask.right, mask.sinks, offset, from_end)
            got = mask.materialize(lq, lk)
            assert got.dtype == torch.bool and got.shape == (1, lq, lk)
            expected = [[mask.allows(mask.position(i, lq, lk), j) for j in range(lk)] for i in range(lq)]
            assert got[0].tolist() == expected


@pytest.mark.parametrize("from_end", [False, True])
def test_materialize_with_the_tensors_that_restrict(from_end: bool) -> None:
    mask, lq, lk = Mask(2, 1, 1, 1, from_end), 5, 7
    key_lens = torch.tensor([4, 0, 7], dtype=torch.int32)
    key_mask = torch.rand(3, lk) < 0.7
    lo, hi = torch.randint(0, 5, (3, lq)), torch.randint(2, 9, (3, lq))
    got = mask.materialize(lq, lk, key_lens=key_lens, key_mask=key_mask, bounds=(lo, hi))
    for b, i, j in itertools.product(range(3), range(lq), range(lk)):
        position = i + 1 + (int(key_lens[b]) - lq if from_end else 0)
        inside = j < key_lens[b] and key_mask[b, j] and lo[b, i] <= j < hi[b, i]
        assert got[b, i, j].item() == bool(sees(position, j, 2, 1, 1) and inside)

    offset = torch.tensor([-2, 0, 3])
    got = Mask(2, 1, 1, 0, False).materialize(lq, lk, offset=offset, bounds=(lo[0], hi[0]))
    for b, i, j in itertools.product(range(3), range(lq), range(lk)):
        assert got[b, i, j].item() == (sees(i + int(offset[b]), j, 2, 1, 1) and bool(lo[0, i] <= j < hi[0, i]))


def test_materialize_rows() -> None:
    mask, bounds = Mask(3, 0), (torch.tensor([0, 1, 0, 2, 0]), torch.tensor([4, 4, 9, 9, 5]))
    everything = mask.materialize(5, 9, bounds=bounds)
    for rows in (slice(0, 0), slice(1, 4), slice(4, 5), slice(2, 99)):
        assert torch.equal(mask.materialize(5, 9, bounds=bounds, rows=rows), everything[:, rows])


def test_materialize_a_part() -> None:
    mask, bounds = Mask(3, 1, 1), (torch.tensor([0, 1, 0, 2, 0]), torch.tensor([4, 4, 9, 9, 5]))
    key_mask = torch.rand(2, 9) < 0.7
    everything = mask.materialize(5, 9, bounds=bounds, key_mask=key_mask)
    rows = torch.tensor([4, 0, 0, 2])
    for keys in (slice(0, 0), slice(2, 7), slice(8, 99)):
        part = mask.materialize(5, 9, bounds=bounds, key_mask=key_mask, rows=rows, keys=keys)
        assert torch.equal(part, everything[:, rows, keys])


def test_visible_pairs_are_those_that_materialize_shows() -> None:
    for mask in small_masks():
        for lq, lk, from_end, offset in itertools.product((0, 1, 5), (0, 1, 6), (False, True), (-3, 0, 4)):
            mask = Mask(mask.left, mask.right, mask.sinks, offset, from_end)
            assert mask.visible_pairs(lq, lk) == int(mask.materialize(lq, lk).sum())


numbers = st.integers(0, 2**31 - 1)
positions = st.integers(-(2**31), 2**31)


@settings(max_examples=300)
@given(
    left=st.none() | st.integers(0, 40) | numbers,
    right=st.none() | st.integers(0, 40) | numbers,
    sinks=st.integers(0, 40) | numbers,
    first=st.integers(-60, 60) | positions,
    height=st.integers(1, 20),
    lk=st.integers(0, 60),
)
def test_kv_range_at_any_size(
    left: int | None, right: int | None, sinks: int, first: int, height: int, lk: int
) -> None:
    mask, tile = Mask(left, right, sinks), range(first, first + height)
    got = mask.kv_range(first, first + height - 1, lk)
    for j in range(lk):
        seen = [mask.allows(p, j) for p in tile]
        assert (j < got.sinks or got.start <= j < got.stop) == any(seen)
        if got.full_start <= j < got.full_stop:
            assert all(seen)


WINDOWS: list[tuple[dict[str, Any], Mask]] = [
    ({}, Mask()),
    ({"causal": True}, Mask(right=0)),
    ({"window": 1}, Mask(0, 0)),
    ({"window": 8}, Mask(7, 7)),
    ({"window": 8, "causal": True}, Mask(7, 0)),
    ({"window": (8, 3)}, Mask(8, 3)),
    ({"window": [8, 3]}, Mask(8, 3)),
    ({"window": (8, 3), "causal": True}, Mask(8, 0)),
    ({"window": (-1, 3)}, Mask(None, 3)),
    ({"window": (8, -1)}, Mask(8, None)),
    ({"window": (8, -1), "causal": True}, Mask(8, 0)),
    ({"window": (-1, -1)}, Mask()),
    ({"window": (0, 0)}, Mask(0, 0)),
    ({"sinks": 4}, Mask(sinks=4)),
    ({"align": "end"}, Mask()),
    ({"align": "start"}, Mask(from_end=False)),
    ({"align": -3}, Mask(offset=-3, from_end=False)),
]


@pytest.mark.parametrize("keywords, expected", WINDOWS, ids=[str(keywords) for keywords, _ in WINDOWS])
def test_from_window(keywords: dict[str, Any], expected: Mask) -> None:
    assert Mask.from_window(**keywords) == expected


BAD = [
    ("causal", 1),
    ("causal", None),
    ("window", 0),
    ("window", -1),
    ("window", True),
    ("window", 2.0),
    ("window", "3"),
    ("window", (1,)),
    ("window", (1, 2, 3)),
    ("window", (-2, 3)),
    ("window", (3, -2)),
    ("window", (True, 2)),
    ("window", (1.0, 2)),
    ("window", (None, 2)),
    ("sinks", -1),
    ("sinks", 1.5),
    ("sinks", True),
    ("sinks", None),
    ("align", "middle"),
    ("align", 1.0),
    ("align", False),
    ("align", None),
]


@pytest.mark.parametrize("argument, value", BAD, ids=str)
def test_bad_windows(argument: str, value: object) -> None:
    with pytest.raises(InvalidInput) as raised:
        Mask.from_window(**{argument: value})  # type: ignore[arg-type]
    assert raised.value.argument == argument


def test_position() -> None:
    assert Mask().position(0, 3, 8) == 5
    assert Mask(from_end=False).position(2, 3, 8) == 2
    assert Mask(offset=4, from_end=False).position(2, 3, 8) == 6
    assert Mask().position(0, 8, 3) == -5


def test_is_a_value() -> None:
    mask = Mask(3, 0, 2)
    assert mask == Mask(3, 0, 2) and hash(mask) == hash(Mask(3, 0, 2)) and mask != Mask(3, 0)
    assert pickle.loads(pickle.dumps(mask)) == mask
    with pytest.raises(AttributeError):
        mask.left = 4  # type: ignore[misc]
