"""`longattn generate`: text from a decoder, as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from longattn.cli.device import Device
from longattn.cli.language_model import LanguageModel, check_draft, load_language_model
from longattn.cli.output import echo, make_console
from longattn.errors import InvalidInput
from longattn.models import Decoder, GenerationConfig, Sampling, beam_search, stream
from longattn.training.text_files import read_text

__all__ = ["generate"]

_DTYPES = ("float32", "bfloat16", "float16")


@click.command(context_settings={"show_default": True})
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("prompts", nargs=-1)
@click.option(
    "--file",
    "files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="A prompt from a file; repeatable.",
)
@click.option("--max-new-tokens", default=256, help="Of each text.")
@click.option("--temperature", default=0.0, help="0: always the likeliest token.")
@click.option("--top-k", type=int, help="Draw from the k likeliest tokens.")
@click.option("--top-p", default=1.0, help="Draw from the likeliest tokens that together reach p.")
@click.option("--repetition-penalty", default=1.0, help="Above 1, tokens that the text has become less likely.")
@click.option("--beams", default=1, help="Above 1: a beam search.")
@click.option("--length-penalty", default=1.0, help="Of a beam search: above 0 prefers longer texts.")
@click.option("--chat", is_flag=True, help="Each prompt is a user's message, by the model's chat template.")
@click.option("--stop", multiple=True, help="A string that ends the text; repeatable.")
@click.option("--draft", type=click.Path(exists=True, path_type=Path), help="A small model that guesses ahead.")
@click.option("--draft-tokens", default=4, help="How many tokens it guesses at a time.")
@click.option("--window", type=int, help="All layers see this many tokens only: memory stays constant.")
@click.option("--sinks", default=0, help="And the first so many.")
@click.option(
    "--positions",
    type=click.Choice(["original", "cache"]),
    help="Of sliding layers, in the rotation: those in the stream, or in the window (StreamingLLM). By default the "
    "model's own.",
)
@click.option("--dtype", type=click.Choice(_DTYPES), default="float32", help="Of the weights.")
@click.option("--cache-dtype", type=click.Choice([*_DTYPES, "int8"]), help="Of the caches; the weights' by default.")
@click.option("--device", type=Device(), default="cpu", help="Where to run.")
@click.option("--seed", type=click.IntRange(-(1 << 63), (1 << 64) - 1), default=0, help="Of what is drawn.")
def generate(
    checkpoint: Path,
    prompts: tuple[str, ...],
    files: tuple[Path, ...],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    repetition_penalty: float,
    beams: int,
    length_penalty: float,
    chat: bool,
    stop: tuple[str, ...],
    draft: Path | None,
    draft_tokens: int,
    window: int | None,
    sinks: int,
    positions: str | None,
    dtype: str,
    cache_dtype: str | None,
    device: str,
    seed: int,
) -> None:
    """Go on from PROMPTS with the model of CHECKPOINT.

    A prompt `-` is read from standard input, and so is the only one where none is given and standard input is not a
    terminal.

    CHECKPOINT is a file that `longattn train` saved, or a folder of a Llama-style model with its tokenizer, as
    safetensors or GGUF (needs transformers). One text on a terminal is shown as it comes, and several, or into a file,
    when all is done.
    """
    texts = _texts(prompts, files)
    for string in stop:
        _check_text("--stop", string)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
    if beams != 1 and draft is not None:
        raise InvalidInput("--draft", "none with --beams", draft)
    found = _load(checkpoint, dtype, device)
    model: Any = found.model
    if window is not None or sinks:
        model = model.extended(window=window, sinks=sinks)
    drafting: Any = None
    if draft is not None:
        drafts = _load(draft, dtype, device)
        check_draft(found, drafts)
        drafting = drafts.model
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        stop_tokens=found.stop_tokens,
        draft_tokens=draft_tokens,
        cache_dtype=None if cache_dtype is None else getattr(torch, cache_dtype),
        positions=positions,
    )
    ids = [found.chat(text) if chat else [*found.prefix, *found.encode(text)] for text in texts]
    shows = len(ids) == 1 and beams == 1 and sys.stdout.isatty()
    console = make_console(error=True)
    with _Line(console, sum(map(len, ids)), hidden=shows) as line:
        if beams != 1:
            best_of = beam_search(model, ids, config, beams=beams, length_penalty=length_penalty, decode=found.decode)
            line.add(sum(len(best[0].tokens) for best in best_of), drafted=0)
            results = [best[0].text or "" for best in best_of]
        else:
            results = [""] * len(ids)
            generator = torch.Generator().manual_seed(seed)
            try:
                for piece in stream(model, ids, config, decode=found.decode, draft=drafting, generator=generator):
                    results[piece.sequence] += piece.text
                    line.add(1, drafted=int(piece.drafted))
                    if shows:
                        echo(piece.text, newline=False)
            except KeyboardInterrupt:
                line.interrupted = True
    if shows:
        echo()
    else:
        _print(results)
    console.print(line.summary(), soft_wrap=True)
    if line.interrupted:
        sys.exit(130)


def _texts(prompts: Sequence[str], files: Sequence[Path]) -> list[str]:
    """The prompts, `-` replaced by standard input, and those of the files."""
    reads_input = not prompts and not files and not (sys.stdin is None or sys.stdin.isatty())
    asked = ["-"] if reads_input else list(prompts)
    if asked.count("-") > 1:
        raise InvalidInput("PROMPTS", "standard input (-) once", f"{asked.count('-')} times")
    texts = []
    for text in asked:
        if text == "-":
            text = "" if sys.stdin is None else _decoded(sys.stdin.buffer.read())
            if not text and reads_input:
                raise InvalidInput("PROMPTS", "at least one text, --file, or a text on standard input", "none")
        _check_text("PROMPTS", text)
        texts.append(text)
    texts += [read_text(file) for file in files]
    if not texts:
        raise InvalidInput("PROMPTS", "at least one text, --file, or a text on standard input", "none")
    return texts


def _decoded(data: bytes) -> str:
    """The text on standard input, read as a file of texts is: UTF-8, and any line end becomes a newline."""
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        got = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise InvalidInput("standard input", "a text in UTF-8", got) from error


def _check_text(name: str, text: str) -> None:
    """Refuse an argument whose bytes are not text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInput(name, "a text in UTF-8", repr(text)) from error


