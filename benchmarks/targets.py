"""The targets of the CPU kernels, and whether they are met: `python -m benchmarks.targets`.

Ratios are of medians, the peer's time by ours, so that higher is better. A target speaks of several cases; the worst of
them decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from longattn.bench import AttentionCase, Case, Report, Result, make_cases
from longattn.cli.bench import run_with_progress

Measure = Callable[[Report, Case], float | None]


@dataclass(frozen=True)
class Target:
    """A figure to reach in all of some cases.

    Args:
        conditions: on the attributes of the cases; a tuple lists what is allowed.
        measure: the figure of one case; None if it was not measured.
        at_most: whether the goal is an upper limit.
    """

    name: str
    goal: float
    conditions: dict[str, Any]
    measure: Measure
    at_most: bool = False

    def concerns(self, case: Case) -> bool:
        return all(
            getattr(case, name, None) in (wanted if isinstance(wanted, tuple) else (wanted,))
            for name, wanted in self.conditions.items()
        )

    def worst(self, report: Report) -> tuple[float, Case] | None:
        """The figure that decides, and its case; None if nothing was measured."""
        figures = [(self.measure(report, case), case) for case in report.cases if self.concerns(case)]
        known = [(figure, case) for figure, case in figures if figure is not None]
        choose = max if self.at_most else min
        return choose(known, key=lambda pair: pair[0], default=None)

    def met(self, figure: float) -> bool:
        return figure <= self.goal if self.at_most else figure >= self.goal


def over(peer: str) -> Measure:
    """How many times as fast as the best of the peers whose names start so."""

    def measure(report: Report, case: Case) -> float | None:
        times = [x.median for x in report.ran(case, "peer") if x.agrees and x.contender.startswith(peer)]
        ours = _ours(report, case)
        return min(times) / ours.median if ours and times else None

    return measure


def share(report: Report, case: Case) -> float | None:
    """Of the measured peak, or of a plain read's speed."""
    ours = _ours(report, case)
    return None if ours is None else report.share(ours)


def memory(report: Report, case: Case) -> float | None:
    """MB beyond inputs and outputs."""
    ours = _ours(report, case)
    return None if ours is None or ours.memory is None else ours.memory / 1e6


def pair_time(report: Report, case: Case) -> float | None:
    """The time of a visible pair, by that of the shortest length of the same curve."""
    shortest = min((other for other in report.cases if other.curve == case.curve), key=lambda other: other.length)
    long, short = _ours(report, case), _ours(report, shortest)
    if long is None or short is None or shortest.length == case.length:
        return None
    return (long.median / _pairs(case)) / (short.median / _pairs(shortest))


def _pairs(case: Case) -> int:
    assert isinstance(case, AttentionCase)
    return case.pairs


def _ours(report: Report, case: Case) -> Result | None:
    return next(iter(report.ran(case, "ours")), None)


def speed(
    name: str, *, forward: float | None = None, both: float | None = None, peer: str = "", **conditions: Any
) -> Iterator[Target]:
    """Ratios to the best peer, or to the best of those whose names start with `peer`."""
    for backward, goal in ((False, forward), (True, both)):
        if goal is not None:
            direction = "forward+backward" if backward else "forward"
            title = f"{name}, {direction}, over {peer or 'the best peer'}"
            yield Target(title, goal, {**conditions, "backward": backward}, over(peer))


_DENSE: dict[str, Any] = {"set": "dense", "batch": 1}
_CAUSAL: dict[str, Any] = {**_DENSE, "causal": True, "length": (2048, 4096, 8192)}
_FULL: dict[str, Any] = {**_DENSE, "causal": False}
_SHORT: dict[str, Any] = {"set": "dense", "batch": 8}
_WINDOW: dict[str, Any] = {"set": "window", "window": 1024, "length": 8192}
_LONG: dict[str, Any] = {"set": "window", "window": 4096, "length": 131072}
_DECODE: dict[str, Any] = {"set": "decode", "length": 32768}
_ROPE: dict[str, Any] = {"set": "rope", "length": 32768}

