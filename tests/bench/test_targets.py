"""The table of targets, in benchmarks/targets.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from longattn.bench import Case, Machine, Report, Result, contenders, make_cases


def _report(cases: list[Case], ours: float) -> Report:
    """Ours takes `ours` seconds per unit of work, every peer and baseline 1."""
    machine = Machine("cpu", "", 1, 1, (), None, None, {"float32": 1.0, "VDPBF16PS": 1.0}, {})
    results = []
    for case in cases:
        results.append(Result(case, "longattn", "ours", (ours * case.work,), memory=10**6))
        for name in ("SDPA", "FlexAttention", "eager, x", "torch.compile"):
            results.append(Result(case, name, "peer", (1.0 * case.work,)))
        results.append(Result(case, "plain read", "baseline", (1.0 * case.work,)))
    return Report(machine, tuple(results))


def test_every_target_has_cases(targets: Any) -> None:
    cases = make_cases()
    for target in targets.TARGETS:
        assert any(target.concerns(case) for case in cases), target.name
    names = [target.name for target in targets.TARGETS]
    assert len(set(names)) == len(names)


def test_what_is_concerned_suffices(targets: Any) -> None:
    cases = make_cases()
    everything = _report(cases, ours=0.5)
    assert len(targets.concerned(cases)) < len(cases)
    for target in targets.TARGETS:
        some, every = (target.worst(_report(targets.concerned(cases, [target]), 0.5)), target.worst(everything))
        assert some is not None and some == every


def test_who_is_needed_suffices(targets: Any) -> None:
    for target in targets.TARGETS:
        case = next(case for case in make_cases() if target.concerns(case))
        needed = [contender for contender in contenders(case) if target.needs(case, contender)]
        assert needed[0].role == "ours"
        assert len(needed) > 1 or target.rivals is None
        assert len(needed) < len(contenders(case)) or target.rivals == ""


@pytest.mark.parametrize(("ours", "met"), [(1 / 20, True), (1.0, False)])
def test_targets_are_judged(targets: Any, ours: float, met: bool) -> None:
    report = _report(targets.concerned(make_cases()), ours)
    for target in targets.TARGETS:
        figure = target.worst(report)
        assert target.concerns(figure.case)
        if target.at_most:
            assert target.met(figure.value)  # a pair takes the same time at each length, and 1 MB is little
        else:
            assert figure.value == pytest.approx(1 / ours)
            assert target.met(figure.value) == (met or target.goal < 1)


def test_the_worst_case_decides(targets: Any) -> None:
    cases = [case for case in targets.concerned(make_cases()) if targets.TARGETS[0].concerns(case)]
    good = _report(cases, ours=0.5)
    results = [
        Result(x.case, x.contender, x.role, (2 * x.median,)) if x.case == cases[1] and x.role == "ours" else x
        for x in good.results
    ]
    figure = targets.TARGETS[0].worst(Report(good.machine, tuple(results)))
    assert (figure.value, figure.case) == (pytest.approx(1.0), cases[1])


def _invoke(targets: Any, *arguments: str) -> dict[str, str]:
    """The lines by their targets' names, up to a comma."""
    shown = CliRunner().invoke(targets.main, arguments, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    return {line.strip("| ").split(",")[0]: line for line in shown.output.splitlines()}


@pytest.mark.parametrize("options", [(), ("--markdown",)])
def test_reports_are_judged_from_their_files(targets: Any, tmp_path: Path, options: tuple[str, ...]) -> None:
    paths = tmp_path / "bench.json", tmp_path / "targets.json"
    _report(make_cases(["rope", "decode"]), ours=0.25).write(paths[0])
    _report(make_cases(["decode"]), ours=2.0).write(paths[1])
    lines = _invoke(targets, *map(str, paths), *options)
    assert " met " in lines["apply_rope"]
    assert " missed " in lines["decode"]  # by the last report
    assert "not measured" in lines["float32 causal"]
    assert not {"apply_rope", "float32 causal"} & set(_invoke(targets, *map(str, paths), "--only", "Decode"))


def test_a_run_is_kept(targets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = targets.Target("tiny", 0.0, {"set": "rope"}, targets.over("eager"), rivals="eager")
    monkeypatch.setattr(targets, "TARGETS", (tiny,))
    monkeypatch.setattr(targets, "make_cases", lambda: make_cases(["rope"], ["float32"], quick=True))
    out = tmp_path / "new" / "targets.json"
    _invoke(targets, "--repeats", "1", "--threads", "1", "--out", str(out))
    values = json.loads(out.read_text())
    assert [(verdict["target"], verdict["verdict"]) for verdict in values["targets"]] == [("tiny", "met")]
    assert {result["contender"] for result in values["results"]} == {"longattn", "eager, rotate_half", "eager, addcmul"}
    assert {result["memory_bytes"] for result in values["results"]} == {None}
    assert Report.read(out).machine.threads == 1


def test_an_unknown_target(targets: Any) -> None:
    result = CliRunner().invoke(targets.main, ["--only", "sparse"])
    assert result.exit_code == 2
    assert "apply_rope" in result.output
