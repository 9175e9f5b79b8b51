"""Memory and time of one training step over one long sequence: the 12-layer, width-1024 reference model.

python -m benchmarks.long_training --tokens 4096 --tokens 8192
python -m benchmarks.long_training --tokens 32768 --device cuda

A step is the loss of one sequence, its gradients, and AdamW, as `longattn.training.train` takes it. Each length runs in
a process of its own. The peak is the highest that the process had resident, with all that it loaded; on a GPU, what
PyTorch allocated there. The last column is what each token takes, from one length to the next: memory that is linear in
the tokens has one value there.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from longattn.models import Decoder, TransformerConfig
from longattn.training import TrainingConfig, train

SHAPE: dict[str, Any] = {"vocab_size": 32768, "dim": 1024, "layers": 12, "heads": 16, "kv_heads": 4}


@click.command(context_settings={"show_default": True})
@click.option("--tokens", type=int, multiple=True, default=[4096, 8192], help="Of the sequence; repeatable.")
@click.option("--recompute", default=1, help="Keep the input of every n-th block only; 0: keep everything.")
@click.option("--feed-forward-tile", default=2048, help="Tokens of a feed-forward layer at once; 0: all.")
@click.option("--offload/--no-offload", default=True, help="Kept inputs in the host's memory; on a GPU.")
@click.option("--layers", default=SHAPE["layers"], help="Fewer are quicker, and another model.")
@click.option("--window", type=int, help="All layers see this many tokens only.")
@click.option("--precision", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto")
@click.option("--threads", type=click.IntRange(min=1), default=torch.get_num_threads(), help="Of the CPU.")
@click.option("--device", default="cpu")
@click.option("--only", hidden=True, help="What a process runs, as JSON.")
def main(
    tokens: tuple[int, ...],
    recompute: int,
    feed_forward_tile: int,
    offload: bool,
    layers: int,
    window: int | None,
    precision: str,
    threads: int,
    device: str,
    only: str | None,
) -> None:
    """Peak memory and seconds of a training step by tokens."""
    if only is not None:
        click.echo(json.dumps(_measure(**json.loads(only))))
        return
    settings = {"recompute": recompute, "feed_forward_tile": feed_forward_tile or None}
    settings |= {"offload": bool(offload and recompute), "precision": precision}
    job = {"settings": settings, "layers": layers, "window": window, "threads": threads, "device": device}
    click.echo(f"{layers} layers, {settings}, window {window}, {threads} threads, {device}")
    click.echo(f"{'tokens':>9} {'loss':>7} {'seconds':>9} {'CPU s':>9} {'peak GB':>8} {'bytes/token':>12}")
    before: tuple[int, float] | None = None
    for count in sorted(tokens):
        found = _in_a_process({**job, "tokens": count})
        slope = "" if before is None else f"{(found['peak'] - before[1]) / (count - before[0]):,.0f}"
        click.echo(
            f"{count:>9,} {found['loss']:>7.3f} {found['seconds']:>9.1f} {found['cpu']:>9.1f} "
            f"{found['peak'] / 1e9:>8.2f} {slope:>12}"
        )
        before = count, found["peak"]


def _in_a_process(job: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.long_training", "--only", json.dumps(job)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    if done.returncode:
        raise click.ClickException(f"{job['tokens']} tokens failed: {done.stderr.strip()[-400:] or done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


class _OneSequence:
    """The same random tokens at every step."""

    def __init__(self, tokens: int) -> None:
        drawn = torch.Generator().manual_seed(0)
        self._ids = torch.randint(0, SHAPE["vocab_size"], (1, tokens + 1), generator=drawn)

    def batch(self, step: int) -> Tensor:
        return self._ids

    def describe(self) -> dict[str, Any]:
        return {}


def _measure(
    tokens: int, settings: dict[str, Any], layers: int, window: int | None, threads: int, device: str
) -> dict[str, float]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sliding = {} if window is None else {"pattern": "S", "window": window}
    with torch.device(device):
        model = Decoder(TransformerConfig(**{**SHAPE, "layers": layers, "max_length": tokens}, **sliding))
    started, cpu = time.perf_counter(), time.process_time()
    result = train(model, _OneSequence(tokens), TrainingConfig(steps=1, warmup=0, **settings), show_progress=False)
    on_gpu = device.startswith("cuda")
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "loss": result.losses[0],
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - cpu,
        "peak": peak,
    }


if __name__ == "__main__":
    main()
