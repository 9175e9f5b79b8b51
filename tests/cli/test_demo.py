"""The demo at its smallest: every part runs, and every figure is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from longattn.cli import main
from longattn.cli.demo import Plan
from longattn.cli.demo_report import Reading, shortfall
from longattn.evaluation import LossByPosition, attention_calls, cost


def measure_here(prepare: str, arguments: dict[str, Any], threads: int | None) -> cost.Cost:
    """What `measure` does, without a process of its own: test_cost.py runs those."""
    return cost._measure_here(attention_calls.prepare(**arguments))


def test_quick_demo_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_calls, "measure", measure_here)
    monkeypatch.setattr(cost, "_REPEAT_FOR", 0.0)
    out = tmp_path / "results"
    result = CliRunner().invoke(main, ["demo", "--quick", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert (out / "loss_by_position.png").read_bytes().startswith(b"\x89PNG")

    results = json.loads((out / "results.json").read_text())
    plan = results["plan"]
    length = plan["factor"] * plan["context"]
    names = [reading["name"] for reading in results["loss_by_position"]]
    assert names == ["32 bytes at a time", "no extension", "YaRN", "YaRN + fine-tune", "fine-tuned, window + sinks"]
    for reading in results["loss_by_position"]:
        buckets = reading["buckets"]
        assert [bucket["start"] for bucket in buckets] == list(range(0, length, plan["context"]))
        assert buckets[-1]["stop"] == length
        assert all(0 < bucket["loss"] < 2 * math.log(256) for bucket in buckets)
    assert results["trainings"]["training"]["steps"] == plan["training"]["steps"]
    assert results["trainings"]["fine_tuning"]["steps"] == plan["fine_tuning"]["steps"]

    assert len(results["attention"]) == 5
    for row in results["attention"]:
        assert row["failure"] is None and row["cost"]["seconds"] > 0
        assert f"{row['cost']['seconds']:.3f}" in result.output
    assert str(out / "results.json") in result.output
    assert "Too few steps (4 of training, 2 of fine-tuning)" in " ".join(result.output.split())
    assert results["shortfall"].startswith("Too few steps")


def test_says_when_the_far_end_shows_nothing() -> None:
    def reading(*losses: float) -> list[Reading]:
        return [Reading("", "", LossByPosition(torch.full((2, 64), loss))) for loss in losses]

    assert shortfall(reading(1.5, 3.0, 1.8, 1.52), 16, (900, 90)) is None
    weak = shortfall(reading(1.5, 1.6, 1.8, 1.52), 16, (20, 90))
    assert weak is not None and "loses 0.100, not 0.3 or more (" in weak and "20 of training" in weak
    untuned = shortfall(reading(1.5, 3.0, 1.8, 1.7), 16, (900, 1))
    assert untuned is not None and "fine-tuned one loses 0.200" in untuned and "without extension loses" not in untuned
    assert shortfall(reading(1.5, float("nan"), 1.8, 1.5), 16, (900, 90)) is not None


def test_results_are_on_disk_before_a_table_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("longattn.cli.demo._attention", lambda plan, console: [])
    monkeypatch.setattr("longattn.cli.demo_report.print_readings", fail)
    assert CliRunner().invoke(main, ["demo", "--quick", "--out", str(tmp_path / "out")]).exit_code == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["loss_by_position.png", "results.json"]


def test_the_full_demo_keeps_its_promises_of_size() -> None:
    plan = Plan()
    assert plan.length == 8 * plan.context == 8 * plan.model.max_length
    assert plan.attention_length == 16384
    assert plan.windows >= 64
    assert plan.training.seconds + plan.fine_tuning.seconds <= 200  # of five minutes in all


def test_without_matplotlib_only_the_plot_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longattn.cli.demo._attention", lambda plan, console: [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["demo", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0 and "matplotlib is not installed (pip install longattn[plot])" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
