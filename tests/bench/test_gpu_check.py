"""What gpu-check makes of its figures, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longattn.backends import registry
from longattn.bench import Machine, Report, Result


def test_targets_are_judged_by_what_ran(gpu_check: Any) -> None:
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


def test_what_passes_is_entered_beside_the_rest(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "proven.json"
    path.write_text('{"sm_80": "before"}', encoding="utf-8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    gpu_check.enter_as_proven(path, "now")
    assert json.loads(path.read_text(encoding="utf-8")) == {"sm_80": "before", "sm_90": "now"}


def test_without_a_library_the_cuda_kernels_are_not_checked(gpu_check: Any) -> None:
    missing = registry.get("cuda").unavailable()
    if missing is None:
        pytest.skip("there is one")
    assert list(gpu_check.check_cuda(1)) == [f"CUDA kernels not checked: {missing}"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_a_gpu(gpu_check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 1
    assert "torch sees none" in capsys.readouterr().out
