"""`longattn bench`, from its options to its files."""

from __future__ import annotations

import json
from pathlib import Path

import click.testing
import pytest
import torch

from longattn.bench import SETS, contenders, make_cases
from longattn.cli import main
from longattn.cli.bench import duration, size

_QUICK = ["bench", "--device", "cpu", "--quick", "--threads", "1", "--repeats", "1", "--dtype", "float32"]


def _invoke(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_every_set_runs(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    result = _invoke(*_QUICK, "--no-memory", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads

    values = json.loads((tmp_path / "bench.json").read_text())
    cases = make_cases(dtypes=["float32"], quick=True)
    expected = [(case.name, one.name) for case in cases for one in contenders(case) if not one.compiled]
    assert [(entry["name"], entry["contender"]) for entry in values["results"]] == expected
    assert all(bool(entry["seconds"]) != bool(entry["refused"]) for entry in values["results"])
    assert {entry["memory_bytes"] for entry in values["results"]} == {None}
    for name in SETS:
        assert (tmp_path / f"{name}.png").exists()
        assert f" {name} " in result.output
    for word in ("SDPA", "eager", "plain read", "GFLOP/s", "GB/s", "load average"):
        assert word in result.output


def test_memory_and_json(tmp_path: Path) -> None:
    result = _invoke(*_QUICK, "--set", "decode", "--out", str(tmp_path / "new" / "folder"), "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values == json.loads((tmp_path / "new" / "folder" / "bench.json").read_text())
    assert {entry["case"]["set"] for entry in values["results"]} == {"decode"}
    assert all((entry["memory_bytes"] is None) == (not entry["seconds"]) for entry in values["results"])
    assert values["machine"]["threads"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there() -> None:
    result = _invoke("bench", "--device", "cuda", "--quick")
    assert result.exit_code == 2
    assert "torch sees no GPU" in result.output


@pytest.mark.parametrize("option", [("--set", "sparse"), ("--dtype", "int8"), ("--threads", "0"), ("--repeats", "0")])
def test_bad_options(option: tuple[str, str]) -> None:
    assert _invoke("bench", *option).exit_code == 2


@pytest.mark.gpu
def test_a_gpu_is_measured(tmp_path: Path) -> None:
    result = _invoke("bench", "--device", "cuda", "--quick", "--repeats", "1", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output


def test_units() -> None:
    assert [duration(s) for s in (1.5e-6, 0.01234, 2.5)] == ["1.5 us", "12.3 ms", "2.5 s"]
    assert [size(n) for n in (0, 999, 1_500, 12_345_678, 10**11)] == ["0 B", "999 B", "1.5 kB", "12.3 MB", "100 GB"]
