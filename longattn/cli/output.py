"""The output of the command line: any encoding, one console for all commands, and errors in one line."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, TextIO

import click

from longattn.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Failure", "drawable", "echo", "make_console", "message", "plain", "safe_streams", "shows_tracebacks"]

_ERRORS = "longattn.plain"  # the name of the error handler below
_LONGEST = 1000  # characters of an error
_PLAIN = dict(
    zip(
        "± × · • ≤ ≥ ≈ − ᵀ µ → ← ↑ ↓ … – — ✓ ‘ ’ “ ” ─ ━ ═ ╸ │ ┃ ║".split(),
        "+- x * * <= >= ~ - ^T u -> <- ^ v ... - - ok ' ' \" \" - - - - | | |".split(),
        strict=True,
    )
)
# Extras of pyproject.toml by the package that is missing.
_EXTRAS = {
    "accelerate": "hf",
    "gguf": "hf",
    "matplotlib": "plot",
    "peft": "lora",
    "sacrebleu": "metrics",
    "sklearn": "metrics",
    "tokenizers": "tokenizers",
    "transformers": "hf",
}


class Failure(click.ClickException):
    """An error told in one line; exit code 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        echo(f"Error: {self.format_message()}", error=True)


def make_console(*, error: bool = False) -> Console:
    """Return the console of a command: text is printed as it is, without markup, emoji codes or highlighting.

    Args:
        error: write to the error stream.
    """
    from rich.console import Console

    return Console(stderr=error, markup=False, emoji=False, highlight=False)


def echo(text: object = "", *, newline: bool = True, error: bool = False) -> None:
    """Print a text in the stream's own encoding. (click.echo writes UTF-8 where that is ASCII.)"""
    click.echo(text, file=sys.stderr if error else sys.stdout, nl=newline)


def plain(text: object) -> str:
    """Return a text that can be encoded: bytes of a file's name that are not UTF-8 as \\xNN."""
    return str(text).encode("utf-8", _ERRORS).decode("utf-8")


def drawable(text: object) -> str:
    """Return a text that matplotlib draws as it is: plain, and without what it would read as a formula."""
    return plain(text).replace("$", r"\$")


@contextmanager
def safe_streams() -> Iterator[None]:
    """Let sys.stdout and sys.stderr write every text while the block runs.

    What their encoding lacks is replaced: ± by +-, lines of tables by - | +, others by backslash escapes. A stream that
    cannot be written any more, such as a full disk or a closed pipe, ends the process with exit code 1.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        _reconfigure(stream, _ERRORS)
    try:
        yield
    except OSError as error:
        if shows_tracebacks():
            raise
        with suppress(OSError):
            echo(f"Error: {message(error)}", error=True)
        sys.exit(1)
    finally:
        for stream, errors in zip(streams, before, strict=True):
            _reconfigure(stream, errors)


def _reconfigure(stream: io.TextIOWrapper, errors: str | None) -> None:
    """Set the error handler, which flushes. What cannot be written was reported when it was written."""
    try:
        stream.reconfigure(errors=errors)
    except OSError:
        _discard(stream)
    except ValueError:  # closed
        pass


def _discard(stream: TextIO) -> None:
    """Let what is left in the buffer go nowhere: Python would complain about it at exit."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def shows_tracebacks() -> bool:
    """Return whether the environment asks for the traceback of an error."""
    return os.environ.get("LONGATTN_TRACEBACK", "0") not in ("", "0")


def message(error: BaseException) -> str:
    """Return one line for the user: what was wrong, and what to do where that is known."""
    text = str(error)
    if isinstance(error, Unsupported):
        text = "; ".join(line.strip() for line in text.splitlines())
    elif isinstance(error, InvalidInput):
        pass
    elif isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        text = f"{' -> '.join(names)}: {error.strerror}" if names else error.strerror
    elif isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        if package in _EXTRAS:
            text = f"{package} is not installed: pip install longattn[{_EXTRAS[package]}]"
    elif isinstance(error, MemoryError) or _out_of_memory(error):
        text = f"out of memory: {text}" if text else "out of memory"
    elif not isinstance(error, (OSError, UnicodeError)):
        text = f"{type(error).__name__}: {text} (LONGATTN_TRACEBACK=1 shows where)"
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _out_of_memory(error: BaseException) -> bool:
    """Return whether torch could not allocate: on a CPU that is a RuntimeError like any other."""
    named = type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain_character, error.object[error.start : error.end])), error.end


def _plain_character(character: str) -> str:
    code = ord(character)
    if character in _PLAIN:
        return _PLAIN[character]
    if 0x2500 <= code < 0x2580:  # corners and crossings of boxes
        return "+"
    if 0x2580 <= code < 0x25A0:  # blocks
        return "#"
    if 0x2800 <= code < 0x2900:  # braille, of spinners
        return "*"
    if 0xDC80 <= code < 0xDD00:  # a byte of an argument or a file's name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(_ERRORS, _replace)
