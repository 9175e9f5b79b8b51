"""The mask's primitives against Mask.materialize, for every mask of small numbers. Runs in Triton's interpreter."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from longattn.backends.triton import mask as primitives
from longattn.backends.triton.attention import _sequences, _visibility
from longattn.mask import Mask
from longattn.problem import Tensors

BLOCK_I, BLOCK_J = 4, 8
UNSEEN, TESTED, UNTESTED = 0, 1, 2  # an entry's value: what its loop was, plus 4 for each visit


key_tiles, query_tiles = primitives.key_tiles, primitives.query_tiles
keys_shown, query_bound, sequence = primitives.keys_shown, primitives.query_bound, primitives.sequence
tile_start, visible = primitives.tile_start, primitives.visible


@triton.jit
def _mark(out, width, i, j, inside, seen, VALUE: tl.constexpr):
    """Add 4 for the visit, and the value where the entry is seen."""
    at = out + i[:, None] * width + j[None, :]
    before = tl.load(at, mask=inside, other=0)
    tl.store(at, before + 4 + tl.where(seen, VALUE, 0), mask=inside)


@triton.jit
def by_queries(out, width, sequences, mask, M: tl.constexpr, N: tl.constexpr):
    """The loops of the forward and of dq."""
    b = tl.program_id(1)
    _, _, lq, _, lk, shift = sequence(sequences, mask, b)
    out += b * sequences.nq * width
    first = tl.program_id(0) * M
    i = first + tl.arange(0, M)
    p = i + shift
    lo = query_bound(mask.lo, mask, b, i[:, None], lq)
    hi = query_bound(mask.hi, mask, b, i[:, None], lq)
    sink_start, sink_tiles, start, left_tiles, middle, right, stop = key_tiles(
        mask, first + shift, tl.minimum(first + M, lq) - 1 + shift, lk, lo, hi, N
    )
    for n in range(left_tiles):
        j = tile_start(n, sink_start, sink_tiles, start, N) + tl.arange(0, N)
        seen = visible(mask, p[:, None], j[None, :], keys_shown(mask, b, sequences.nk, j, lk)[None, :], lo, hi)
        _mark(out, width, i, j, (i < lq)[:, None] & (j < width)[None, :], seen, 1)
    for at in range(middle, right, N):
        j = at + tl.arange(0, N)
        _mark(out, width, i, j, (i < lq)[:, None] & (j < width)[None, :], i[:, None] >= 0, 2)
    for at in range(right, stop, N):
        j = at + tl.arange(0, N)
        seen = visible(mask, p[:, None], j[None, :], keys_shown(mask, b, sequences.nk, j, lk)[None, :], lo, hi)
        _mark(out, width, i, j, (i < lq)[:, None] & (j < width)[None, :], seen, 1)


@triton.jit
def _test_rows(out, width, sequences, mask, b, at, j, shift, lq, lk, M: tl.constexpr):
    i = at + tl.arange(0, M)
    lo = query_bound(mask.lo, mask, b, i[:, None], lq)
    hi = query_bound(mask.hi, mask, b, i[:, None], lq)
    shown = keys_shown(mask, b, sequences.nk, j, lk)[None, :]
    seen = visible(mask, (i + shift)[:, None], j[None, :], shown, lo, hi)
    _mark(out, width, i, j, (i < lq)[:, None] & (j < lk)[None, :], seen, 1)


@triton.jit
def by_keys(out, width, sequences, mask, M: tl.constexpr, N: tl.constexpr):
    """The loops of dk and dv."""
    b = tl.program_id(1)
    _, _, lq, _, lk, shift = sequence(sequences, mask, b)
    out += b * sequences.nq * width
    first = tl.program_id(0) * N
    if first >= lk:
        return
    j = first + tl.arange(0, N)
    start, middle, right, stop = query_tiles(mask, first, tl.minimum(first + N, lk) - 1, lq, shift, M)
    for at in range(start, middle, M):
        _test_rows(out, width, sequences, mask, b, at, j, shift, lq, lk, M)
    for at in range(middle, right, M):
        i = at + tl.arange(0, M)
        _mark(out, width, i, j, (i < lq)[:, None] & (j < lk)[None, :], i[:, None] >= 0, 2)
    for at in range(right, stop, M):
        _test_rows(out, width, sequences, mask, b, at, j, shift, lq, lk, M)


def check(mask: Mask, nq: int, nk: int, untested: bool = True, **beside: torch.Tensor) -> None:
    """Both kernels visit no entry twice and all visible ones, and leave out the test only where all are visible."""
    tensors = Tensors(*torch.empty(3, 1), **beside)
    batch = max((x.shape[0] for x in beside.values() if x.dim() and x.shape[0] != nq), default=1)
    problem = SimpleNamespace(nq=nq, nk=nk, mask=mask)
    bounds = None if tensors.lo is None else (tensors.lo, tensors.hi)
    expected = mask.materialize(
        nq, nk, offset=tensors.offset, key_mask=tensors.key_mask, key_lens=tensors.key_lens, bounds=bounds
    ).expand(batch, nq, nk)
    for kernel, tiles in ((by_queries, -(-nq // BLOCK_I)), (by_keys, -(-nk // BLOCK_J))):
        found = torch.zeros(batch, nq, nk, dtype=torch.int32)
        arguments = _sequences(problem, tensors), _visibility(problem, tensors)
        kernel[(tiles, batch)](found, nk, *arguments, M=BLOCK_I, N=BLOCK_J)
        assert found.max() < 8, f"{mask}: an entry was visited twice"
        assert torch.equal(found % 4 != UNSEEN, expected), f"{mask}, {nq} x {nk}, {kernel}"
        if not untested:
            assert not (found % 4 == UNTESTED).any()


SIDES = (None, 0, 1, 3, 9, 40)


@pytest.mark.parametrize("left", SIDES)
def test_windows_and_sinks(left: int | None) -> None:
    shapes = itertools.cycle([(1, 1), (7, 19), (18, 7), (13, 26), (6, 33)])
    alignments = itertools.cycle([(0, True), (0, False), (-3, False), (9, False), (50, False), (2, True), (25, False)])
    for right, sinks in itertools.product(SIDES, (0,) if left is None else (0, 1, 11)):
        check(Mask(left, right, sinks, *next(alignments)), *next(shapes))


def test_where_the_middle_lies() -> None:
    """Full tiles inside a causal band are not tested."""
    found = torch.zeros(1, 16, 40, dtype=torch.int32)
    mask = Mask(None, 0)
    problem = SimpleNamespace(nq=16, nk=40, mask=mask)
    tensors = Tensors(*torch.empty(3, 1))
    by_queries[(4, 1)](found, 40, _sequences(problem, tensors), _visibility(problem, tensors), M=BLOCK_I, N=BLOCK_J)
    assert (found[0, :, :24] == 4 + UNTESTED).all()
    assert not (found[0, :, 32:] % 4 == UNTESTED).any()


def test_tensors_beside_the_mask() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).int()

    for left, right, sinks in ((None, None, 0), (None, 0, 0), (5, 0, 0), (2, 3, 6), (0, 0, 3)):
        for from_end in (True, False):
            mask = Mask(left, right, sinks, 0, from_end)
            check(mask, 11, 29, key_lens=draw(0, 32, 3).clamp(max=29))
            check(mask, 11, 29, untested=False, key_mask=draw(0, 2, 3, 29).bool())
            check(mask, 11, 29, untested=False, lo=draw(-3, 20, 11), hi=draw(0, 40, 11))
            check(mask, 11, 29, untested=False, lo=draw(-3, 20, 2, 11), hi=draw(0, 40, 2, 11))
        check(Mask(left, right, sinks, 0, False), 11, 29, offset=draw(-12, 40, 3))
