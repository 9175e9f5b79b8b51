"""A training step of a language model of SmolLM2-135M's shape: ours, and transformers' with SDPA and eager attention.

python -m benchmarks.training_step --tokens 2048 --tokens 8192
python -m benchmarks.training_step --tokens 32768 --rounds 1 --warm-ups 0 --contender longattn

A step is the loss of one sequence, its gradients, and AdamW, as `longattn.training.train` takes it: weights in
float32, the products of matrices in bfloat16 by autocast. Each contender runs in a process of its own, which times
its last step; the contenders take turns. CPU seconds are those of all threads: with --threads 1 they tell of the work
even where others use the machine, too. The memory is the highest that the process had resident, with all that it
loaded. What needs more memory than is free by estimate is not run, and said to be.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from longattn.models import Decoder, TransformerConfig, autocast

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "dim": 576,
    "layers": 30,
    "heads": 9,
    "kv_heads": 3,
    "hidden": 1536,
    "max_length": 8192,
    "rope_base": 100_000.0,
    "norm_eps": 1e-5,
    "tie_embeddings": True,
}
CONTENDERS = ("longattn", "sdpa", "eager")
RECOMPUTE_FROM = 8192  # tokens

Loss = Callable[[Tensor], Tensor]


@click.command(context_settings={"show_default": True})
@click.option("--tokens", type=int, multiple=True, default=[2048, 8192], help="Of the sequence; repeatable.")
@click.option(
    "--contender", "names", type=click.Choice(CONTENDERS), multiple=True, default=CONTENDERS, help="Repeatable."
)
@click.option("--rounds", default=3, help="Processes of each contender.")
@click.option("--threads", type=click.IntRange(min=1), default=torch.get_num_threads(), help="Of the CPU.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", help="Of the matrix products.")
@click.option("--layers", default=SMOLLM2["layers"], help="Fewer are quicker, and another model.")
@click.option("--window", type=int, help="All layers see this many tokens only; of longattn alone.")
@click.option("--warm-ups", default=1, help="Steps that are not timed.")
@click.option("--only", hidden=True, help="What a process runs, as JSON.")
def main(
    tokens: tuple[int, ...],
    names: tuple[str, ...],
    rounds: int,
    threads: int,
    dtype: str,
    layers: int,
    window: int | None,
    warm_ups: int,
    only: str | None,
) -> None:
    """Seconds and peak memory of a training step of SmolLM2's shape."""
    if only is not None:
        click.echo(json.dumps(_measure(**json.loads(only))))
        return
    click.echo(
        f"{layers} layers, {dtype} products, {threads} threads, medians of {rounds}; from {RECOMPUTE_FROM} tokens on"
    )
    click.echo("all contenders keep the inputs of blocks only, and compute the blocks again in the backward")
    click.echo(
        f"{'tokens':>8} {'contender':>12} {'seconds':>9} {'by ours':>8} {'CPU s':>9} {'by ours':>8} {'peak GB':>8}"
    )
    for count in tokens:
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                if (needed := estimated_bytes(name, count, layers)) < _free_bytes():
                    shape = {"layers": layers} | ({"pattern": "S", "window": window} if window else {})
                    job = {"name": name, "tokens": count, "threads": threads, "dtype": dtype}
                    samples[name].append(_in_a_process({**job, "changes": shape, "warm_ups": warm_ups}))
                else:
                    click.echo(f"{count:>8} {name:>12} not run: needs about {needed / 1e9:.0f} GB", err=True)
        for name, found in samples.items():
            click.echo(f"{count:>8} {name:>12} " + _row(found, samples.get("longattn", [])))


def contender(name: str, shape: dict[str, Any], *, recompute: bool) -> tuple[nn.Module, Loss]:
    """(a model of freshly drawn weights, its loss of int64 [1, N + 1])."""
    if name == "longattn":
        ours = Decoder(TransformerConfig(**shape))
        ours.recompute = recompute
        return ours, lambda windows: ours.loss(windows[:, :-1], windows[:, 1:])
    from transformers import LlamaForCausalLM

    from longattn.integrations.huggingface import config_to_hf

    theirs = LlamaForCausalLM._from_config(config_to_hf(TransformerConfig(**shape)), attn_implementation=name)
    if recompute:
        theirs.gradient_checkpointing_enable({"use_reentrant": False})

    def loss(windows: Tensor) -> Tensor:
        targets = windows[:, 1:].contiguous()
        found = theirs(input_ids=windows[:, :-1], labels=targets, shift_labels=targets, use_cache=False)
        return found.loss

    return theirs, loss


def estimated_bytes(name: str, tokens: int, layers: int) -> float:
    """About what a step holds at its peak: weights, AdamW's state, what the backward keeps, and what is quadratic."""
    shape = SMOLLM2
    weights = 16.0 * (shape["vocab_size"] * shape["dim"] + layers * 3.54e6)
    per_block = tokens * 4.0 * (8 * shape["dim"] + 4 * shape["hidden"])
    blocks = layers * tokens * 4.0 * shape["dim"] + per_block if tokens >= RECOMPUTE_FROM else layers * per_block
    if name == "longattn":
        return weights + blocks + 3e9
    logits = 12.0 * tokens * shape["vocab_size"]  # in bfloat16, in float32, and the gradients of both
    if name == "sdpa":
        return weights + blocks + logits
    # Softmax in float32, its copy in bfloat16, and their gradients.
    scores = 12.0 * shape["heads"] * tokens**2 * (1 if tokens >= RECOMPUTE_FROM else layers / 2)
    return weights + blocks + logits + scores


def _row(found: list[dict[str, float]], ours: list[dict[str, float]]) -> str:
    if not found:
        return "not run, for its memory"
    columns = ""
    for clock in ("seconds", "cpu_seconds"):
        spent = statistics.median(one[clock] for one in found)
        ratio = f"{spent / statistics.median(one[clock] for one in ours):.2f} x" if ours else "-"
        columns += f"{spent:>9.2f} {ratio:>8} "
    return columns + f"{max(one['peak_bytes'] for one in found) / 1e9:>8.2f}"


def _in_a_process(job: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.training_step", "--only", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{job['name']} ended with {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(
    name: str, tokens: int, threads: int, dtype: str, changes: dict[str, Any], warm_ups: int
) -> dict[str, float]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, loss = contender(name, {**SMOLLM2, **changes}, recompute=tokens >= RECOMPUTE_FROM)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    windows = torch.randint(0, SMOLLM2["vocab_size"], (1, tokens + 1))
    seconds = cpu_seconds = 0.0
    for _ in range(warm_ups + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        with autocast("cpu", getattr(torch, dtype)):
            value = loss(windows)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = _kilobytes("/proc/self/status", "VmHWM") * 1024.0
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak}


def _free_bytes() -> float:
    return _kilobytes("/proc/meminfo", "MemAvailable") * 1024.0


def _kilobytes(file: str, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path(file).read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


if __name__ == "__main__":
    main()
