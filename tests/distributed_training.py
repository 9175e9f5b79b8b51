"""What the ranks of a test's World run: trainings, and Hugging Face models, on shards of sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from longattn.distributed import context_parallel, shard, unshard
from longattn.models import Decoder, TransformerConfig
from longattn.training import ContextParallel, TrainingConfig, train

SIZES: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "max_length": 48}
CONFIGS = (
    TransformerConfig(**SIZES, pattern="SL", window=9, sinks=2),
    TransformerConfig.style("gpt2", **{**SIZES, "kv_heads": 4}),
)


class Batches:
    """Random tokens, two sequences of 48 a step, until a step before which the training is cut off."""

    def __init__(self, until: int) -> None:
        self.until = until

    def batch(self, step: int) -> Tensor:
        if step == self.until:
            raise InterruptedError
        return torch.randint(256, (2, 49), generator=torch.Generator().manual_seed(step))

    def describe(self) -> dict[str, Any]:
        return {"data": "random"}


def training(model: Any, until: int = 4, checkpoint: Path | None = None, resume: bool = False) -> list[float]:
    """The losses of four steps, or none if it is cut off before."""
    config = TrainingConfig(steps=4, warmup=0, precision="float32", save_every=2)
    try:
        return train(model, Batches(until), config, checkpoint=checkpoint, resume=resume, show_progress=False).losses
    except InterruptedError:
        return []


def decoder(config: TransformerConfig) -> Decoder:
    torch.manual_seed(3)
    return Decoder(config)


def train_here(
    rank: int, shape: tuple[int, ...], layout: str, until: int, folder: str, resume: bool
) -> list[list[float]]:
    """The losses of a training of each config on these ranks."""
    mesh = init_device_mesh("cpu", shape)
    found = []
    for at, config in enumerate(CONFIGS):
        model = ContextParallel(decoder(config), mesh, layout=layout)
        found.append(training(model, until, Path(folder) / str(at), resume))
    return found
