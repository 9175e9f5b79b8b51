"""The comparison of methods on a trained model: what it runs, keeps and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from longattn.models import Decoder, TransformerConfig
from longattn.training import Checkpoint, save_checkpoint


def test_methods_are_compared_by_position_and_passkey(extension: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    model = Decoder(TransformerConfig(dim=16, layers=1, heads=1, max_length=256))
    save_checkpoint(tmp_path / "model.safetensors", Checkpoint(model.config, model.state_dict()))
    (tmp_path / "text.txt").write_text("Nothing is said here, and it is said again. " * 50)
    out = tmp_path / "out"
    command = [str(tmp_path / "model.safetensors"), "--text", str(tmp_path / "text.txt"), "--out", str(out)]
    command += ["--trained", "256", "--lengths", "512", "--bucket", "64", "--depths", "2", "--tasks", "loss,passkey"]
    command += ["--dtype", "float32"]
    for methods in ("untouched", "untouched,yarn"):
        done = CliRunner().invoke(extension.main, [*command, "--methods", methods])
        assert done.exit_code == 0, done.output
    assert done.output == "512, yarn\n"  # what is there is not measured again
    page = (out / "README.md").read_text()
    assert "| method | 0 to 128 | 128 to 256 | 256 to 384 | 384 to 512 | below | threads | seconds | MB |" in page
    assert {line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")} == {
        "| method",
        "| ---",
        "| untouched",
        "| untouched, in windows of 256",
        "| yarn",
    }
    assert (out / "loss-512.png").exists() and not list((out / "512").glob("*/*.png"))
    refused = CliRunner().invoke(extension.main, [*command, "--methods", "magic"])
    assert refused.exit_code == 2 and "magic" in refused.output
