"""What `longattn eval` writes for readers: a page of tables, and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longattn.cli.output import drawable, plain
from longattn.evaluation import RULER_TASKS, Results, summary
from longattn.files import replaced

__all__ = ["draw", "markdown", "percent", "table", "tokens_name"]

_ROWS = 16  # of the table of losses by position


def markdown(results: Results) -> str:
    """All tables."""
    settings, found = results.settings, summary(results)
    methods = ", ".join(_name(method) for method in settings["methods"]) or "none"
    machine = settings["machine"]
    lines = [
        f"# {plain(settings['model'])}",
        "",
        f"Trained length {settings['trained']:,} tokens; methods beside the model's own: {methods}; "
        f"{settings['dtype']}; {machine['threads']} threads, {machine['device']}, torch {machine['torch']}, "
        f"longattn {machine['longattn']}.",
    ]
    plan = settings["plan"]
    losses = _losses(found, plan)
    if losses:
        about = "Nats per token of the tokens at these positions, each text read once from the start"
        if "short_windows" in found:
            stride = tokens_name(plan["stride"])
            about += f", or in windows of {tokens_name(plan['context'])}, each {stride} tokens further than the last"
        lines += _section("Loss by position", f"{about}.")
        lines += _loss_table(losses, plan["bucket"])
    if "perplexity" in found:
        count, stride = plan["windows"], plan["stride"]
        about = f"Of the same {count * stride:,} tokens, {stride} at a time, at the end of windows of each length."
        lines += _section("Perplexity by length", about)
        body = [
            (tokens_name(row["length"]), f"{row['perplexity']:.3f}", f"{row['loss']:.4f}")
            for row in found["perplexity"]
        ]
        lines += table(("length", "perplexity", "nats per token"), body)
    if "passkey" in found:
        lines += _section("Passkey", "Answers that hold the number, by length and by where in the text it stands.")
        lines += _passkey(found["passkey"])
    ruler = [task for task in RULER_TASKS if task in found]
    if ruler:
        lines += _section("RULER", "The share of the wanted words and numbers that answers hold.")
        lengths = sorted({row["length"] for task in ruler for row in found[task]})
        scores = {(task, row["length"]): row["recall"] for task in ruler for row in found[task]}
        shares = [(tokens_name(length), *(percent(scores.get((task, length))) for task in ruler)) for length in lengths]
        lines += table(("length", *ruler), shares)
    if "speed" in found:
        lines += _section("Time and memory", "Memory is what reading adds to the weights, at its highest.")
        lines += table(("length", "seconds to read", "tokens/s", "new tokens/s", "peak MB"), map(_cost, found["speed"]))
    return "\n".join(lines) + "\n"


def _section(title: str, about: str) -> list[str]:
    return ["", f"## {title}", "", about, ""]


def _cost(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        tokens_name(row["length"]),
        f"{row['seconds']:.2f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['new_tokens_per_second']:,.1f}",
        "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}",
    )


def draw(results: Results, folder: Path) -> list[Path]:
    """Write the pictures of what was measured; their places."""
    found, drawn = summary(results), []
    for measured, name, painter in (
        (_losses(found, results.settings["plan"]), "loss_by_position.png", _draw_losses),
        (found.get("passkey"), "passkey.png", _draw_passkey),
        (found.get("speed"), "cost.png", _draw_cost),
    ):
        if measured:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure

            figure = Figure(figsize=(8, 5), layout="constrained")
            FigureCanvasAgg(figure)
            painter(figure, measured, results.settings)
            with replaced(folder / name) as temporary:
                figure.savefig(temporary, format="png", dpi=120)
            drawn.append(folder / name)
    return drawn


def _losses(found: Mapping[str, Any], plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The curves of losses by position, each with what it is of."""
    rows = [{**row, "of": f"{tokens_name(row['length'])} tokens"} for row in found.get("loss", ())]
    rows += [{**row, "of": f"in windows of {tokens_name(plan['context'])}"} for row in found.get("short_windows", ())]
    return rows


def _loss_table(rows: list[dict[str, Any]], bucket: int) -> list[str]:
    longest = max(row["length"] for row in rows)
    width = bucket * max(1, math.ceil(longest / bucket / _ROWS))
    body = []
    for start in range(0, longest, width):
        cells = []
        for row in rows:
            part = row["losses"][start // bucket : (start + width) // bucket]
            sizes = [min(bucket, row["length"] - start - at * bucket) for at in range(len(part))]
            weighed = sum(loss * size for loss, size in zip(part, sizes, strict=True))
            cells.append(f"{weighed / sum(sizes):.3f}" if part else "")
        body.append((f"{start:,}-{min(start + width, longest) - 1:,}", *cells))
    return table(("position", *(row["of"] for row in rows)), body)


def _passkey(rows: list[dict[str, Any]]) -> list[str]:
    depths = sorted({row["depth"] for row in rows})
    by_place = {(row["length"], row["depth"]): row["recall"] for row in rows}
    body = []
    for length in sorted({row["length"] for row in rows}):
        scores = [by_place[length, depth] for depth in depths]
        body.append((tokens_name(length), *map(percent, scores), percent(sum(scores) / len(scores))))
    return table(("length", *(f"depth {depth:.0%}" for depth in depths), "mean"), body)


def _draw_losses(figure: Any, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    axes, bucket = figure.subplots(), settings["plan"]["bucket"]
    for row in rows:
        places = [(at + 0.5) * bucket for at in range(len(row["losses"]))]
        axes.plot(places, row["losses"], label=row["of"])
    axes.axvline(settings["trained"], color="gray", linestyle=":", label="trained length")
    axes.set(xlabel="position in the text, tokens", ylabel="loss, nats per token", title=_title(settings))
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_passkey(figure: Any, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    depths, lengths = sorted({row["depth"] for row in rows}), sorted({row["length"] for row in rows})
    by_place = {(row["length"], row["depth"]): row["recall"] for row in rows}
    axes = figure.subplots()
    scores = [[by_place[length, depth] for length in lengths] for depth in depths]
    picture = axes.imshow(scores, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [tokens_name(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="length, tokens", ylabel="depth of the passkey", title=_title(settings))
    for y, line in enumerate(scores):
        for x, score in enumerate(line):
            axes.text(x, y, f"{score:.0%}", ha="center", va="center")
    figure.colorbar(picture, label="answers that hold it")


def _draw_cost(figure: Any, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    time, memory = figure.subplots(1, 2)
    lengths = [row["length"] for row in rows]
    time.plot(lengths, [row["seconds"] for row in rows], "o-")
    memory.plot(lengths, [(row["peak_bytes"] or math.nan) / 1e9 for row in rows], "o-")
    time.set(xlabel="length, tokens", ylabel="seconds to read")
    memory.set(xlabel="length, tokens", ylabel="peak memory beside the weights, GB")
    for axes in (time, memory):
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.suptitle(_title(settings))


def _title(settings: dict[str, Any]) -> str:
    methods = ", ".join(_name(method) for method in settings["methods"])
    return drawable(Path(settings["model"]).name + (f", {methods}" if methods else ""))


def _name(method: dict[str, Any]) -> str:
    numbers = [value for value in method.values() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    values = [f"{value:g}" for value in numbers]
    return method["type"] + (f" ({', '.join(values)})" if values else "")


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(line) + " |" for line in lines]


def tokens_name(count: int) -> str:
    """8k of 8192, 100 of 100."""
    return f"{count // 1024}k" if count % 1024 == 0 and count >= 1024 else f"{count:,}"


def percent(score: float | None) -> str:
    """50% of 0.5, nothing of None."""
    return "" if score is None else f"{score:.0%}"
