"""How a command writes a training: the order of its steps, and what it says about what is on disk."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from longattn.errors import InvalidInput
from longattn.files import locked, remove_temporaries
from longattn.training.checkpoint import saved_steps

__all__ = ["check_installed", "check_out", "claimed", "writes_folder"]


def check_out(out: Path, resume: bool) -> None:
    """Raise InvalidInput unless there is a checkpoint to resume, or no file yet."""
    if resume and not out.is_file():
        raise InvalidInput("--out", "a checkpoint to resume from", out)
    if not resume and (out.exists() or out.is_symlink()):
        raise InvalidInput("--out", "a new file, or --resume beside it", out)


def check_installed(modules: Iterable[str], extra: str, what: str) -> None:
    """Raise InvalidInput unless modules that a command needs at its end can be imported.

    Args:
        modules: their names.
        extra: the extra of longattn that brings them.
        what: what they are for.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise InvalidInput(what, f"the extra {extra} (pip install longattn[{extra}])", f"no module {missing[0]}")


@contextmanager
def claimed(out: Path, resume: bool, console: Console, *, checkpoint: Path, beside: Iterable[Path]) -> Iterator[None]:
    """Own --out while the block runs: lock it, remove what killed runs left, and say what an end before time saved.

    What stood on disk before the block is not touched here. New files of `beside` are removed again if no checkpoint
    was saved that they belong to.

    Args:
        out: the path that the lock is for.
        resume: whether there has to be a checkpoint.
        console: where an interrupt is told; it ends the process with exit code 130.
        checkpoint: the file that the training is saved to.
        beside: what is written next to it.

    Raises:
        InvalidInput: another command writes to `out`, or the checkpoint exists although it should not, or the reverse.
        OSError: the folder cannot be written.
    """
    beside = list(beside)
    with locked(out):
        check_out(checkpoint, resume)
        for path in {out, checkpoint, *beside}:
            remove_temporaries(path)
        new = [path for path in beside if not path.exists()]
        steps = saved_steps(checkpoint)
        try:
            yield
        except KeyboardInterrupt:
            console.print(f"interrupted; {_saved(checkpoint)}", soft_wrap=True)
            sys.exit(130)
        except Exception as error:
            if saved_steps(checkpoint) != steps:
                console.print(f"ended by an error; {_saved(checkpoint)}", soft_wrap=True)
            for note in getattr(error, "__notes__", ()):
                console.print(note, soft_wrap=True)
            raise
        finally:
            if not checkpoint.exists() and not out.exists():
                for path in new:
                    path.unlink(missing_ok=True)


@contextmanager
def writes_folder(out: Path) -> Iterator[None]:
    """Own the folder --out while the block runs: create it, lock it, and remove what killed runs left in it.

    Raises:
        InvalidInput: another command writes to it.
        OSError: it cannot be created or written.
    """
    with locked(out):
        is_new = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        remove_temporaries(out)
        try:
            yield
        finally:
            if is_new and not any(out.iterdir()):
                out.rmdir()


def _saved(checkpoint: Path) -> str:
    steps = saved_steps(checkpoint)
    if steps is None:
        return "nothing was saved"
    return f"{steps} steps are saved in {checkpoint}: the same command with --resume continues"
