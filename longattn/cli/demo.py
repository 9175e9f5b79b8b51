"""`longattn demo`: train a small model at a short context on real text, extend it, and measure what that does."""

from __future__ import annotations

import importlib.util
import json
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch import Tensor

from longattn._version import __version__
from longattn.cli import demo_report as report
from longattn.cli.demo_report import AttentionRow, Reading
from longattn.cli.output import make_console
from longattn.cli.writing import writes_folder
from longattn.evaluation import ATTENTION_CALLS, CouldNotRun, attention_cost, loss_by_position, loss_in_short_windows
from longattn.files import write_text
from longattn.models import Decoder, TransformerConfig, matmul_dtype
from longattn.scaling import YaRN
from longattn.training import ByteCorpus, RandomWindows, TrainingConfig, split_files, stdlib_files
from longattn.training import train as run_training

__all__ = ["demo"]

_SEED = 0
_DTYPE = matmul_dtype("cpu")


@dataclass(frozen=True)
class Plan:
    """The sizes of a demo.

    Its trainings go by the clock, and run for a number of steps at least: as many as it takes to show the point on a
    slow machine (400 and 20 steps: without extension the far end loses 1.16 nats per byte, the fine-tuned model 0.03).
    """

    context: int = 256  # trained length
    factor: int = 8  # how many times that is read
    model: TransformerConfig = field(
        default_factory=lambda: TransformerConfig(dim=128, layers=4, heads=2, kv_heads=1, max_length=256)
    )
    training: TrainingConfig = TrainingConfig(steps=400, seconds=120.0, learning_rate=2.5e-3)
    batch_size: int = 8
    fine_tuning: TrainingConfig = TrainingConfig(steps=30, seconds=45.0, learning_rate=1e-3, warmup=10)
    fine_tuning_batch_size: int = 2
    windows: int = 96  # held-out texts that are read
    sinks: int = 4
    attention_length: int = 16384
    attention_window: int = 1024

    @property
    def length(self) -> int:
        """The extended length."""
        return self.factor * self.context


QUICK = Plan(
    context=32,
    model=TransformerConfig(dim=32, layers=2, heads=2, kv_heads=1, max_length=32),
    training=TrainingConfig(steps=4, warmup=1),
    fine_tuning=TrainingConfig(steps=2, warmup=1),
    windows=4,
    attention_length=1024,
    attention_window=128,
)


@click.command(context_settings={"show_default": True})
@click.option(
    "--out", default="demo-results", type=click.Path(file_okay=False, path_type=Path), help="Folder for JSON and PNG."
)
@click.option("--quick", is_flag=True, help="Tiny sizes, seconds: shows that everything runs, and nothing else.")
def demo(out: Path, quick: bool) -> None:
    """Train a small model at a short context on Python's standard library, extend it 8 times, show what it gains.

    Takes about four minutes on two cores. Every figure is measured in this run.
    """
    console = make_console()
    with writes_folder(out):
        run(QUICK if quick else Plan(), out, console)


