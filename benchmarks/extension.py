"""What each method that extends the context does to one trained model, at lengths beyond its own, without tuning.

python -m benchmarks.extension MODEL --text king_james.txt --lengths 16k,32k --out results
python -m benchmarks.extension MODEL --tasks passkey --lengths 8k,16k,32k --out results/passkey

Each method and length is one `longattn eval`, in a process of its own: its results are kept in OUT/LENGTH/METHOD, and
what is there is not measured again. The factor is that of the length over the trained one, unless a method's name says
another. README.md in OUT compares them: by position, and below the trained length with the model as it was.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from longattn.cli.eval import token_counts
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
            place = out / _tokens(length) / name
            if (place / "report.md").exists():
                continue
            wanted = tasks
            if name == UNTOUCHED and "loss" in tasks.split(",") and length > own:
                wanted += ",short_windows"
            options = [word.format(factor=factor, twice=2 * factor) for word in METHODS[name]]
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
            click.echo(f"{_tokens(length)}, {name}")
            done = subprocess.run(
                [sys.executable, "-m", "longattn", *map(str, command)], capture_output=True, text=True
            )
            if done.returncode:
                raise click.ClickException(f"{name} at {length} tokens: {done.stderr.strip()[-400:]}")
            for picture in place.glob("*.png"):  # of one method; README.md has one of all
                picture.unlink()
    found = {
        length: {
            name: Results.load(out / _tokens(length) / name / "results.json")
            for name in METHODS
            if (out / _tokens(length) / name / "report.md").exists()
        }
        for length in sorted(
            token_counts("out", folder.name)[0] for folder in out.iterdir() if folder.name[:1].isdigit()
        )
    }
    (out / "README.md").write_text("\n".join(_page(found, own, out)) + "\n", encoding="utf-8")


def _page(found: Mapping[int, Mapping[str, Results]], own: int, out: Path) -> list[str]:
    """Tables by length; writes the pictures that they name."""
    first = next(iter(next(iter(found.values())).values())).settings
    machine = first["machine"]
    lines = [
        f"# {Path(first['model']).name} beyond {_tokens(own)} tokens, without tuning",
        "",
        f"{first['dtype']}; {machine['threads']} threads, {machine['device']}, torch {machine['torch']}, longattn "
        f"{machine['longattn']}. Seconds are of one reading on a machine that did other things, too; MB are what "
        "reading adds to the weights, at its highest.",
    ]
    for length, by_method in found.items():
        measured = {name: summary(results) for name, results in by_method.items()}
        if any("loss" in one for one in measured.values()):
            lines += _losses(length, own, by_method, measured)
            _draw(length, own, by_method, measured, out / f"loss-{_tokens(length)}.png")
            lines += ["", f"![loss by position](loss-{_tokens(length)}.png)"]
        if any("passkey" in one for one in measured.values()):
            lines += _passkeys(length, measured)
    return lines


def _losses(
    length: int, own: int, by_method: Mapping[str, Results], measured: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    settings = next(iter(by_method.values())).settings["plan"]
    bucket, width = settings["bucket"], length // _PARTS
    lines = ["", f"## Loss by position at {_tokens(length)}", ""]
    lines += [
        f"Nats per token, {settings['windows']} windows of text. `below` is the loss of the first {_tokens(own)} ",
        "",
    ]
    lines[-2] = lines[-2] + "tokens over the untouched model's."
    starts = range(0, length, width)
    columns = ["method", *(f"{_tokens(at) if at else 0} to {_tokens(at + width)}" for at in starts), "below"]
    lines += _table_head([*columns, "seconds", "MB"])

    def mean(losses: Sequence[float], start: int, stop: int) -> float:
        part = losses[start // bucket : stop // bucket]
        return sum(part) / len(part)

    plain = measured.get(UNTOUCHED, {}).get("loss")
    for name, one in measured.items():
        for task in ("loss", "short_windows"):
            if task not in one:
                continue
            losses = one[task][0]["losses"]
            cells = [cell for cell, _ in by_method[name].of(task)]
            costs = [cost for _, cost in by_method[name].of(task)]
            below = "" if plain is None else f"{mean(losses, 0, own) / mean(plain[0]['losses'], 0, own) - 1:+.2%}"
            title = name if task == "loss" else f"{name}, in windows of {_tokens(own)}"
            parts = [f"{mean(losses, at, at + width):.3f}" for at in starts]
            seconds = sum(cost["seconds"] for cost in costs) / len(cells)
            peak = max(cost["peak_bytes"] or 0 for cost in costs) / 1e6
            lines.append("| " + " | ".join([title, *parts, below, f"{seconds:.0f}", f"{peak:,.0f}"]) + " |")
    return lines


def _passkeys(length: int, measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["", f"## Passkey at {_tokens(length)}", ""]
    rows = {name: one["passkey"] for name, one in measured.items() if "passkey" in one}
    depths = [row["depth"] for row in next(iter(rows.values()))]
    lines += _table_head(["method", *(f"depth {depth:.0%}" for depth in depths), "mean", "trials"])
    for name, cells in rows.items():
        scores = [cell["recall"] for cell in cells]
        trials = sum(cell["trials"] for cell in cells)
        body = [name, *(f"{score:.0%}" for score in scores), f"{sum(scores) / len(scores):.0%}", f"{trials}"]
        lines.append("| " + " | ".join(body) + " |")
    return lines


def _draw(
    length: int, own: int, by_method: Mapping[str, Results], measured: Mapping[str, Mapping[str, Any]], path: Path
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    wide = max(1, length // 32)
    for name, one in measured.items():
        bucket = by_method[name].settings["plan"]["bucket"]
        for task, line in (("loss", "-"), ("short_windows", "--")):
            if task not in one:
                continue
            losses, many = one[task][0]["losses"], max(1, wide // bucket)
            means = [sum(losses[at : at + many]) / many for at in range(0, len(losses) - many + 1, many)]
            places = [(at + 0.5) * many * bucket for at in range(len(means))]
            axes.plot(places, means, line, label=name if task == "loss" else f"{name}, in windows of {_tokens(own)}")
    axes.axvline(own, color="gray", linestyle=":")
    axes.set_ylim(top=min(axes.get_ylim()[1], 5.0))
    axes.set(xlabel="position in the text, tokens", ylabel="loss, nats per token")
    axes.legend(fontsize="small", ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def _table_head(names: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else f"{count}"


if __name__ == "__main__":
    main()
