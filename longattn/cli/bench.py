"""`longattn bench`: speed and memory against every attention that is installed."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from longattn.bench import DTYPES, SETS, Case, Report, Result, make_cases, plot, run
from longattn.cli.output import echo, make_console
from longattn.cli.writing import writes_folder

__all__ = ["bench", "duration", "run_with_progress", "show", "size"]

_STYLES = {"ours": "bold green", "peer": "", "baseline": "dim"}


@click.command()
@click.option(
    "--set", "sets", type=click.Choice(SETS), multiple=True, help="What to measure; repeatable. All by default."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="By default a GPU if torch sees one.")
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(DTYPES),
    multiple=True,
    help="Repeatable; by default float32 and bfloat16 on a CPU, bfloat16 on a GPU.",
)
@click.option("--quick", is_flag=True, help="Tiny sizes and nothing compiled: that it runs, not how fast.")
@click.option("--threads", type=click.IntRange(min=1), help="Of the CPU, for everyone; torch's number by default.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=50, show_default=True, help="Rounds; slow cases get fewer, 5."
)
@click.option("--memory/--no-memory", default=True, show_default=True, help="Measure peak memory, too.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("bench-results"),
    show_default=True,
    help="Folder for bench.json and a plot per set.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of tables.")
def bench(
    sets: tuple[str, ...],
    device: str | None,
    dtypes: tuple[str, ...],
    quick: bool,
    threads: int | None,
    repeats: int,
    memory: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Measure speed and memory against every attention that is installed.

    All run in one process, in turn, on the same tensors. Times and ratios are medians over the rounds; a ratio above 1
    means quicker than the best peer. Peak memory is what one call needs beyond its inputs and outputs.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("torch sees no GPU", param_hint="--device")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cases = make_cases(sets or SETS, dtypes, device, quick)
    with writes_folder(out):
        report = run_with_progress(
            cases,
            rounds=repeats,
            threads=threads,
            takes_part=lambda case, contender: not (quick and contender.compiled),
            memory=lambda case: memory,
        )
        report.write(out / "bench.json")
        written = [out / "bench.json"]
        if importlib.util.find_spec("matplotlib") is not None:
            written += plot(report, out)
    if as_json:
        echo(json.dumps(report.to_dict(), indent=1))
        return
    console = make_console()
    show(report, console)
    console.print(f"written: {', '.join(map(str, written))}")
    if len(written) == 1:
        console.print("no plots: matplotlib is not installed (pip install longattn[plot])")


def run_with_progress(cases: list[Case], **options: Any) -> Report:
    """`longattn.bench.run` under a progress bar on the error stream."""
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=make_console(error=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases))

        def watch(done: int, what: str) -> None:
            progress.update(task, completed=done, description=what)

        return run(cases, watch=watch, **options)


def show(report: Report, console: Console) -> None:
    """Print the machine, a table per curve, and who was left out of what."""
    for line in report.machine.lines():
        console.print(line)
    if report.machine.warning:
        console.print(report.machine.warning, style="yellow")
    console.print(
        "limit: this machine's measured peak; where bandwidth is the bound, a plain read or copy of the same bytes.\n"
        "ratio: the best peer's time by this one's, the median over the rounds.\n"
        "memory: the peak of one call beyond its inputs and outputs."
    )
    for name, cases in report.by_set():
        console.print()
        console.rule(name)
        for curve, points in groupby(cases, key=lambda case: case.curve):
            console.print(_table(report, curve, list(points)))
        for (contender, reason), count in _refusals(report, cases).items():
            console.print(f"{contender}: left out of {count} of {len(cases)} cases: {reason}", style="dim")


def _table(report: Report, curve: str, cases: list[Case]) -> Table:
    table = Table(
        title=curve,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("N", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    rate = "GFLOP/s" if cases[0].bound == "arithmetic" else "GB/s"
    for heading in ("time", rate, "of limit", "ratio", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for case in cases:
        for place, result in enumerate(report.ran(case)):
            table.add_row(
                str(case.length) if place == 0 else "",
                result.contender,
                duration(result.median),
                f"{result.rate / 1e9:.1f}",
                _percent(report.share(result)),
                _ratio(report, result),
                "-" if result.memory is None else size(result.memory),
                style=_STYLES[result.role],
            )
        table.add_section()
    return table


def _refusals(report: Report, cases: list[Case]) -> Counter[tuple[str, str]]:
    """(contender, reason) and how many of the cases it concerns."""
    results = (result for case in cases for result in report.of(case))
    return Counter((result.contender, result.refused) for result in results if result.refused is not None)


def _ratio(report: Report, result: Result) -> str:
    if not result.agrees:
        return f"wrong by {result.difference:.0e}"
    ratio = report.ratio(result)
    return "-" if ratio is None or result.role == "baseline" else f"{ratio:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def duration(seconds: float) -> str:
    """Three digits, in a unit that suits."""
    return _scaled(seconds * 1e6, ("us", "ms", "s"))


def size(count: int) -> str:
    """Bytes with three digits, in a unit that suits."""
    return _scaled(float(count), ("B", "kB", "MB", "GB"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1e3
    return f"{value:.3g} {units[-1]}"
