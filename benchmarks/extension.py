"""What each method that extends the context does to one trained model, at lengths beyond its own, without tuning.

python -m benchmarks.extension MODEL --text king_james.txt --lengths 16k,32k --out results
python -m benchmarks.extension MODEL --tasks passkey --lengths 8k,16k,32k --out results/passkey

Each method and length is one `longattn eval`, in a process of its own: its results are kept in OUT/LENGTH/METHOD, and
what is there is not measured again. The factor is that of the length over the trained one, unless a method's name says
twice; Self-Extend's window is a quarter of the trained length, or half. README.md in OUT compares them: by position,
and below the trained length with the model as it was.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from longattn.cli.eval import token_counts
from longattn.cli.eval_report import percent, table, tokens_name
from longattn.evaluation import Results, summary

UNTOUCHED = "untouched"
METHODS: Mapping[str, Sequence[str]] = {
    UNTOUCHED: (),
    "linear": ("--method", "linear", "--factor", "{factor}"),
    "ntk": ("--method", "ntk", "--factor", "{factor}"),
    "ntk-twice": ("--method", "ntk", "--factor", "{twice}"),
    "dynamic": ("--method", "dynamic", "--factor", "{factor}"),
    "llama3": ("--method", "llama3", "--factor", "{factor}"),
    "yarn": ("--method", "yarn", "--factor", "{factor}"),
    "yarn-log-n": ("--method", "yarn", "--factor", "{factor}", "--method", "log-n"),
    "yarn-twice": ("--method", "yarn", "--factor", "{twice}"),
    "self-extend": ("--method", "self-extend", "--factor", "{factor}"),
    "self-extend-half": ("--method", "self-extend", "--factor", "{factor}", "--window", "{half}"),
    "dual-chunk": ("--method", "dual-chunk"),
    "streaming": ("--method", "streaming"),
}
_PARTS = 4  # of the length, columns of the table


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--lengths", default="16k,32k", help="Tokens.")
@click.option("--methods", default=",".join(METHODS), help="Some of these.")
@click.option("--tasks", default="loss", help="Of `longattn eval`; the untouched model is read in short windows, too.")
@click.option("--text", type=click.Path(exists=True, path_type=Path), help="For loss and perplexity.")
@click.option("--trained", default="8k", help="The model's trained length.")
@click.option("--windows", default=1, help="Of text.")
@click.option("--bucket", default=512, help="Tokens that a loss by position is the mean of.")
@click.option("--depths", default=5, help="Of the passkey.")
@click.option("--trials", default=2, help="Passkeys at each depth.")
@click.option("--dtype", default="bfloat16", help="Of weights and caches.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
def main(
    model: Path,
    lengths: str,
    methods: str,
    tasks: str,
    text: Path | None,
    trained: str,
    windows: int,
    bucket: int,
    depths: int,
    trials: int,
    dtype: str,
    out: Path,
) -> None:
    """Evaluate MODEL by every method at every length, and compare."""
    (own,) = token_counts("--trained", trained)
    unknown = set(chosen := methods.split(",")) - set(METHODS)
    if unknown:
        raise click.BadParameter(f"expected some of {', '.join(METHODS)}, got {', '.join(sorted(unknown))}")
    shared = ["--windows", windows, "--bucket", bucket, "--depths", depths, "--trials", trials, "--dtype", dtype]
    shared += ["--stride", own // 4] + (["--text", text] if text else [])
    for length in token_counts("--lengths", lengths):
        factor = max(1.0, length / own)
        for name in chosen:
            place = out / tokens_name(length) / name
            if (place / "report.md").exists():
                continue
            wanted = tasks
            if name == UNTOUCHED and "loss" in tasks.split(",") and length > own:
                wanted += ",short_windows"
            options = [word.format(factor=factor, twice=2 * factor, half=own // 2) for word in METHODS[name]]
            resume = ["--resume"] if (place / "results.json").exists() else []
            command = [
                "eval",
                model,
                "--lengths",
                length,
                "--tasks",
                wanted,
                "--out",
                place,
                *shared,
                *options,
                *resume,
            ]
            click.echo(f"{tokens_name(length)}, {name}")
            done = subprocess.run(
                [sys.executable, "-m", "longattn", *map(str, command)], capture_output=True, text=True
            )
            if done.returncode:
                raise click.ClickException(f"{name} at {length} tokens: {done.stderr.strip()[-400:]}")
            for picture in place.glob("*.png"):  # of one method; README.md has one of all
                picture.unlink()
    found: dict[int, dict[str, Results]] = {}
    for length in sorted(token_counts("--out", folder.name)[0] for folder in out.iterdir() if folder.is_dir()):
        places = {name: out / tokens_name(length) / name for name in METHODS}
        done_before = {name: place for name, place in places.items() if (place / "report.md").exists()}
        found[length] = {name: Results.load(place / "results.json") for name, place in done_before.items()}
    (out / "README.md").write_text("\n".join(_page(found, own, out)) + "\n", encoding="utf-8")


def _page(found: Mapping[int, Mapping[str, Results]], own: int, out: Path) -> list[str]:
    """Tables by length; writes the pictures that they name."""
    first = next(iter(next(iter(found.values())).values())).settings
    machine = first["machine"]
    lines = [
        f"# {Path(first['model']).name} beyond {tokens_name(own)} tokens, without tuning",
        "",
        f"{first['dtype']}; {machine['device']}, torch {machine['torch']}, longattn {machine['longattn']}. Seconds "
        "are of one reading, and say more about what else the machine did than about a method; MB are what reading "
        "adds to the weights, at its highest.",
    ]
    for length, by_method in found.items():
        curves = [_Curve.of(name, task, results) for name, results in by_method.items() for task in _LOSSES]
        measured = [curve for curve in curves if curve is not None]
        if measured:
            picture = f"loss-{tokens_name(length)}.png"
            _draw(length, own, measured, out / picture)
            lines += ["", f"## Loss by position at {tokens_name(length)}", "", *_losses(length, own, measured)]
            lines += ["", f"![loss by position]({picture})"]
        passkeys = {name: summary(results).get("passkey") for name, results in by_method.items()}
        if any(passkeys.values()):
            lines += ["", f"## Passkey at {tokens_name(length)}", "", *_passkeys(passkeys)]
    return lines


_LOSSES = {"loss": "{name}", "short_windows": "{name}, in windows of {context}"}


@dataclass(frozen=True)
class _Curve:
    """Losses by position, what they are of, and what a reading took."""

    name: str
    losses: Sequence[float]
    bucket: int
    threads: int
    seconds: float
    peak_bytes: int

    @classmethod
    def of(cls, name: str, task: str, results: Results) -> _Curve | None:
        found = summary(results).get(task)
        if found is None:
            return None
        plan, costs = results.settings["plan"], [cost for _, cost in results.of(task)]
        context = tokens_name(plan["context"]) if plan["context"] else ""
        seconds = sum(cost["seconds"] for cost in costs) / len(costs)
        peak = max(cost["peak_bytes"] or 0 for cost in costs)
        title = _LOSSES[task].format(name=name, context=context)
        threads = results.settings["machine"]["threads"]
        return cls(title, found[0]["losses"], plan["bucket"], threads, seconds, peak)

    def mean(self, start: int, stop: int) -> float:
        part = self.losses[start // self.bucket : stop // self.bucket]
        return sum(part) / len(part)


def _losses(length: int, own: int, curves: Sequence[_Curve]) -> list[str]:
    parts = [(start, start + length // _PARTS) for start in range(0, length, length // _PARTS)]
    head = [f"{tokens_name(start) if start else 0} to {tokens_name(stop)}" for start, stop in parts]
    plain = next((curve for curve in curves if curve.name == UNTOUCHED), None)
    body = []
    for curve in curves:
        below = "" if plain is None else f"{curve.mean(0, own) / plain.mean(0, own) - 1:+.2%}"
        losses = [f"{curve.mean(*part):.3f}" for part in parts]
        costs = [str(curve.threads), f"{curve.seconds:.0f}", f"{curve.peak_bytes / 1e6:,.0f}"]
        body.append([curve.name, *losses, below, *costs])
    about = f"Nats per token. `below` is the loss of the first {tokens_name(own)} tokens over the untouched model's."
    return [about, "", *table(["method", *head, "below", "threads", "seconds", "MB"], body)]


def _passkeys(found: Mapping[str, Any]) -> list[str]:
    rows = {name: cells for name, cells in found.items() if cells}
    depths = [cell["depth"] for cell in next(iter(rows.values()))]
    body = []
    for name, cells in rows.items():
        scores = [cell["recall"] for cell in cells]
        trials = sum(cell["trials"] for cell in cells)
        body.append([name, *map(percent, scores), percent(sum(scores) / len(scores)), str(trials)])
    return table(["method", *(f"depth {depth:.0%}" for depth in depths), "mean", "trials"], body)


def _draw(length: int, own: int, curves: Sequence[_Curve], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for curve in curves:
        wide = max(length // 32, curve.bucket)
        starts = range(0, length, wide)
        means = [curve.mean(start, start + wide) for start in starts]
        line = "-" if curve.name in METHODS else "--"
        axes.plot([start + wide / 2 for start in starts], means, line, label=curve.name)
    axes.axvline(own, color="gray", linestyle=":")
    axes.set_ylim(top=min(axes.get_ylim()[1], 5.0))
    axes.set(xlabel="position in the text, tokens", ylabel="loss, nats per token")
    axes.legend(fontsize="small", ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
