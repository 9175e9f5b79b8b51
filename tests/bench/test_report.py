"""Medians, ratios and shares, and the files that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longattn import InvalidInput
from longattn.bench import Machine, Report, Result, plot
from longattn.bench.cases import AttentionCase, Case, RopeCase

_MACHINE = Machine(
    device="a processor",
    system="Linux x86_64",
    cores=2,
    threads=2,
    extensions=("avx2",),
    isa="avx2",
    load=0.1,
    peaks={"float32": 1e9},
    versions={"longattn": "0", "torch": "2", "python": "3"},
)


def _case(n: int = 8, **changes: object) -> AttentionCase:
    shape = {"nk": n, "nq": n, "q_heads": 1, "kv_heads": 1, "head_dim": 4, "causal": False}
    return AttentionCase(**{"set": "dense", "dtype": "float32", **shape, **changes})  # type: ignore[arg-type]


def _results(case: Case) -> tuple[Result, ...]:
    return (
        Result(case, "longattn", "ours", (1e-3, 9e-3, 2e-3), memory=10, difference=0.0),
        Result(case, "slow", "peer", (5e-3, 4e-3, 6e-3), memory=2000, difference=1e-6),
        Result(case, "quick", "peer", (3e-3, 3e-3, 3e-3), difference=1e-6),
        Result(case, "wrong", "peer", (1e-3, 1e-3, 1e-3), difference=0.5),
        Result(case, "absent", "peer", refused="is not installed"),
    )


@pytest.fixture
def report() -> Report:
    return Report(_MACHINE, _results(_case(8)) + _results(_case(16)))


def test_ratios_are_to_the_best_peer_that_is_right(report: Report) -> None:
    ours, slow, quick, _, _ = report.of(_case(8))
    assert ours.median == 2e-3
    best, slowest = report.best_peer(_case(8)), report.best_peer(_case(8), "sl")
    assert best is not None and best.contender == "quick"
    assert slowest is not None and slowest.contender == "slow"
    assert [report.ratio(result) for result in (ours, slow, quick)] == pytest.approx([1.5, 0.6, 1.0])


def test_what_slows_a_round_cancels_in_ratios() -> None:
    case = _case()
    ours = Result(case, "longattn", "ours", (1.0, 10.0, 1.2, 20.0))
    peer = Result(case, "theirs", "peer", (2.0, 20.0, 2.4, 40.0))
    assert ours.speedup(peer) == pytest.approx(2.0)


def test_a_share_is_of_the_peak_or_of_the_baseline(report: Report) -> None:
    ours = report.of(_case(8))[0]
    assert ours.rate == pytest.approx(4 * 64 * 4 / 2e-3)
    assert report.share(ours) == pytest.approx(ours.rate / 1e9)

    case = RopeCase(set="rope", dtype="bfloat16", n=8, heads=1, head_dim=4)
    results = Result(case, "longattn", "ours", (2.0,)), Result(case, "plain copy", "baseline", (1.0,))
    bound = Report(_MACHINE, results)
    assert bound.share(results[0]) == 0.5
    assert bound.best_peer(case) is None
    assert bound.ratio(results[0]) is None

    unknown = _case(dtype="bfloat16")
    alone = Result(unknown, "longattn", "ours", (1.0,))
    assert Report(_MACHINE, (alone,)).share(alone) is None


def test_json_holds_what_was_measured_and_what_follows(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    report.write(path)
    values = json.loads(path.read_text())
    assert values["machine"]["device"] == "a processor"
    ours, *_, absent = values["results"][:5]
    assert ours["name"] == _case(8).name
    assert ours["median_seconds"] == 2e-3
    assert ours["ratio_to_best_peer"] == pytest.approx(1.5)
    assert ours["flops_per_second"] == pytest.approx(512000)
    assert ours["memory_bytes"] == 10
    assert absent["refused"] == "is not installed"
    assert "median_seconds" not in absent
    assert Report.read(path) == report


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: "{",
        lambda values: "[" * 100_000,
        lambda values: "[]",
        lambda values: json.dumps({**values, "results": 7}),
        lambda values: json.dumps({**values, "machine": {}}),
        *(
            lambda values, name=name, value=value: json.dumps(
                {**values, "results": [{**values["results"][0], name: value}]}
            )
            for name, value in (
                ("seconds", ["x"]),
                ("seconds", [0.0]),
                ("seconds", [float("nan")]),
                ("case", {"kind": "other"}),
                ("case", []),
                ("role", "boss"),
                ("contender", 7),
                ("memory_bytes", "x"),
                ("difference", []),
            )
        ),
    ],
)
def test_damaged_reports_are_refused(report: Report, tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "bench.json"
    report.write(path)
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(InvalidInput, match="report"):
        Report.read(path)


@pytest.mark.parametrize(("load", "disturbed"), [(None, False), (0.4, False), (3.0, True)])
def test_a_busy_machine_warns(load: float | None, disturbed: bool) -> None:
    machine = Machine.from_dict({**_MACHINE.to_dict(), "load": load})
    assert (machine.warning is not None) == disturbed
    assert any("load average" in line for line in machine.lines())


def test_the_machine_describes_itself() -> None:
    machine = Machine.describe("cpu", threads=1)
    assert machine.device
    assert machine.threads == 1
    assert set(machine.versions) == {"longattn", "torch", "python"}
    assert all(peak > 0 for peak in machine.peaks.values())
    assert Machine.from_dict(json.loads(json.dumps(machine.to_dict()))) == machine


def test_a_plot_per_set(report: Report, tmp_path: Path) -> None:
    case = RopeCase(set="rope", dtype="float32", n=8, heads=1, head_dim=4)  # one length only
    both = Report(_MACHINE, report.results + _results(case))
    assert plot(both, tmp_path) == [tmp_path / "dense.png", tmp_path / "rope.png"]
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
