"""`longattn plan`: what a training step over a very long sequence would take on so many GPUs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import click
from rich.table import Table

from longattn.cli.output import drawable, echo, make_console
from longattn.errors import InvalidInput
from longattn.evaluation.plan import MACHINES, MODELS, Estimate, can_run
from longattn.evaluation.plan import plan as estimate
from longattn.files import replaced
from longattn.models import TransformerConfig

__all__ = ["plan"]

_WIDTH = 100  # of the table: a pipe says nothing of its own
_SCHEDULES = ("ring", "halo", "ulysses")


@click.command(context_settings={"show_default": True})
@click.option("--model", default="llama-8b", help=f"{', '.join(MODELS)}, or a JSON file of a TransformerConfig.")
@click.option("--tokens", default="1M", help="Of the sequence, such as 500K or 15M; several with commas between them.")
@click.option(
    "--gpus", default="8", help="How many, at most 2048; several with commas between them, or 1..1024: powers of two."
)
@click.option("--machine", type=click.Choice(list(MACHINES)), default="h100", help="Rates and memory.")
@click.option(
    "--schedule",
    type=click.Choice(("auto", "all", *_SCHEDULES)),
    default="auto",
    help="Of attention; all: a row for each.",
)
@click.option("--offload", is_flag=True, help="Checkpoints and the optimiser's state stay in the host's memory.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Also draw the step times, a PNG.")
def plan(model: str, tokens: str, gpus: str, machine: str, schedule: str, offload: bool, plot: Path | None) -> None:
    """Estimate time, memory and traffic of a training step over one sequence that all GPUs share.

    A cost model, not a measurement: see docs/distributed.md for what it counts and how near it comes.
    """
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise InvalidInput("--plot", "matplotlib (pip install longattn[plot])", "it is not installed")
    config = MODELS[model] if model in MODELS else _from_file(model)
    found = [
        each
        for length in _numbers("--tokens", tokens)
        for count in _numbers("--gpus", gpus)
        for each in _estimates(config, length, count, machine, schedule, offload)
    ]
    table = Table("tokens", "GPUs", "schedule", "step", "attention", "of ideal", "memory", "sends", "fits", title=model)
    for each in found:
        table.add_row(
            _count(each.tokens),
            str(each.gpus),
            each.schedule,
            _time(each.seconds),
            _time(each.attention_seconds),
            f"{each.efficiency:.0%}",
            f"{each.memory / 1e9:,.1f} GB",
            f"{each.sent / 1e9:,.1f} GB",
            "yes" if each.fits else "no",
        )
    if plot is not None:
        _draw(found, f"{model} on {machine}", plot)
    console = make_console()
    console.width = max(console.width, _WIDTH)
    console.print(table)
    if plot is not None:
        echo(plot)


def _estimates(
    config: TransformerConfig, tokens: int, gpus: int, machine: str, schedule: str, offload: bool
) -> list[Estimate]:
    if schedule != "all":
        return [estimate(config, tokens, gpus, MACHINES[machine], schedule=schedule, offload=offload)]
    found = []
    for name in _SCHEDULES:
        if can_run(config, tokens, gpus, name):
            found.append(estimate(config, tokens, gpus, MACHINES[machine], schedule=name, offload=offload))
    return found


def _from_file(path: str) -> TransformerConfig:
    try:
        return TransformerConfig.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        expected = f"one of {', '.join(MODELS)}, or a JSON file of a config"
        raise InvalidInput("--model", expected, f"{path}: {error}") from error


def _numbers(name: str, text: str) -> list[int]:
    """500K,1M or 1..1024."""
    units = {"K": 10**3, "M": 10**6}
    try:
        first, dots, last = text.partition("..")
        if dots:
            powers = [1 << n for n in range(int(last).bit_length()) if int(first) <= 1 << n <= int(last)]
            if powers:
                return powers
        parts = [part.strip().upper() for part in text.split(",")]
        numbers = [round(float(part.rstrip("KM")) * units.get(part[-1:], 1), 3) for part in parts]
        if all(number.is_integer() for number in numbers):
            return [int(number) for number in numbers]
    except ValueError:
        pass
    raise InvalidInput(name, "numbers such as 8, 500K,1M or 1..1024", text)


def _count(tokens: int) -> str:
    for unit, size in (("M", 1e6), ("K", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.4g}{unit}"
    return str(tokens)


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    if seconds >= 600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _draw(found: list[Estimate], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    curves = dict.fromkeys((each.tokens, each.asked) for each in found)
    for color, (tokens, asked) in enumerate(curves):
        points = [each for each in found if (each.tokens, each.asked) == (tokens, asked)]
        gpus, seconds = [each.gpus for each in points], [each.seconds for each in points]
        axes.plot(
            gpus, seconds, color=f"C{color}", label=f"{_count(tokens)} tokens{'' if asked == 'auto' else f', {asked}'}"
        )
        for fits, face in ((True, f"C{color}"), (False, "white")):
            kept = [each for each in points if each.fits == fits]
            place = [each.gpus for each in kept], [each.seconds for each in kept]
            axes.plot(*place, "o", color=f"C{color}", markerfacecolor=face, linestyle="none")
    axes.set(yscale="log", xlabel="GPUs", ylabel="seconds a step", title=drawable(title))
    axes.set_xscale("log", base=2)
    axes.legend(title="filled: fits in memory")
    axes.grid(alpha=0.3)
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
