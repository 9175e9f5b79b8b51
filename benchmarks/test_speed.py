"""Every case and contender of `longattn bench` under pytest-benchmark, for its statistics and its comparison of runs.

pytest benchmarks -k "window and float32"
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from longattn.bench import Case, Contender, Refused, contenders, make_cases, warmed_up

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_ENTRIES = [(case, contender) for case in make_cases(device=_DEVICE) for contender in contenders(case)]


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("case", "contender"), _ENTRIES, ids=[f"{case.name}-{contender.name}" for case, contender in _ENTRIES]
)
def test_speed(benchmark: Any, case: Case, contender: Contender) -> None:
    try:
        call, _ = warmed_up(contender, case, case.inputs())
    except Refused as refused:
        pytest.skip(str(refused))
    benchmark.group, benchmark.name = case.name, contender.name
    benchmark.extra_info.update(case.to_dict(), contender=contender.name, work=case.work)

    def finished() -> None:
        call()
        if case.device == "cuda":
            torch.cuda.synchronize()

    benchmark(finished)
