"""Who sees whose keys, without processes: spans, hops, halos and choices, against the mask written out."""

from __future__ import annotations

import random

import pytest
import torch

from longattn import InvalidInput, Mask
from longattn.distributed.geometry import Geometry, broadcast_sinks, halo, hops, imbalance
from longattn.distributed.schedule import SCHEDULES, Call, choose, explanation, reasons
from longattn.distributed.spans import LAYOUTS, Span, spans_of, union, without
from longattn.problem import Problem


def call(
    ranks: int, mask: Mask, *, tokens: int = 64, layout: str = "contiguous", heads: tuple[int, int] = (8, 8)
) -> Call:
    problem = Problem(1, *heads, 0, 0, 8, 8, torch.float32, "cpu", Mask(), 1.0)
    return Call(problem, Geometry(mask, tokens, tokens, layout, ranks), 0, masked=False)


def window(left: int | None, right: int | None = 0, sinks: int = 0) -> Mask:
    return Mask(left, right, sinks, 0, from_end=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spans_hold_every_token_once(layout: str) -> None:
    held = [span for rank in range(5) for span in spans_of(layout, 5, rank, 6)]
    assert sorted(token for span in held for token in range(*span)) == list(range(30))


def test_span_arithmetic() -> None:
    draw = random.Random(0)
    for _ in range(50):
        first, second = ([Span(*sorted(draw.choices(range(20), k=2))) for _ in range(3)] for _ in range(2))
        tokens = [{token for span in spans for token in range(*span)} for spans in (first, second)]
        assert [token for span in union(first) for token in range(*span)] == sorted(tokens[0])
        assert [token for span in without(first, second) for token in range(*span)] == sorted(tokens[0] - tokens[1])


def test_what_travels_is_what_is_seen() -> None:
    draw = random.Random(1)
    for _ in range(60):
        sides = draw.choice((None, 0, 3, 9, 30)), draw.choice((None, 0, 2, 11))
        starts = None if draw.random() < 0.5 else tuple(sorted(draw.choices(range(49), k=5)))
        mask = window(*sides, sinks=draw.choice((0, 2, 9)))
        geometry = Geometry(mask, 48, 48, draw.choice(LAYOUTS), draw.choice((2, 3, 4)), starts)
        dense = torch.zeros(48, 48, dtype=torch.bool)
        for document in zip(starts, starts[1:], strict=False) if starts else [(0, 48)]:
            inside = slice(*document)
            length = document[1] - document[0]
            dense[inside, inside] = mask.materialize(length, length)[0]
        tokens = [[n for span in geometry.keys_of(rank) for n in range(*span)] for rank in range(geometry.ranks)]
        for source in range(geometry.ranks):
            seers = [step for step in range(1, geometry.ranks) if see(dense, tokens, source, step)]
            assert hops(geometry)[source] == max(seers, default=0)
            for step in range(1, geometry.ranks):
                to = (source + step) % geometry.ranks
                sinks = range(*broadcast_sinks(geometry))
                wanted = dense[tokens[to]][:, tokens[source]].any(0)
                keys = {n for n, seen in zip(tokens[source], wanted, strict=True) if seen and n not in sinks}
                sent = {n for span in halo(geometry, source, to) for n in range(*span)}
                assert keys <= sent
                if starts is None and geometry.layout == "contiguous":
                    assert keys == sent


def see(dense: torch.Tensor, tokens: list[list[int]], source: int, step: int) -> bool:
    return bool(dense[tokens[(source + step) % len(tokens)]][:, tokens[source]].any())


def test_zigzag_balances_causal_work() -> None:
    shares = [imbalance(Geometry(window(None), 4096, 4096, layout, 8)) for layout in LAYOUTS]
    assert shares[0] == pytest.approx(2 - 1 / 8, rel=1e-3) and shares[1] == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("made", "schedule", "why"),
    [
        (call(4, window(None)), "ulysses", "work alike"),
        (call(4, window(None), layout="zigzag"), "ulysses", "in a ring"),
        (call(4, window(None), layout="zigzag", heads=(8, 1)), "ring", "if it traded heads"),
        (call(4, window(None), heads=(6, 6)), "ring", "travel while ranks compute"),
        (call(4, window(9, sinks=2)), "halo", "at most 11 keys of others"),
        (call(4, window(40), heads=(6, 6)), "ring", ""),
        (call(1, window(None)), "ring", ""),
    ],
)
def test_auto(made: Call, schedule: str, why: str) -> None:
    chosen, because = choose(made, "auto")
    assert chosen == schedule and why in because


def test_reasons() -> None:
    assert reasons(call(4, window(None), heads=(6, 6)), "ulysses") == [
        "4 ranks of the mesh do not divide the 6 heads of q"
    ]
    assert reasons(call(4, window(3, None)), "halo") == ["queries see all keys to their right"]
    assert reasons(call(4, window(3)), "ring+ulysses") == ["needs a mesh of two dimensions"]
    assert choose(call(4, window(None)), "halo")[0] is None
    with pytest.raises(InvalidInput, match="schedule"):
        choose(call(4, window(None)), "star")


def test_explanation_is_a_table() -> None:
    text = str(explanation(call(4, window(9)), 1, "auto"))
    assert text.startswith("schedule") and all(f"  {name} " in text for name in SCHEDULES)
    assert "this rank sends 4,608 B forward" in text  # 9 keys and values of 8 heads, 8 wide
