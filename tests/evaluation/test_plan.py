"""The cost model of `longattn plan`: published figures, limits, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from longattn import InvalidInput
from longattn.cli import main
from longattn.evaluation import MACHINES, MODELS, plan
from longattn.models import TransformerConfig

LLAMA, H100, H800 = MODELS["llama-8b"], MACHINES["h100"], MACHINES["h800"]


@pytest.mark.parametrize(
    ("layout", "published", "near"),
    [("zigzag", (0.852, 0.902), 0.10), ("contiguous", (0.521, 0.539), 0.03)],  # forward; forward and backward
)
def test_ring_flash_attention_on_8_h800(layout: str, published: tuple[float, float], near: float) -> None:
    ring = plan(LLAMA, 65536, 8, H800, schedule="ring", layout=layout).attention_seconds
    alone = plan(LLAMA, 65536, 1, H800).attention_seconds / 8
    assert min(published) - near < alone / ring < max(published) + near


@pytest.mark.parametrize(("gpus", "tokens"), [(1, 500_000), (8, 3_700_000), (32, 15_000_000)])
def test_lengths_that_alst_trains(gpus: int, tokens: int) -> None:
    assert plan(LLAMA, tokens, gpus, H100, offload=True).fits
    assert not plan(LLAMA, 2 * tokens, gpus, H100, offload=True).fits


def test_more_ranks_less_time_and_memory() -> None:
    steps = [plan(LLAMA, 1_000_000, 1 << n, H100) for n in range(0, 9, 2)]
    assert all(later.seconds < sooner.seconds for sooner, later in zip(steps, steps[1:], strict=False))
    assert all(later.memory < sooner.memory for sooner, later in zip(steps, steps[1:], strict=False))
    assert all(0 < step.efficiency <= 1.0 + 1e-9 for step in steps)


def test_windows_send_less() -> None:
    full, sliding = (plan(MODELS[name], 1_000_000, 64, H100) for name in ("llama-8b", "llama-8b-sliding"))
    assert sliding.schedule == "halo+ring" and sliding.sent < full.sent / 3 and sliding.seconds < full.seconds / 2


def test_bad_input() -> None:
    with pytest.raises(InvalidInput, match="gpus"):
        plan(LLAMA, 1000, 0, H100)
    with pytest.raises(InvalidInput, match="schedule"):
        plan(LLAMA, 1000, 8, H100, schedule="halo")


def test_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    config = TransformerConfig(dim=64, layers=2, heads=4, max_length=512)
    (tmp_path / "model.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    picture = tmp_path / "plan.png"
    arguments = [
        "--model",
        str(tmp_path / "model.json"),
        "--tokens",
        "500K,1M",
        "--gpus",
        "1..8",
        "--plot",
        str(picture),
    ]
    result = CliRunner().invoke(main, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    assert result.output.count("500K") == 4 and result.output.count("1M") == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    each = CliRunner().invoke(main, ["plan", "--model", "llama-8b-sliding", "--gpus", "4", "--schedule", "all"]).output
    assert all(f" {name} " in each for name in ("ring", "halo+ring", "ulysses")), each
    for option in (["--tokens", "many"], ["--model", "missing"], ["--gpus", "0"]):
        assert CliRunner().invoke(main, ["plan", *option]).exit_code == 1
