"""Models on shards: our decoder under FSDP2, its checkpoints on other numbers of ranks, Hugging Face models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import distributed_training
from distributed_world import World


def test_models_on_shards(tmp_path: Path) -> None:
    """Losses are those of one process; a training that two ranks began goes on with four."""
    alone = [
        distributed_training.training(distributed_training.decoder(config)) for config in distributed_training.CONFIGS
    ]
    folder = str(tmp_path)
    with World(2) as world:
        for losses in world.run(distributed_training.train_here, (2,), "zigzag", 2, folder, False):
            assert losses == [[], []]
        for layout in ("contiguous", "zigzag"):
            world.run(distributed_training.hugging_face, 2, layout)
        world.run(distributed_training.unfit, 2)
    with World(4) as world:
        for losses in world.run(distributed_training.train_here, (2, 2), "contiguous", 4, folder, True):
            for ours, theirs in zip(losses, alone, strict=True):
                assert ours == pytest.approx(theirs[2:], rel=1e-5)


ROOT = Path(__file__).resolve().parents[2]


def torchrun(*command: object) -> str:
    """What two processes print."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_example_under_torchrun(tmp_path: Path) -> None:
    printed = torchrun(ROOT / "examples" / "train_context_parallel.py", tmp_path / "checkpoint", 2, 512)
    assert re.search(r"2 ranks, 512 tokens: loss 5\.\d+ to 5\.\d+", printed), printed
    assert (tmp_path / "checkpoint" / ".metadata").exists()


def test_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    (tmp_path / "this.py").write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], encoding="utf-8")
    assert "halo: a rank sees at most 259 keys of others" in torchrun(tmp_path / "this.py")
