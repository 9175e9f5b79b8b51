"""The targets of the CPU kernels, and whether they are met: `python -m benchmarks.targets`.

A target speaks of several cases; the worst of them decides.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich import box
from rich.console import Console
from rich.table import Table

from longattn.bench import AttentionCase, Case, Contender, Report, Result, make_cases
from longattn.cli.bench import run_with_progress, size

_BASELINE = "plain"  # the contenders that only read or copy


class Figure(NamedTuple):
    """What was measured of a case: the value to judge, what ours did, and what it is compared with."""

    value: float
    case: Case
    ours: str
    against: str


Measure = Callable[[Report, Case], Figure | None]


@dataclass(frozen=True)
class Target:
    """A figure to reach in all of some cases.

    Args:
        conditions: on the attributes of the cases; a tuple lists what is allowed.
        measure: the figure of one case; None if it was not measured.
        rivals: who has to run for that beside ours: those whose names start so.
        at_most: whether the goal is an upper limit.
        memory: whether memory has to be measured.
    """

    name: str
    goal: float
    conditions: dict[str, Any]
    measure: Measure
    rivals: str | None = None
    at_most: bool = False
    memory: bool = False

    def concerns(self, case: Case) -> bool:
        return all(
            getattr(case, name, None) in (wanted if isinstance(wanted, tuple) else (wanted,))
            for name, wanted in self.conditions.items()
        )

    def needs(self, case: Case, contender: Contender) -> bool:
        if not self.concerns(case):
            return False
        return contender.role == "ours" or (self.rivals is not None and contender.name.startswith(self.rivals))

    def worst(self, report: Report) -> Figure | None:
        """The figure that decides; None if nothing was measured."""
        figures = (self.measure(report, case) for case in report.cases if self.concerns(case))
        choose = max if self.at_most else min
        return choose(filter(None, figures), key=lambda figure: figure.value, default=None)

    def met(self, value: float) -> bool:
        return value <= self.goal if self.at_most else value >= self.goal


def over(rivals: str) -> Measure:
    """How many times as fast as the best of the peers whose names start so."""

    def measure(report: Report, case: Case) -> Figure | None:
        ours, best = _ours(report, case), report.best_peer(case, rivals)
        if ours is None or best is None:
            return None
        return Figure(ours.speedup(best), case, _rate(ours), f"{best.contender}: {_rate(best)}")

    return measure


def share_of_read(report: Report, case: Case) -> Figure | None:
    """Of the speed of a plain read."""
    ours, baselines = _ours(report, case), report.ran(case, "baseline")
    if ours is None or not baselines:
        return None
    return Figure(ours.speedup(baselines[0]), case, _rate(ours), f"{baselines[0].contender}: {_rate(baselines[0])}")


def share_of_peak(name: str) -> Measure:
    """Of the measured peak of that name."""

    def measure(report: Report, case: Case) -> Figure | None:
        ours, peak = _ours(report, case), report.machine.peaks.get(name)
        if ours is None or peak is None:
            return None
        return Figure(ours.rate / peak, case, _rate(ours), f"{name}: {peak / 1e9:.0f} GFLOP/s")

    return measure


def memory(report: Report, case: Case) -> Figure | None:
    """MB beyond inputs and outputs."""
    ours = _ours(report, case)
    if ours is None or ours.memory is None:
        return None
    return Figure(ours.memory / 1e6, case, size(ours.memory), "")


def pair_time(report: Report, case: Case) -> Figure | None:
    """The time of a visible pair, by that of the shortest length of the same curve."""
    shortest = min((other for other in report.cases if other.curve == case.curve), key=lambda other: other.length)
    long, short = _ours(report, case), _ours(report, shortest)
    if long is None or short is None or shortest.length == case.length:
        return None
    times = _nanoseconds(long), _nanoseconds(short)
    return Figure(times[0] / times[1], case, f"{times[0]:.3g} ns", f"N {shortest.length}: {times[1]:.3g} ns")


def _nanoseconds(result: Result) -> float:
    """Of a visible pair."""
    assert isinstance(result.case, AttentionCase)
    return result.median / result.case.pairs * 1e9


def _rate(result: Result) -> str:
    unit = "GFLOP/s" if result.case.bound == "arithmetic" else "GB/s"
    return f"{result.rate / 1e9:.3g} {unit}"


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
            yield Target(title, goal, {**conditions, "backward": backward}, over(peer), rivals=peer)


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
    Target("decode, share of a plain read", 0.8, _DECODE, share_of_read, rivals=_BASELINE),
    *speed("apply_rope, N 32768", forward=2.0, both=2.0, peer="eager", **_ROPE),
    *speed("apply_rope, N 32768", forward=1.1, peer="torch.compile", **_ROPE),
    Target(
        "float32 causal forward, D 128, share of the FMA peak",
        0.78,
        {**_CAUSAL, "dtype": "float32", "head_dim": 128, "backward": False},
        share_of_peak("float32"),
    ),
    Target(
        "bfloat16 causal forward, D 128, share of the VDPBF16PS peak",
        0.65,
        {**_CAUSAL, "dtype": "bfloat16", "head_dim": 128, "backward": False},
        share_of_peak("VDPBF16PS"),
    ),
    Target("window 4096, N 131072, time of a pair by that at N 8192", 1.15, _LONG, pair_time, at_most=True),
    Target("window 4096, N 131072, MB beyond inputs and outputs", 64.0, _LONG, memory, at_most=True, memory=True),
)


_HEADINGS = ("target", "goal", "measured", "verdict", "ours", "against", "decided by")
_RIGHT = ("goal", "measured")
_WIDTH = 200  # of the table in a file


def concerned(cases: Iterable[Case], targets: Sequence[Target] = TARGETS) -> list[Case]:
    """The cases that some of the targets speak of, and the shortest of the long curves, to compare with."""
    cases = list(cases)
    spoken_of = [case for case in cases if any(target.concerns(case) for target in targets)]
    compared = {case.curve for case in spoken_of if case.length == _LONG["length"]}
    shortest = {case.curve: case for case in reversed(cases) if case.curve in compared}
    return [case for case in cases if case in spoken_of or case == shortest.get(case.curve)]


def run(targets: Sequence[Target], threads: int, rounds: int) -> Report:
    """Run what the targets need, and nothing else."""

    def takes_part(case: Case, contender: Contender) -> bool:
        return contender.role == "ours" or any(target.needs(case, contender) for target in targets)

    return run_with_progress(
        concerned(make_cases(), targets),
        rounds=rounds,
        threads=threads,
        takes_part=takes_part,
        memory=lambda case: any(target.memory and target.concerns(case) for target in targets),
    )


def judged(reports: Sequence[Report], targets: Sequence[Target]) -> Iterator[tuple[str, ...]]:
    """A row of each target; the last report that has a figure for it counts."""
    for target in targets:
        goal = f"{'<= ' if target.at_most else ''}{target.goal:g}"
        found = next(filter(None, map(target.worst, reversed(reports))), None)
        if found is None:
            yield target.name, goal, "-", "not measured", "", "", ""
            continue
        verdict = "met" if target.met(found.value) else "missed"
        case = f"{found.case.curve} N {found.case.length}"
        yield target.name, goal, f"{found.value:.3g}", verdict, found.ours, found.against, case


def show(reports: Sequence[Report], targets: Sequence[Target], console: Console) -> None:
    """Print the machine, and each target with what was measured."""
    for report in reports:
        for line in report.machine.lines():
            console.print(line)
        if report.machine.warning:
            console.print(report.machine.warning, style="yellow")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right" if heading in _RIGHT else "left")
    colours = {"met": "green", "missed": "red", "not measured": "dim"}
    for name, goal, value, verdict, *rest in judged(reports, targets):
        table.add_row(name, goal, value, f"[{colours[verdict]}]{verdict}[/]", *rest)
    console.print(table)


def markdown(reports: Sequence[Report], targets: Sequence[Target]) -> Iterator[str]:
    """The lines of the same for docs/performance.md."""
    for report in reports:
        yield from (f"- {line}" for line in report.machine.lines())
    yield ""
    rules = ("---:" if heading in _RIGHT else "---" for heading in _HEADINGS)
    for row in (_HEADINGS, rules, *judged(reports, targets)):
        yield f"| {' | '.join(row)} |"


@click.command()
@click.argument("reports", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--only", multiple=True, help="Targets whose names hold this; repeatable.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=50, show_default=True, help="Rounds; slow cases get fewer, 5."
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("bench-results/targets.json"),
    show_default=True,
    help="Where the report of a run is kept.",
)
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table in Markdown.")
def main(
    reports: tuple[Path, ...], only: tuple[str, ...], threads: int, repeats: int, out: Path, as_markdown: bool
) -> None:
    """Show which targets are met: in a run of their cases, or in REPORTS, which this or `longattn bench` wrote."""
    targets = [t for t in TARGETS if not only or any(word.lower() in t.name.lower() for word in only)]
    if not targets:
        raise click.BadParameter(f"no target is named so; there are: {'; '.join(t.name for t in TARGETS)}")
    measured = [Report.read(path) for path in reports] or [run(targets, threads, repeats)]
    if not reports:
        verdicts = [dict(zip(_HEADINGS, row, strict=True)) for row in judged(measured, targets)]
        out.parent.mkdir(parents=True, exist_ok=True)
        values = {**measured[0].to_dict(), "targets": verdicts}
        out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if as_markdown:
        click.echo("\n".join(markdown(measured, targets)))
    else:
        show(measured, targets, Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH))


if __name__ == "__main__":
    main()