def run(plan: Plan, out: Path, console: Console) -> None:
    """All parts of the demo; results.json and loss_by_position.png go to `out`."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    for_training, held_out = split_files(stdlib_files())
    corpus = ByteCorpus(for_training)
    windows = ByteCorpus(held_out).spread(plan.windows, plan.length + 1, seed=_SEED)
    torch.manual_seed(_SEED)
    model = Decoder(plan.model)
    weights = sum(weight.numel() for weight in model.parameters())
    console.print(
        f"Text: the standard library of Python {platform.python_version()}, {len(corpus):,} bytes in "
        f"{len(for_training)} files to train on; {len(held_out)} files are held out.\n"
        f"Model: {weights:,} weights over bytes; {torch.get_num_threads()} threads, {_name(_DTYPE)} matrix products."
    )

    readings, trainings = _extend(plan, model, corpus, windows, console)
    attention = _attention(plan, console)
    seconds = time.perf_counter() - started
    shortfall = report.shortfall(readings, plan.context, [each["steps"] for each in trainings.values()])
    results = {
        "versions": {"longattn": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads(), "dtype": _name(_DTYPE)},
        "plan": asdict(plan) | {"model": plan.model.to_dict()},
        "weights": weights,
        "trainings": trainings,
        "loss_by_position": [reading.to_dict(plan.context) for reading in readings],
        "attention": [asdict(row) for row in attention],
        "shortfall": shortfall,
        "seconds": seconds,
    }
    figures = out / "results.json"
    write_text(figures, json.dumps(results, indent=2) + "\n")
    plot = out / "loss_by_position.png"
    can_plot = importlib.util.find_spec("matplotlib") is not None
    if can_plot:
        report.plot_readings(readings, plan.context, plot)

    report.print_readings(console, readings, plan.context)
    report.print_far_end(console, readings, plan.context)
    if shortfall is not None:
        console.print(f"\n{shortfall}")
    report.print_attention(console, attention, plan.attention_length)
    if can_plot:
        console.print(f"\nPlot: {plot}", soft_wrap=True)
    else:
        console.print("No plot: matplotlib is not installed (pip install longattn[plot]).")
    console.print(f"All figures: {figures}\n{seconds:.0f} s in all.", soft_wrap=True)


def _extend(
    plan: Plan, model: Decoder, corpus: ByteCorpus, windows: Tensor, console: Console
) -> tuple[list[Reading], dict[str, Any]]:
    """Train, extend, fine-tune; the held-out windows as read at each stage, and what the trainings took."""

    def fit(what: str, model: Decoder, batches: RandomWindows, config: TrainingConfig) -> dict[str, Any]:
        steps = f"{config.seconds:g} s and at least {config.steps} steps" if config.seconds else f"{config.steps} steps"
        console.print(f"\n{what} at {batches.length} bytes, for {steps}, seed {batches.seed}.")
        result = run_training(model, batches, config, description=f"{batches.length} bytes")
        report.print_training(console, result)
        return {"steps": result.step, "tokens": result.tokens, "seconds": result.seconds, "losses": result.losses}

    def read(name: str, style: str, reader: Decoder) -> Reading:
        with console.status(f"reading {plan.length} bytes: {name}"):
            return Reading(name, style, loss_by_position(reader, windows, dtype=_DTYPE))

    short = RandomWindows(corpus, batch_size=plan.batch_size, length=plan.context, seed=_SEED)
    trained = fit("Training", model, short, plan.training)

    extended = model.extended(scaling=YaRN(plan.factor, plan.context))
    with console.status(f"reading {plan.context} bytes at a time"):
        pieces = loss_in_short_windows(model, windows, plan.context, plan.context // 4, dtype=_DTYPE)
    readings = [
        Reading(f"{plan.context} bytes at a time", "k:", pieces),
        read("no extension", "C3", model),
        read("YaRN", "C1", extended),
    ]

    long = RandomWindows(corpus, batch_size=plan.fine_tuning_batch_size, length=plan.length, seed=_SEED)
    tuned = fit("Fine-tuning with YaRN", extended, long, plan.fine_tuning)
    readings += [
        read("YaRN + fine-tune", "C0", extended),
        read("fine-tuned, window + sinks", "C2--", extended.extended(window=plan.context, sinks=plan.sinks)),
    ]
    return readings, {"training": trained, "fine_tuning": tuned}


def _attention(plan: Plan, console: Console) -> list[AttentionRow]:
    window = f"window {plan.attention_window} + {plan.sinks} sinks"
    sliding = {"window": plan.attention_window, "sinks": plan.sinks}
    rows = []
    for mask, name, keywords in (
        ("causal", "longattn", {}),
        ("causal", "fused", {}),
        ("causal", "dense", {}),
        (window, "longattn", sliding),
        (window, "masked", sliding),
    ):
        label = ATTENTION_CALLS[name].label
        with console.status(f"measuring {label}, {mask}"):
            try:
                rows.append(AttentionRow(mask, label, attention_cost(name, plan.attention_length, **keywords)))
            except CouldNotRun as error:
                rows.append(AttentionRow(mask, label, None, str(error)))
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
