"""`longattn train`: a byte-level decoder from text files."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch
from rich.console import Console

from longattn.errors import InvalidInput
from longattn.evaluation import loss_by_position
from longattn.models import Decoder, TransformerConfig, matmul_dtype
from longattn.training import ByteCorpus, RandomWindows, TrainingConfig, find_files, split_files
from longattn.training import train as run_training
from longattn.training.loop import PRECISIONS

__all__ = ["train"]

_HELD_OUT_WINDOWS = 64


@click.command(context_settings={"show_default": True})
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The checkpoint to write.")
@click.option("--resume", is_flag=True, help="Go on from --out; all else as it was started.")
@click.option("--files", "name_pattern", default="*", help="Which names to take below folders, such as '*.txt'.")
@click.option("--held-out", default=0.1, help="Share of the files kept out of training, to be evaluated on; may be 0.")
@click.option("--context", default=256, help="Trained length, in bytes.")
@click.option("--dim", default=128, help="Width of the model.")
@click.option("--layers", default=4, help="Number of blocks.")
@click.option("--heads", default=2, help="Query heads.")
@click.option("--kv-heads", default=1, help="Key and value heads.")
@click.option("--pattern", default="L", help="One letter a layer, repeated: L full attention, S sliding window.")
@click.option("--window", type=int, help="Keys that a sliding layer sees.")
@click.option("--sinks", default=0, help="First keys that a sliding layer sees from everywhere.")
@click.option("--steps", default=2000, help="Training steps.")
@click.option("--seconds", default=0.0, help="Train on for at least this long.")
@click.option("--batch-size", default=8, help="Windows of text per step.")
@click.option("--learning-rate", default=2.5e-3, help="Peak learning rate.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", help="Of the matrix products.")
@click.option("--save-every", default=200, help="Steps between checkpoints.")
@click.option("--seed", default=0, help="Of the initial weights and of the batches.")
def train(
    paths: tuple[Path, ...],
    out: Path,
    resume: bool,
    name_pattern: str,
    held_out: float,
    context: int,
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int,
    pattern: str,
    window: int | None,
    sinks: int,
    steps: int,
    seconds: float,
    batch_size: int,
    learning_rate: float,
    precision: str,
    save_every: int,
    seed: int,
) -> None:
    """Train a byte-level decoder on text files, or on all files below folders.

    Ctrl-C saves; the same command with --resume goes on from there, to the same losses.
    """
    console = Console(highlight=False, markup=False)
    if out.exists() != resume:
        expected = "a checkpoint to resume from" if resume else "a new file, or --resume beside it"
        raise InvalidInput("--out", expected, out)
    model_config = TransformerConfig(
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        max_length=context,
        pattern=pattern,
        window=window,
        sinks=sinks,
    )
    training_config = TrainingConfig(
        steps=steps, seconds=seconds, learning_rate=learning_rate, precision=precision, save_every=save_every
    )
    files = find_files(paths, name_pattern)
    for_training, for_evaluation = split_files(files, held_out) if held_out else (files, [])
    corpus = ByteCorpus(for_training)
    batches = RandomWindows(corpus, batch_size=batch_size, length=context, seed=seed)
    torch.manual_seed(seed)
    model = Decoder(model_config)
    weights = sum(weight.numel() for weight in model.parameters())
    console.print(
        f"{weights:,} weights; {len(corpus):,} bytes in {len(for_training)} files, {len(for_evaluation)} files held out"
    )
    try:
        result = run_training(model, batches, training_config, checkpoint=out, resume=resume)
    except KeyboardInterrupt:
        console.print(f"interrupted; saved to {out}: the same command with --resume goes on", soft_wrap=True)
        sys.exit(130)
    console.print(f"{result.step} steps, {result.seconds:.0f} s; saved to {out}", soft_wrap=True)
    if for_evaluation:
        windows = ByteCorpus(for_evaluation).spread(_HELD_OUT_WINDOWS, context + 1)
        held_out_loss = loss_by_position(model, windows, dtype=matmul_dtype("cpu")).bucket(0, context)
        console.print(f"held-out loss {held_out_loss.loss:.3f} ± {held_out_loss.standard_error:.3f} nats per byte")