TARGETS = (
    *speed("float32 causal, N 2048-8192, D 64", forward=1.2, both=1.2, **_CAUSAL, dtype="float32", head_dim=64),
    *speed("float32 causal, N 2048-8192, D 128", forward=1.12, both=1.15, **_CAUSAL, dtype="float32", head_dim=128),
    *speed("float32 full, D 64 and 128", forward=1.03, both=1.05, **_FULL, dtype="float32"),
    *speed("bfloat16 causal, D 64 and 128", forward=1.9, both=1.6, **_CAUSAL, dtype="bfloat16"),
    *speed("bfloat16 full, D 64 and 128", forward=1.5, both=1.4, **_FULL, dtype="bfloat16"),
    *speed("float32 window 1024, N 8192, H 8/2", forward=1.7, peer="FlexAttention", **_WINDOW, dtype="float32"),
    *speed("bfloat16 window 1024, N 8192, H 8/2", forward=4.0, peer="FlexAttention", **_WINDOW, dtype="bfloat16"),
    *speed("float32 window 1024, N 8192, H 8/2", both=8.0, peer="SDPA", **_WINDOW, dtype="float32"),
    *speed("bfloat16 window 1024, N 8192, H 8/2", both=10.0, peer="SDPA", **_WINDOW, dtype="bfloat16"),
    *speed("float32 B 8, H 12, N 512, D 64 causal", forward=1.6, both=1.4, **_SHORT, dtype="float32"),
    *speed("bfloat16 B 8, H 12, N 512, D 64 causal", forward=2.5, both=1.8, **_SHORT, dtype="bfloat16"),
    *speed("decode, Nk 32768, H 32/8, D 128", forward=1.3, **_DECODE),
    Target("decode, share of a plain read", 0.8, _DECODE, share),
    *speed("apply_rope, N 32768", forward=2.0, both=2.0, peer="eager", **_ROPE),
    *speed("apply_rope, N 32768", forward=1.1, peer="torch.compile", **_ROPE),
    Target(
        "float32 causal forward, D 128, share of the peak",
        0.78,
        {**_CAUSAL, "dtype": "float32", "head_dim": 128, "backward": False},
        share,
    ),
    Target(
        "bfloat16 causal forward, D 128, share of the peak",
        0.65,
        {**_CAUSAL, "dtype": "bfloat16", "head_dim": 128, "backward": False},
        share,
    ),
    Target("window 4096, N 131072: time of a pair by that at N 8192", 1.15, _LONG, pair_time, at_most=True),
    Target("window 4096, N 131072: extra MB", 64.0, _LONG, memory, at_most=True),
)


def concerned(cases: Iterable[Case]) -> list[Case]:
    """The cases that some target speaks of, and the shorter ones of the long curves, which they are compared with."""
    cases = list(cases)
    spoken_of = [case for case in cases if any(target.concerns(case) for target in TARGETS)]
    compared = {case.curve for case in spoken_of if case.length == _LONG["length"]}
    return [case for case in cases if case in spoken_of or case.curve in compared]


def show(report: Report, console: Console) -> None:
    """Print each target with what was measured."""
    for line in report.machine.lines():
        console.print(line)
    if report.machine.warning:
        console.print(report.machine.warning, style="yellow")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("target")
    for heading in ("goal", "measured"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("decided by", style="dim")
    for target in TARGETS:
        goal = f"{'<= ' if target.at_most else ''}{target.goal:g}"
        found = target.worst(report)
        if found is None:
            table.add_row(target.name, goal, "-", "not measured", "", style="dim")
            continue
        figure, case = found
        verdict = "[green]met[/]" if target.met(figure) else "[red]missed[/]"
        table.add_row(target.name, goal, f"{figure:.3g}", verdict, f"{case.curve} N {case.length}")
    console.print(table)


@click.command()
@click.argument("report", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=10, show_default=True, help="Rounds; slow cases get fewer, 3."
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="A file to keep the report in.")
def main(report: Path | None, threads: int, repeats: int, out: Path | None) -> None:
    """Show which targets are met, in a run of their cases, or in REPORT, a bench.json that `longattn bench` wrote."""
    if report is not None:
        measured = Report.read(report)
    else:
        measured = run_with_progress(
            concerned(make_cases()), rounds=repeats, threads=threads, compiled=True, memory=True
        )
        if out is not None:
            measured.write(out)
    show(measured, Console(highlight=False))


if __name__ == "__main__":
    main()
