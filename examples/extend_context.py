"""Train a small model on short texts, and read long ones with it, by every method: loss by position, without tuning.

The text is the source of Python's standard library, as bytes; a tenth of its files is held out.

    python examples/extend_context.py --seconds 240
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from longattn import scaling
from longattn.evaluation import loss_by_position
from longattn.extension import DualChunk, LogN, Method, SelfExtend, StreamingLLM
from longattn.integrations import extend
from longattn.models import Decoder, TransformerConfig
from longattn.training import (
    ByteCorpus,
    Checkpoint,
    RandomWindows,
    TrainingConfig,
    save_checkpoint,
    split_files,
    stdlib_files,
    train,
)

TRAINED, FACTOR = 256, 4  # tokens, and how many times that is read
METHODS: Mapping[str, Sequence[scaling.Scaling | Method]] = {
    "none": (),
    "Linear": (scaling.Linear(FACTOR),),
    "NTK": (scaling.NTK(2 * FACTOR),),
    "DynamicNTK": (scaling.DynamicNTK(FACTOR, TRAINED),),
    "Llama3": (scaling.Llama3(FACTOR, TRAINED),),
    "YaRN": (scaling.YaRN(FACTOR, TRAINED),),
    "YaRN, log-n": (scaling.YaRN(FACTOR, TRAINED), LogN(TRAINED)),
    "Self-Extend": (SelfExtend(group=8, window=64),),
    "dual chunk": (DualChunk.of(TRAINED),),
    "StreamingLLM": (StreamingLLM(TRAINED - 4, 4),),
}


def main(
    folder: Path, *, seconds: float = 240.0, steps: int = 200, dim: int = 128, windows: int = 32
) -> dict[str, list[float]]:
    """Train in `folder`, print the table, and return each method's losses, a trained length of positions at a time."""
    for_training, held_out = split_files(stdlib_files())
    torch.manual_seed(0)
    model = Decoder(TransformerConfig(dim=dim, layers=4, heads=dim // 64, kv_heads=1, max_length=TRAINED))
    batches = RandomWindows(ByteCorpus(for_training), batch_size=8, length=TRAINED)
    config = TrainingConfig(steps=steps, seconds=seconds, learning_rate=2.5e-3, warmup=min(50, steps // 4))
    train(model, batches, config, description=f"training at {TRAINED}")
    save_checkpoint(folder / "model.safetensors", Checkpoint(model.config, model.state_dict()))

    texts = ByteCorpus(held_out).spread(windows, FACTOR * TRAINED + 1)
    places = [f"{start}-{start + TRAINED - 1}" for start in range(0, FACTOR * TRAINED, TRAINED)]
    print(f"nats per byte, {windows} held-out texts\n{'method':>14}" + "".join(f"{place:>12}" for place in places))
    found = {}
    for name, methods in METHODS.items():
        longer, started = model, time.perf_counter()
        for method in methods:
            longer = extend(longer, method)
        found[name] = [bucket.loss for bucket in loss_by_position(longer, texts).buckets(TRAINED)]
        losses = "".join(f"{loss:>12.3f}" for loss in found[name])
        print(f"{name:>14}{losses}   {time.perf_counter() - started:.1f} s")
    print(f"\nFrom here: longattn eval {folder / 'model.safetensors'} --method yarn --factor {FACTOR} --lengths 512,1k")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/extend"))
    parser.add_argument("--seconds", type=float, default=240.0, help="of training")
    arguments = parser.parse_args()
    main(arguments.folder, seconds=arguments.seconds)
