"""What gpu-check makes of its figures, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from longattn.bench import Machine, Report, Result


def test_targets_are_judged_by_what_ran() -> None:
    machine = Machine("a GPU", "Linux", 1, 1, (), None, None, {}, {})
    wanted = gpu_check.targets()[:3]
    met, missed, absent = (target.case for target in wanted)
    report = Report(
        machine,
        (
            Result(met, "longattn", "ours", (1.0, 1.0)),
            Result(met, "SDPA cuDNN", "peer", (0.9, 0.9)),
            Result(missed, "longattn", "ours", (1.0, 1.0)),
            Result(missed, "SDPA cuDNN", "peer", (0.2, 0.2)),
            Result(absent, "longattn", "ours", (1.0, 1.0)),
            Result(absent, "SDPA cuDNN", "peer", refused="cannot"),
        ),
    )
    first, second, third = gpu_check.judge(report, wanted)
    assert "0.90 of SDPA cuDNN, goal 0.80: met" in first
    assert "0.20 of SDPA cuDNN, goal 0.55: MISSED" in second
    assert "SDPA cuDNN did not run" in third
    assert "not measured" in next(gpu_check.judge(Report(machine, ()), wanted))
    assert len(list(gpu_check.table(report))) == 3


def test_only_a_pass_proves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "proven.json"
    monkeypatch.setattr(gpu_check, "PROVEN", path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    gpu_check.enter_as_proven()
    assert list(json.loads(path.read_text(encoding="utf-8"))) == ["sm_90"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 1
    assert "torch sees none" in capsys.readouterr().out
