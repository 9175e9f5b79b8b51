"""Byte-level data from text files: which files, which of them are held out, and windows read straight from disk."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longattn.errors import InvalidInput

__all__ = ["ByteCorpus", "RandomWindows", "find_files", "held_out_sides", "split_files", "stdlib_files"]


def find_files(paths: Iterable[Path], pattern: str = "*") -> list[Path]:
    """Return the files among `paths`, and those below its folders that `pattern` matches.

    They are sorted, each once, and none below a folder is hidden.

    Raises:
        InvalidInput: a path does not exist, a pattern that leaves the folders, or there is no file at all.
    """
    paths = [Path(path) for path in paths]
    if not pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise InvalidInput("files", "a pattern of names below a folder, such as *.txt", repr(pattern))
    found: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise InvalidInput("paths", "files or folders that exist", path)
        below = [path] if path.is_file() else [file for file in path.rglob(pattern) if file.is_file()]
        found.update(file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts))
    if not found:
        raise InvalidInput("paths", f"at least one file named {pattern}", [str(path) for path in paths])
    return sorted(found)


def stdlib_files() -> list[Path]:
    """The source files of Python's standard library: text that every machine has.

    Without installed packages, and without the tests, which not every distribution installs.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    return [file for file in find_files([root], "*.py") if not skipped & set(file.relative_to(root).parts)]


def held_out_sides(digests: Iterable[bytes], held_out: float, what: str, argument: str = "held_out") -> np.ndarray:
    """Decide what is held out: an item's side depends on its own digest, so that adding items moves no other.

    Args:
        digests: of the items, at least 8 bytes each, evenly spread.
        held_out: the expected share of items that are held out, in (0, 1).
        what: the items in the plural, for errors.
        argument: the name of `held_out`, for errors.

    Returns:
        bool [items], True where an item is held out.

    Raises:
        InvalidInput: a share out of range, or no item on one side.
    """
    if isinstance(held_out, bool) or not isinstance(held_out, (int, float)) or not 0.0 < held_out < 1.0:
        raise InvalidInput(argument, "a number in (0, 1)", held_out)
    sides = np.array([int.from_bytes(digest[:8], "big") < held_out * 2**64 for digest in digests], dtype=bool)
    if sides.all() or not sides.any():
        got = f"{held_out} of {len(sides)} {what}: {int((~sides).sum())} for training, {int(sides.sum())} held out"
        raise InvalidInput(argument, f"a share that leaves at least 1 of the {what} on both sides", got)
    return sides


def split_files(files: Sequence[Path], held_out: float = 0.1) -> tuple[list[Path], list[Path]]:
    """Return (training files, held-out files). A file's side depends on its name alone: adding files moves no other.

    The name is the path relative to the folder that holds all files: the split is the same on every machine.

    Args:
        held_out: the expected share of held-out files, in (0, 1).

    Raises:
        InvalidInput: a share out of range, or a side without a file.
    """
    files = sorted(files)
    root = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
    names = (os.fsencode(file.relative_to(root).as_posix()) for file in files)
    is_held_out = held_out_sides((hashlib.sha256(name).digest() for name in names), held_out, "files")
    return (
        [file for file, held in zip(files, is_held_out, strict=True) if not held],
        [file for file, held in zip(files, is_held_out, strict=True) if held],
    )


class ByteCorpus:
    """Documents as sequences of byte tokens, 0..255: one document a file, read from disk when asked for.

    Args:
        files: the documents; an empty file has no window.

    Raises:
        InvalidInput: no files, or no text in them.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(Path(file) for file in files)
        self.sizes = tuple(file.stat().st_size for file in self.files)
        if not sum(self.sizes):
            raise InvalidInput("files", "text files with at least one byte", f"{len(self.files)} files of 0 bytes")

    def __len__(self) -> int:
        """How many bytes."""
        return sum(self.sizes)

    def digest(self) -> str:
        """Return a fingerprint of the documents' names and sizes."""
        named = [(file.name, size) for file, size in zip(self.files, self.sizes, strict=True)]
        return hashlib.sha256(repr(named).encode()).hexdigest()[:16]

    def read(self, document: int, start: int, length: int) -> Tensor:
        """`length` bytes of a document from `start` on, int64 [length].

        Raises:
            InvalidInput: the document does not have them (any more).
        """
        with self.files[document].open("rb") as file:
            file.seek(start)
            data = file.read(length)
        if len(data) != length:
            got = f"{start + len(data)} bytes in {self.files[document]}"
            raise InvalidInput("document", f"at least {start + length} bytes", got)
        return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).astype(np.int64))

    def spread(self, count: int, length: int, seed: int = 0) -> Tensor:
        """`count` windows at random places, as evenly over the documents that are long enough as can be.

        Returns:
            int64 [count, length].

        Raises:
            InvalidInput: no document has `length` bytes.
        """
        documents = self._at_least(length)
        rng = np.random.default_rng(seed)
        order = np.concatenate([rng.permutation(documents) for _ in range(-(-count // len(documents)))])[:count]
        starts = [int(rng.integers(self.sizes[document] - length + 1)) for document in order]
        return torch.stack([self.read(int(d), start, length) for d, start in zip(order, starts, strict=True)])

    def _at_least(self, length: int) -> list[int]:
        documents = [document for document, size in enumerate(self.sizes) if size >= length]
        if not documents:
            got = f"{len(self.files)} documents of at most {max(self.sizes)}"
            raise InvalidInput("length", f"a document of at least {length} bytes", got)
        return documents


class RandomWindows:
    """Training batches: windows at random places, every place of every document equally likely.

    A window lies within one document; documents shorter than it are left out. The batch of a step hangs on the seed
    and the step alone, so a resumed training sees what it would have seen.

    Args:
        corpus: the documents.
        batch_size: B, windows a batch.
        length: N, tokens a window; one more is read, the last one's target.
        seed: of the places.

    Raises:
        InvalidInput: no document is long enough.
    """

    def __init__(self, corpus: ByteCorpus, *, batch_size: int, length: int, seed: int = 0) -> None:
        for name, value in (("batch_size", batch_size), ("length", length)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInput(name, "an int >= 1", repr(value))
        self.corpus = corpus
        self.batch_size = batch_size
        self.length = length
        self.seed = seed
        self._documents = corpus._at_least(length + 1)
        self._ends = list(accumulate(corpus.sizes[document] - length for document in self._documents))

    def batch(self, step: int) -> Tensor:
        """The windows of a step, int64 [B, N + 1]."""
        places = np.random.default_rng([self.seed, step]).integers(self._ends[-1], size=self.batch_size)
        return torch.stack([self._window(int(place)) for place in places])

    def describe(self) -> dict[str, Any]:
        """What decides the batches, in plain Python values."""
        return {
            "batch_size": self.batch_size,
            "length": self.length,
            "seed": self.seed,
            "corpus": self.corpus.digest(),
        }

    def _window(self, place: int) -> Tensor:
        index = bisect_right(self._ends, place)
        document = self._documents[index]
        last_start = self.corpus.sizes[document] - self.length - 1
        return self.corpus.read(document, last_start - (self._ends[index] - 1 - place), self.length + 1)
