"""The table of targets, in benchmarks/targets.py."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from longattn.bench import Case, Machine, Report, Result, make_cases

_FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "targets.py"


@pytest.fixture(scope="module")
def targets() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("benchmark_targets", _FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def _report(cases: list[Case], ours: float) -> Report:
    """Ours takes `ours` seconds per unit of work, every peer and baseline 1."""
    machine = Machine("cpu", "", 1, 1, (), None, None, {"float32": 1.0, "bfloat16": 1.0}, {})
    results = []
    for case in cases:
        results.append(Result(case, "longattn", "ours", (ours * case.work,), memory=10**6))
        for name in ("SDPA", "FlexAttention", "eager, x", "torch.compile"):
            results.append(Result(case, name, "peer", (1.0 * case.work,)))
        results.append(Result(case, "plain", "baseline", (1.0 * case.work,)))
    return Report(machine, tuple(results))


def test_every_target_has_cases(targets: Any) -> None:
    cases = make_cases()
    for target in targets.TARGETS:
        assert any(target.concerns(case) for case in cases), target.name
    names = [target.name for target in targets.TARGETS]
    assert len(set(names)) == len(names)


def test_what_is_concerned_suffices(targets: Any) -> None:
    cases = make_cases()
    few = targets.concerned(cases)
    assert len(few) < len(cases)
    for target in targets.TARGETS:
        some, every = (target.worst(_report(chosen, ours=0.5)) for chosen in (few, cases))
        assert some is not None and some == every


@pytest.mark.parametrize(("ours", "met"), [(1 / 20, True), (1.0, False)])
def test_targets_are_judged(targets: Any, ours: float, met: bool) -> None:
    report = _report(targets.concerned(make_cases()), ours)
    for target in targets.TARGETS:
        figure, case = target.worst(report)
        assert target.concerns(case)
        if target.at_most:
            assert target.met(figure)  # a pair takes the same time at each length, and 1 MB is little
        elif target.measure is not targets.share:
            assert figure == pytest.approx(1 / ours)
            assert target.met(figure) == met


def test_the_worst_case_decides(targets: Any) -> None:
    cases = [case for case in targets.concerned(make_cases()) if targets.TARGETS[0].concerns(case)]
    good = _report(cases, ours=0.5)
    results = [
        Result(x.case, x.contender, x.role, (2 * x.median,)) if x.case == cases[1] and x.role == "ours" else x
        for x in good.results
    ]
    figure, case = targets.TARGETS[0].worst(Report(good.machine, tuple(results)))
    assert (figure, case) == (pytest.approx(1.0), cases[1])


def test_a_report_is_judged_from_its_file(targets: Any, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    _report(make_cases(["rope"]), ours=0.25).write(path)
    shown = CliRunner().invoke(targets.main, [str(path)], catch_exceptions=False, env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    lines = {line.split(",")[0].strip(): line for line in shown.output.splitlines()}
    assert " met " in lines["apply_rope"]
    assert "not measured" in lines["float32 causal"]
