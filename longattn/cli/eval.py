"""`longattn eval`: how a language model reads long texts, by position, by length, and by what it finds in them."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from longattn._version import __version__
from longattn.cli import eval_report as report
from longattn.cli.device import Device
from longattn.cli.language_model import LanguageModel, load_language_model, trained_length
from longattn.cli.methods import chosen_methods, extended_by, method_options
from longattn.cli.output import make_console
from longattn.cli.writing import writes_folder
from longattn.errors import InvalidInput
from longattn.evaluation import TASKS, TEXT_TASKS, Cell, Evaluation, Plan, Results, make_reader, most_positions
from longattn.files import write_text
from longattn.training.text_files import find_texts, read_pieces

__all__ = ["evaluate", "read_text", "token_counts"]

_PIECE = 1 << 20  # characters of text that are encoded at once
_DEFAULT_TASKS = ("loss", "passkey", "speed")
_DEFAULT_STRIDE = 256
_DTYPES = ("float32", "bfloat16", "float16")


@click.command(name="eval", context_settings={"show_default": True})
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--lengths", required=True, help="Tokens, such as 8k,16k,32768.")
@click.option(
    "--tasks",
    help=f"Of {', '.join(TASKS)}; or all. By default loss, passkey and speed; passkey and speed without --text.",
)
@click.option("--text", "texts", type=click.Path(exists=True, path_type=Path), multiple=True, help="Repeatable.")
@click.option(
    "--out", default="eval-results", type=click.Path(file_okay=False, path_type=Path), help="Folder to write."
)
@click.option("--resume", is_flag=True, help="Go on with what --out lacks; all else as it was started.")
@click.option("--windows", default=1, help="Of text, for loss; strides of it, for perplexity.")
@click.option(
    "--stride",
    type=int,
    help="Tokens that perplexity and short_windows count of each window, the last. By default 256, or the shortest "
    "length or the context where that is less.",
)
@click.option("--context", help="Tokens that short_windows reads at once; by default the trained length.")
@click.option("--bucket", default=256, help="Tokens that a loss by position is the mean of.")
@click.option("--depths", default=5, help="Where passkeys stand, evenly from the start to the end.")
@click.option("--trials", default=1, help="Questions of each kind, length and depth.")
@click.option("--gguf", help="The file in the folder, where there are several.")
@click.option("--dtype", type=click.Choice(_DTYPES), default="float32", help="Of weights and caches.")
@click.option("--device", type=Device(), default="cpu", help="Where to run.")
@click.option("--seed", default=0, help="Of the questions.")
@click.option("--chat", is_flag=True, help="Ask every question as a user's message, by the model's chat template.")
@method_options
def evaluate(
    model: Path,
    lengths: str,
    tasks: str | None,
    texts: tuple[Path, ...],
    out: Path,
    resume: bool,
    windows: int,
    stride: int | None,
    context: str | None,
    bucket: int,
    depths: int,
    trials: int,
    gguf: str | None,
    dtype: str,
    device: str,
    seed: int,
    chat: bool,
    **options: Any,
) -> None:
    """Measure how MODEL reads long texts; results.json, report.md and pictures go to --out.

    MODEL is a checkpoint of `longattn train` or `longattn extend`, a folder of a Hugging Face model with its tokenizer,
    or a folder with a GGUF file. With --method it is first extended, as `longattn extend` would, and nothing is saved.

    Every reading is kept as soon as it is done: what was interrupted goes on with --resume.
    """
    console = make_console()
    asked = _tasks(tasks, has_text=bool(texts))
    counts = token_counts("--lengths", lengths)
    context_tokens = None if context is None else token_counts("--context", context)[0]
    plan = Plan(
        tasks=asked,
        lengths=counts,
        windows=windows,
        stride=_stride(asked, counts, context_tokens) if stride is None else stride,
        context=context_tokens,
        bucket=bucket,
        depths=depths,
        trials=trials,
        seed=seed,
    )
    if plan.text_tokens and not texts:
        needs = ", ".join(task for task in plan.tasks if task in TEXT_TASKS)
        raise InvalidInput("--text", f"a text of at least {plan.text_tokens:,} tokens, for {needs}", "none")
    place = out / "results.json"
    if place.exists() != resume:
        expected = "an evaluation to resume" if resume else "a new folder, or --resume beside it"
        raise InvalidInput("--out", expected, out)
    loaded = load_language_model(model, gguf=gguf, dtype=getattr(torch, dtype), device=device)
    trained, positions = trained_length(loaded.model), most_positions(loaded.model)
    if positions is not None and plan.most_tokens > positions:
        expected = f"lengths of which no task takes more than the model's {positions:,} positions"
        raise InvalidInput("--lengths", expected, f"tasks that take {plan.most_tokens:,}")
    if "short_windows" in plan.tasks and plan.context is None:
        read_at_once = min(trained, max(counts))
        plan = replace(
            plan, context=read_at_once, stride=_stride(asked, counts, read_at_once) if stride is None else stride
        )
    methods = chosen_methods(loaded.model, **options)
    reads = extended_by(loaded.model, methods, make_console(error=True))
    prefix, suffix = loaded.chat_frame() if chat else (list(loaded.prefix), [])
    text = read_text(texts, loaded, plan.text_tokens, out=out) if texts else None
    settings = {
        "model": str(model),
        "config": _digest(reads.config.to_dict()),
        "trained": trained,
        "methods": [method.to_dict() for method in methods],
        "dtype": dtype,
        "text": None if text is None else hashlib.sha256(text[: plan.text_tokens].numpy().tobytes()).hexdigest()[:16],
        "plan": asdict(plan) | {"tasks": list(plan.tasks), "lengths": list(plan.lengths)},
        "chat": True if chat else None,
    }
    evaluation = Evaluation(
        make_reader(reads),
        plan,
        encode=loaded.encode,
        decode=loaded.decode,
        prefix=prefix,
        suffix=suffix,
        text=text,
        device=device,
    )
    machine = {
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "device": device,
    }
    machine |= {"torch": str(torch.__version__), "longattn": __version__}
    results = Results({**settings, "machine": machine})
    if resume:
        results = Results.load(place)
        for name, value in settings.items():
            if results.settings.get(name) != value:
                raise InvalidInput(f"--resume: {name}", repr(results.settings.get(name)), repr(value))
        before = results.settings.get("machine")
        if not isinstance(before, dict) or {name: type(value) for name, value in before.items()} != {
            name: type(value) for name, value in machine.items()
        }:
            raise InvalidInput("--resume: machine", f"an object with {', '.join(machine)}", repr(before))
    with writes_folder(out):
        if place.exists() != resume:
            raise InvalidInput("--out", "a folder that no other command writes", out)
        _run(evaluation, results, place, console)
        page = report.markdown(results)
        write_text(out / "report.md", page)
        can_draw = importlib.util.find_spec("matplotlib") is not None
        pictures = report.draw(results, out) if can_draw else []
    console.print(page)
    if not can_draw:
        console.print("No pictures: matplotlib is not installed (pip install longattn[plot]).")
    for picture in pictures:
        console.print(f"Picture: {picture}", soft_wrap=True)
    console.print(f"Results: {place}", soft_wrap=True)


def read_text(
    paths: Sequence[Path], model: LanguageModel, least: int, *, out: Path | None = None, argument: str = "--text"
) -> Tensor:
    """The token ids of files, and of all files below folders, one after another, int64: at least so many, if there are.

    A text is encoded a megabyte at a time, and no further than it takes. Files below folders that are not texts are
    left out and counted.

    Raises:
        InvalidInput: a text that is not UTF-8, cannot be read, or is named and binary.
    """
    ids = list(model.prefix)
    for path in paths:  # in the order in which they are named
        found = find_texts([path], out=out, argument=argument)
        if (warning := found.warning()) is not None:
            make_console(error=True).print(f"Warning: {warning}", soft_wrap=True)
        for piece in chain.from_iterable(read_pieces(file, _PIECE) for file in found.files):
            if len(ids) >= least:
                break
            ids += model.encode(piece)
    return torch.tensor(ids, dtype=torch.int64)


def _tasks(asked: str | None, *, has_text: bool) -> tuple[str, ...]:
    if asked is None:
        return _DEFAULT_TASKS if has_text else tuple(task for task in _DEFAULT_TASKS if task not in TEXT_TASKS)
    return TASKS if asked == "all" else tuple(task.strip() for task in asked.split(","))


def _stride(tasks: Sequence[str], lengths: Sequence[int], context: int | None) -> int:
    """The stride where none was given: one that no task and no length refuses."""
    most = [_DEFAULT_STRIDE]
    if "perplexity" in tasks:
        most.append(min(lengths))
    if "short_windows" in tasks and context is not None:
        most.append(context)
    return min(most)


def token_counts(name: str, text: str) -> tuple[int, ...]:
    """Of "8k,16k,32768": 8192, 16384 and 32768; m is 1024 k.

    Raises:
        InvalidInput: anything else.
    """
    units = {"k": 1024, "m": 1024**2}
    try:
        parts = [part.strip().lower() for part in text.split(",")]
        found = tuple(round(float(part.rstrip("km")) * units.get(part[-1:], 1)) for part in parts)
    except (ValueError, OverflowError):
        found = ()
    if not found or min(found) < 1:
        raise InvalidInput(name, "numbers of tokens such as 8k,16k,32768", text)
    return found


def _run(evaluation: Evaluation, results: Results, place: Path, console: Console) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=make_console(error=True)) as progress:
        bar = progress.add_task("reading", total=len(evaluation.cells()))

        def show(cell: Cell, number: int, count: int) -> None:
            progress.update(bar, completed=number, description=f"{cell.task} at {cell.length:,}")

        try:
            evaluation.run(results, _saver(results, place), show)
        except KeyboardInterrupt:
            progress.stop()
            kept = len(Results.load(place).cells) if place.exists() else 0
            said = f"{kept} readings are saved: the same command with --resume continues"
            console.print(f"interrupted; {said if kept else 'nothing was saved'}", soft_wrap=True)
            sys.exit(130)
        progress.update(bar, completed=len(evaluation.cells()))


def _saver(results: Results, place: Path) -> Callable[[], None]:
    def save() -> None:
        results.save(place)

    return save


def _digest(config: dict[str, Any]) -> str:
    said = {name: value for name, value in config.items() if name != "_name_or_path"}
    return hashlib.sha256(repr(sorted(said.items(), key=lambda item: item[0])).encode()).hexdigest()[:16]
