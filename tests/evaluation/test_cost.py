"""What a call costs, measured in a fresh process: memory that is known, failures that are told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longattn import InvalidInput
from longattn.evaluation import ATTENTION_CALLS, CouldNotRun, attention_cost, measure
from longattn.evaluation.cost import _measure_here

MEGABYTE = 2**20


@pytest.fixture(autouse=True)
def _this_file_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def here(function: Callable[..., object]) -> str:
    return f"{Path(__file__).stem}:{function.__name__}"


def allocate(megabytes: int) -> Callable[[], object]:
    torch.ones(2 * megabytes * MEGABYTE, dtype=torch.uint8)  # a peak that was there before
    return lambda: torch.ones(megabytes * MEGABYTE, dtype=torch.uint8)


def test_the_peak_is_what_the_call_allocates() -> None:
    cost = measure(here(allocate), {"megabytes": 200}, threads=1)
    if cost.peak_source != "VmHWM":
        pytest.skip("the high-water mark cannot be set back here")
    assert 195 * MEGABYTE < cost.peak_bytes < 220 * MEGABYTE  # the kernel counts in batches of pages
    assert cost.seconds > 0 and cost.runs >= 1


def test_without_a_mark_to_set_back_the_peak_of_the_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longattn.evaluation.cost._reset_high_water_mark", lambda: False)
    cost = _measure_here(lambda: torch.ones(MEGABYTE).sum())
    assert cost.peak_source == "ru_maxrss" and cost.peak_bytes >= 0


@pytest.mark.skipif(os.name != "posix", reason="a shell plays the process")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'RuntimeError: no such thing' >&2; exit 1", "no such thing"),
        ("kill -9 $$", "signal 9"),
        ("exec sleep 60", "longer than 0.05 s"),
    ],
)
def test_failures_are_told(script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = tmp_path / "process"
    process.write_text(f"#!/bin/sh\n{script}\n")
    process.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(process))
    with pytest.raises(CouldNotRun, match=message):
        measure("module:function", {}, timeout=0.05 if "sleep" in script else 60.0)


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (7, 0), (7, 2), (100, 3)])
def test_all_ways_compute_the_same(window: int | None, sinks: int) -> None:
    q, k, v = torch.randn(3, 1, 2, 50, 16).unbind(0)
    ours = ATTENTION_CALLS["longattn"].run(q, k, v, window, sinks)
    for name, call in ATTENTION_CALLS.items():
        if name != "fused" or window is None:
            torch.testing.assert_close(call.run(q, k, v, window, sinks), ours, rtol=1e-4, atol=1e-5)


def test_the_fused_kernel_of_torch_has_no_window() -> None:
    q: Any = torch.randn(1, 1, 4, 8)
    with pytest.raises(InvalidInput, match="causal masks only"):
        ATTENTION_CALLS["fused"].run(q, q, q, 2, 0)
    with pytest.raises(InvalidInput, match="one of longattn"):
        attention_cost("sparse", 4)


def test_ours_is_linear_in_memory() -> None:
    ours = attention_cost("longattn", 4096, threads=1)
    if ours.peak_source != "VmHWM":
        pytest.skip("the high-water mark cannot be set back here")
    assert ours.peak_bytes < 4096 * 4096 * 4 / 4  # of the dense matrix of scores
