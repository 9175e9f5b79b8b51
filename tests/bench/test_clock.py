"""Calls are timed in turn."""

from __future__ import annotations

import pytest

from longattn.bench.clock import in_turn, make_clock


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = [lambda name=name: order.append(name) for name in "abc"]
    samples = in_turn(calls, make_clock("cpu"), rounds=3, seconds=60.0)
    assert order == list("aabbcc" * 3)  # once untimed, then timed
    assert [len(times) for times in samples] == [3, 3, 3]
    assert all(seconds >= 0 for times in samples for seconds in times)


@pytest.mark.parametrize(("rounds", "expected"), [(1, 1), (5, 5), (50, 5)])
def test_time_ends_the_rounds_but_for_five(rounds: int, expected: int) -> None:
    (samples,) = in_turn([lambda: None], make_clock("cpu"), rounds, seconds=0.0)
    assert len(samples) == expected


def test_nothing_to_time() -> None:
    assert in_turn([], make_clock("cpu"), 5, seconds=0.0) == []


@pytest.mark.gpu
def test_the_gpu_is_timed() -> None:
    (samples,) = in_turn([lambda: None], make_clock("cuda"), 3, seconds=60.0)
    assert len(samples) == 3
