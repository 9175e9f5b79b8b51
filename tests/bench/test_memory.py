"""Peak memory, measured in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from longattn.bench.cases import AttentionCase
from longattn.bench.contenders import Contender
from longattn.bench.memory import PeakMemory
from longattn.bench.registry import contenders


@pytest.fixture(scope="module")
def peak() -> Iterator[PeakMemory]:
    with PeakMemory("cpu", threads=1) as measuring:
        if measuring.unavailable is not None:
            pytest.skip(measuring.unavailable)
        yield measuring


def _case(**changes: object) -> AttentionCase:
    shape = {"nk": 2048, "nq": 2048, "q_heads": 1, "kv_heads": 1, "head_dim": 16}
    return AttentionCase(**{"set": "dense", "dtype": "float32", **shape, **changes})  # type: ignore[arg-type]


def _named(case: AttentionCase, name: str) -> Contender:
    return next(contender for contender in contenders(case) if contender.name == name)


@pytest.mark.parametrize("backward", [False, True])
def test_the_scores_are_seen(peak: PeakMemory, backward: bool) -> None:
    case = _case(backward=backward)
    scores = 4 * 2048 * 2048
    hidden = 2048 * 2048  # the mask that it holds
    measured = peak.measure(case, _named(case, "eager"))
    assert measured is not None
    assert 2 * scores + hidden <= measured <= 6 * scores + hidden


def test_it_is_of_one_call_each(peak: PeakMemory) -> None:
    # What an earlier call needed hides nothing, and adds nothing.
    case = _case()
    peak.measure(case, _named(case, "eager"))
    small = peak.measure(case, _named(case, "SDPA"))
    assert small is not None
    assert small < 4 * 2048 * 2048


def test_inputs_and_outputs_do_not_count(peak: PeakMemory) -> None:
    case = _case(nk=2**18, nq=1, head_dim=64, causal=False)  # k and v are 64 MB each
    measured = peak.measure(case, _named(case, "plain read"))
    assert measured is not None
    assert measured < 2**22


def test_a_failure_is_told(peak: PeakMemory) -> None:
    case = _case(nk=2**14, nq=2**14, window=2)
    with pytest.raises(RuntimeError, match="SDPA: measuring its memory failed: Refused: its mask tensor would take"):
        peak.measure(case, _named(case, "SDPA"))
