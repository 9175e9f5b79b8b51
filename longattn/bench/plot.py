"""Pictures of a report: time and memory against length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from longattn.bench.cases import Case
from longattn.bench.report import Report, Result
from longattn.files import replaced

_COLUMNS = 4
_LEAST_MEMORY = 1e5  # bytes: what is less is drawn here, as a logarithmic axis has no zero


def plot(report: Report, directory: Path) -> list[Path]:
    """One PNG per set, log-log: for each curve, time above and memory below, one line per contender.

    Curves of one length are left out where the set has longer ones.

    Returns:
        The files written.
    """
    return [_plot_set(report, name, cases, directory / f"{name}.png") for name, cases in report.by_set()]


def _plot_set(report: Report, name: str, cases: list[Case], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    curves: dict[str, list[Case]] = {}
    for case in cases:
        curves.setdefault(case.curve, []).append(case)
    longest = max(map(len, curves.values()))
    curves = {curve: points for curve, points in curves.items() if len(points) > 1 or longest == 1}

    names = list(dict.fromkeys(result.contender for case in cases for result in report.ran(case)))
    styles = {contender: _style(place) for place, contender in enumerate(names)}
    columns = min(_COLUMNS, len(curves))
    bands = -(-len(curves) // columns)
    figure = Figure(figsize=(4.2 * columns, 5.6 * bands + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 * bands, columns, squeeze=False)
    for place, (curve, points) in enumerate(curves.items()):
        band, column = divmod(place, columns)
        time, memory = axes[2 * band][column], axes[2 * band + 1][column]
        time.set_title(curve, fontsize=9)
        _draw(time, "time", "s", report, points, styles, lambda result: result.median)
        _draw(memory, "peak extra memory", "B", report, points, styles, _memory)
    for place in range(len(curves), bands * columns):
        band, column = divmod(place, columns)
        axes[2 * band][column].set_axis_off()
        axes[2 * band + 1][column].set_axis_off()
    machine = report.machine
    figure.suptitle(f"{name}: {machine.device}, threads: {machine.threads}, torch {machine.versions['torch']}")
    lines = [Line2D([], [], label=contender, **style) for contender, style in styles.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(4, len(lines)), frameon=False)
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def _draw(
    axis: Any,
    label: str,
    unit: str,
    report: Report,
    points: list[Case],
    styles: dict[str, dict[str, Any]],
    value: Callable[[Result], float | None],
) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator

    for contender, style in styles.items():
        found = [
            (result.case.length, value(result))
            for case in points
            for result in report.ran(case)
            if result.contender == contender
        ]
        known = [(n, y) for n, y in found if y is not None]
        if known:
            axis.plot(*zip(*known, strict=True), **style)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.yaxis.set_major_formatter(EngFormatter(unit))
    axis.set_xticks([case.length for case in points], [_short(case.length) for case in points])
    axis.minorticks_off()
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)


def _memory(result: Result) -> float | None:
    return None if result.memory is None else max(result.memory, _LEAST_MEMORY)


def _style(place: int) -> dict[str, Any]:
    """Ours comes first, and is drawn heavier."""
    return {"color": f"C{place}", "marker": "o", "markersize": 4, "linewidth": 2.4 if place == 0 else 1.2}


def _short(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)
