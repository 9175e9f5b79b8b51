"""Distil a GPT: a small model learns from the predictions of a larger one, beside the text itself.

The teacher and its data are those of pretrain_gpt.py. The student is trained twice, with the teacher and without, from
the same weights, on the same batches, for as many steps: the difference is what the teacher gives.

    python examples/pretrain_gpt.py --folder runs/gpt
    python examples/distil.py --gpt runs/gpt
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from longattn.evaluation import mean_loss, perplexity
from longattn.models import Decoder, Distillation, matmul_dtype
from longattn.training import PackedDocuments, TokenFile, TrainingConfig, load_model, train


def main(
    gpt: Path, *, steps: int = 200, dim: int = 128, layers: int = 2, tokens: int = 4096, batches: int = 50
) -> dict[str, float]:
    """Train both students, and return the held-out losses in nats per token."""
    teacher: Decoder = load_model(gpt / "model.safetensors")
    for_training, held_out = TokenFile(gpt / "text.tokens").split(0.1)
    length = teacher.config.max_length
    text = PackedDocuments(for_training, tokens=tokens, longest=length, seed=1)
    unseen = PackedDocuments(held_out, tokens=tokens, longest=length)
    config = replace(teacher.config, dim=dim, layers=layers, heads=dim // 64, kv_heads=dim // 64, hidden=4 * dim)
    training = TrainingConfig(steps=steps, warmup=min(50, steps // 4), learning_rate=1.5e-3)

    losses = {"teacher": mean_loss(teacher, unseen, batches, dtype=matmul_dtype("cpu"))}
    for name in ("student alone", "student with teacher"):
        torch.manual_seed(0)
        student = Decoder(config)
        distillation = Distillation(student, teacher, temperature=2.0, share=0.7) if name.endswith("teacher") else None
        train(student, text, training, loss=distillation, description=name)
        losses[name] = mean_loss(student, unseen, batches, dtype=matmul_dtype("cpu"))
    sizes = {"teacher": weights(teacher), "student": weights(student)}
    for name, loss in losses.items():
        size = sizes[name.split()[0]]
        print(f"{name:22} {size:>10,} weights   {loss:.3f} nats per held-out token, perplexity {perplexity(loss):.1f}")
    return losses


def weights(model: Decoder) -> int:
    """How many."""
    return sum(weight.numel() for weight in model.parameters())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpt", type=Path, default=Path("runs/gpt"), help="the folder of pretrain_gpt.py")
    main(parser.parse_args().gpt)
