"""What the demo shows: tables, and the plot of loss by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from longattn.evaluation import Cost, LossByPosition
from longattn.files import replaced
from longattn.training import TrainingResult

_LOST_WITHOUT, _LOST_TUNED = 0.3, 0.05  # nats per byte at the far end: what a demo shows when it has trained enough
_POINTS_PER_CONTEXT = 4  # of the plot, within the trained length


@dataclass(frozen=True)
class Reading:
    """The held-out texts as one model read them; `style` is the plot's, in matplotlib's notation."""

    name: str
    style: str
    loss: LossByPosition

    def to_dict(self, width: int) -> dict[str, Any]:
        """The mean losses, `width` positions at a time."""
        return {"name": self.name, "buckets": [asdict(bucket) for bucket in self.loss.buckets(width)]}


@dataclass(frozen=True)
class AttentionRow:
    """One way to compute attention, and its cost or why it could not run."""

    mask: str
    name: str
    cost: Cost | None
    failure: str | None = None


def print_training(console: Console, result: TrainingResult) -> None:
    """What a training did, in one line."""
    last, rate = result.losses[-50:], result.tokens / result.seconds
    console.print(
        f"{result.step} steps, {result.tokens:,} bytes in {result.seconds:.0f} s ({rate:,.0f} a second); "
        f"loss of the last {len(last)} steps {sum(last) / len(last):.3f}"
    )


def print_readings(console: Console, readings: Sequence[Reading], context: int) -> None:
    """Mean loss by position, a column for each reading."""
    windows, length = readings[0].loss.losses.shape
    table = Table("bytes", *(Column(reading.name, justify="right") for reading in readings))
    for row in zip(*(reading.loss.buckets(context) for reading in readings), strict=True):
        table.add_row(f"{row[0].start}-{row[0].stop - 1}", *(f"{bucket.loss:.3f}" for bucket in row))
    console.print(f"\nLoss by position in {windows} held-out texts of {length} bytes, nats per byte")
    console.print(table)


def print_far_end(console: Console, readings: Sequence[Reading], context: int) -> None:
    """The last quarter of each reading, against the loss at the trained length and against the first reading."""
    length = readings[0].loss.losses.shape[1]
    far = length - length // 4
    at_trained_length = readings[0].loss.bucket(context // 2, context).loss
    same_bytes = readings[0].loss.bucket(far, length).loss
    against = (f"bytes {context // 2}-{context - 1}: {at_trained_length:.3f}", readings[0].name)
    table = Table(f"bytes {far}-{length - 1}", *(Column(name, justify="right") for name in ("loss", *against)))
    for reading in readings:
        loss = reading.loss.bucket(far, length).loss
        table.add_row(reading.name, f"{loss:.3f}", f"{loss - at_trained_length:+.3f}", f"{loss - same_bytes:+.3f}")
    console.print("\nThe far end, against the loss at the trained length, and against the same bytes read in pieces")
    console.print(table)


def shortfall(readings: Sequence[Reading], context: int, steps: Sequence[int]) -> str | None:
    """Return why the far end does not show what extension gains, or None if it does.

    Args:
        readings: in the demo's order: in pieces, without extension, YaRN, YaRN after its fine-tuning.
        context: the trained length.
        steps: of training and of fine-tuning.
    """
    length = readings[0].loss.losses.shape[1]
    in_pieces, without, _, tuned = (reading.loss.bucket(length - length // 4, length).loss for reading in readings[:4])
    wrong = []
    if not without - in_pieces >= _LOST_WITHOUT:
        wrong.append(f"the model without extension loses {without - in_pieces:.3f}, not {_LOST_WITHOUT} or more")
    if not tuned - in_pieces <= _LOST_TUNED:
        wrong.append(f"the fine-tuned one loses {tuned - in_pieces:.3f}, not {_LOST_TUNED} or less")
    if not wrong:
        return None
    return (
        f"Too few steps ({steps[0]:,} of training, {steps[1]:,} of fine-tuning) to show what extension gains: at the "
        f"far end, {' and '.join(wrong)} (nats per byte, against {context} bytes at a time). A faster or less busy "
        "machine takes more steps in the same time."
    )


def print_attention(console: Console, rows: Sequence[AttentionRow], length: int) -> None:
    """Time and peak memory of each way to compute attention."""
    table = Table("mask", "computed by", Column("seconds", justify="right"), Column("peak MB", justify="right"))
    for row in rows:
        if row.cost is None:
            table.add_row(row.mask, row.name, row.failure, "-")
        else:
            table.add_row(row.mask, row.name, f"{row.cost.seconds:.3f}", f"{row.cost.peak_bytes / 1e6:,.1f}")
    sources = sorted({row.cost.peak_source for row in rows if row.cost is not None})
    console.print(f"\nOne attention call over {length} tokens: forward, 1 head of 64, float32, in a process of its own")
    console.print(table)
    console.print(f"peak: how far resident memory rose over what the process held before ({', '.join(sources)})")


def plot_readings(readings: Sequence[Reading], context: int, path: Path) -> None:
    """Loss by position as a PNG."""
    from matplotlib.figure import Figure

    width = max(1, context // _POINTS_PER_CONTEXT)
    length = readings[0].loss.losses.shape[1]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for reading in readings:
        buckets = reading.loss.buckets(width)
        middles = [(bucket.start + bucket.stop) / 2 for bucket in buckets]
        axes.plot(middles, [bucket.loss for bucket in buckets], reading.style, label=reading.name)
    axes.axvline(context, color="0.4", linestyle="--", linewidth=1)
    axes.annotate(
        f"trained length {context}",
        (context, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -4),
        textcoords="offset points",
        va="top",
        color="0.4",
    )
    axes.set(
        title="Reading past the trained length: Python source, byte level",
        xlabel="position in the text (bytes)",
        ylabel="loss (nats per byte)",
        xlim=(0, length),
    )
    axes.set_xticks(range(0, length + 1, context))
    axes.grid(alpha=0.3)
    axes.legend()
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
