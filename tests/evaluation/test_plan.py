"""The cost model of `longattn plan`: published figures, limits, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from longattn import InvalidInput
from longattn.cli import main
from longattn.evaluation import MACHINES, MODELS, plan
from longattn.evaluation.plan import can_run
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


def test_the_time_of_a_plan_is_bounded() -> None:
    """A ring of more ranks takes longer to plan; layers that are alike are planned once."""
    assert plan(MODELS["llama-8b-sliding"], 100_000_000, 2048, H100).schedule == "halo+ring"
    for gpus in (0, 2049, 10**6, 10**30):
        for call in (plan, lambda *arguments: can_run(*arguments[:3], "ring")):
            with pytest.raises(InvalidInput, match=r"gpus: expected an int in \[1, 2048\]"):
                call(LLAMA, 1_000_000, gpus, H100)
    with pytest.raises(InvalidInput, match="tokens"):
        plan(LLAMA, 10**13, 8, H100)


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
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "list.json").write_text("[1]")
    models = [["--model", str(tmp_path / name)] for name in ("missing", "deep.json", "list.json", "plan.png")]
    counts = ["0", "many", "1.5", "nan", "1e400", "10000000", "1..1e9", "8,"]
    for option in (*models, ["--tokens", "many"], ["--tokens", "1e300"], *(["--gpus", count] for count in counts)):
        result = CliRunner().invoke(main, ["plan", "--schedule", "all", *option])
        assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1, result.stderr
        assert "LONGATTN_TRACEBACK" not in result.stderr
    assert "2.3M" in CliRunner().invoke(main, ["plan", "--tokens", "2.3M"]).stdout