def _load(checkpoint: Path, dtype: str, device: str) -> LanguageModel:
    found = load_language_model(checkpoint, dtype=getattr(torch, dtype), device=device)
    if not isinstance(found.model, Decoder):
        raise InvalidInput("CHECKPOINT", "a decoder that longattn.models can say", type(found.model).__name__)
    return found


def _print(texts: Iterable[str]) -> None:
    for number, text in enumerate(texts):
        if number:
            echo("---")
        echo(text)


class _Line:
    """How far it is, on the error stream, while nothing else is shown; tokens and seconds in any case."""

    def __init__(self, console: Console, prompt_tokens: int, hidden: bool) -> None:
        self.interrupted = False
        self._prompt_tokens = prompt_tokens
        self._tokens = self._drafted = 0
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True, disable=hidden
        )
        self._task = self._progress.add_task(f"reading {prompt_tokens:,} tokens")
        self._start = self._first = self._last = time.perf_counter()

    def __enter__(self) -> _Line:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def add(self, tokens: int, drafted: int) -> None:
        """So many more tokens have come."""
        self._last = time.perf_counter()
        if not self._tokens:
            self._first = self._last
        self._tokens += tokens
        self._drafted += drafted
        self._progress.update(self._task, description=self.summary())

    def summary(self) -> str:
        """Tokens, tokens per second after the first, and how long that took to come."""
        parts = [f"{self._tokens:,} tokens"]
        if self._last > self._first:
            parts.append(f"{(self._tokens - 1) / (self._last - self._first):,.1f} tokens/s")
        parts.append(f"{self._prompt_tokens:,} tokens of prompts, first answer after {self._first - self._start:.2f} s")
        if self._drafted:
            parts.append(f"{self._drafted / self._tokens:.0%} guessed by the draft model")
        if self.interrupted:
            parts.append("interrupted")
        return "; ".join(parts)
