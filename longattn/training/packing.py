"""Whole documents side by side in one sequence, none of which sees another, and token files larger than memory.

A token file holds all documents one after another, and `<name>.ends` where each ends; the tokens are mapped, not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.files import replaced
from longattn.training.data import held_out_sides

__all__ = ["Documents", "PackedDocuments", "TokenFile", "pack", "write_token_file"]

# `.ends` holds 64-bit numbers: V, bytes an id, and where each document ends. With _SOURCE added to the second number,
# the SHA-256 of what the file was made of stands before the ends.
_SOURCE = 1 << 8


def write_token_file(
    path: Path,
    documents: Iterable[str],
    encode: Callable[[str], Sequence[int]],
    vocab_size: int,
    *,
    source: bytes | None = None,
) -> TokenFile:
    """Encode documents to a file, one at a time; documents without tokens are left out.

    Args:
        path: replaced only once all is written.
        encode: of a document to ids, such as lambda text: tokenizer.encode(text).ids, or str.encode for bytes.
        vocab_size: V; decides whether an id takes 1, 2 or 4 bytes.
        source: 32 bytes that identify documents and encoding, kept as `TokenFile.source`.

    Raises:
        InvalidInput: an id out of range, or no tokens at all.
        OSError: the file cannot be written, for example on a full disk.
    """
    path = Path(path)
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= 2**32:
        raise InvalidInput("vocab_size", "an int in [1, 2^32]", repr(vocab_size))
    if source is not None and len(source) != 32:
        raise InvalidInput("source", "32 bytes", f"{len(source)} bytes")
    dtype = np.dtype(np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.uint32)
    ends: list[int] = []
    ends_file = _ends_file(path)
    with replaced(ends_file) as temporary_ends, replaced(path) as temporary:
        with temporary.open("wb") as file:
            for document in documents:
                ids = np.asarray(list(encode(document)), dtype=np.int64)
                if not len(ids):
                    continue
                if ids.min() < 0 or ids.max() >= vocab_size:
                    raise InvalidInput("encode", f"ids in [0, {vocab_size})", f"{ids.min()}..{ids.max()}")
                file.write(ids.astype(dtype).tobytes())
                ends.append((ends[-1] if ends else 0) + len(ids))
        if not ends:
            raise InvalidInput("documents", "at least one with a token", "none")
        kind = dtype.itemsize + (0 if source is None else _SOURCE)
        numbers = np.array([vocab_size, kind], dtype=np.uint64).tobytes()
        temporary_ends.write_bytes(numbers + (source or b"") + np.array(ends, dtype=np.uint64).tobytes())
        # Without its ends, the old file is none: a torn replacement cannot pass for a whole one.
        ends_file.unlink(missing_ok=True)
    return TokenFile(path)


class Documents(Protocol):
    """Texts as sequences of ids."""

    vocab_size: int

    def __len__(self) -> int:
        """How many documents."""

    def __getitem__(self, document: int) -> Tensor:
        """The ids of a document, int64 [N]."""

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each document, int64 [documents]."""

    def digest(self) -> str:
        """A fingerprint."""


class TokenFile:
    """The documents of a token file, as sequences of ids; mapped from disk.

    Attributes:
        source: 32 bytes that identify what the file was made of, as given to `write_token_file`; None if not given.

    Args:
        path: as `write_token_file` wrote it.

    Raises:
        InvalidInput: no such file, or a truncated or damaged one. An id that is not below V is found when its document
            is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        ends_file = _ends_file(self.path)
        for file in (self.path, ends_file):
            if not file.is_file():
                raise InvalidInput("path", "a token file and its .ends", f"no {file}")
        data = ends_file.read_bytes()
        header = np.frombuffer(data[: len(data) // 8 * 8], dtype=np.uint64)
        kind = int(header[1]) if len(header) > 1 else 0
        itemsize, first = kind % _SOURCE, 6 if kind >= _SOURCE else 2
        if len(data) % 8 or len(header) <= first or itemsize not in (1, 2, 4) or kind - itemsize not in (0, _SOURCE):
            raise InvalidInput("path", "a complete .ends file", ends_file)
        self.vocab_size = int(header[0])
        self.source = bytes(data[16:48]) if first == 6 else None
        self._ends = header[first:].astype(np.int64)
        if not 1 <= self.vocab_size <= 2 ** (8 * itemsize) or (np.diff(self._ends, prepend=0) < 1).any():
            raise InvalidInput("path", "an .ends file whose numbers rise", ends_file)
        dtype = np.dtype(f"u{itemsize}")
        wanted, size = int(self._ends[-1]) * itemsize, self.path.stat().st_size
        if size != wanted:
            raise InvalidInput("path", f"a token file of {wanted} bytes", f"{size} bytes in {self.path}")
        self._tokens = np.memmap(self.path, dtype=dtype, mode="r")

    def __len__(self) -> int:
        """How many documents."""
        return len(self._ends)

    def __getitem__(self, document: int) -> Tensor:
        """The ids of a document, int64 [N]."""
        if not 0 <= document < len(self):
            raise IndexError(document)
        ids = self._span(document).astype(np.int64)
        if ids.max() >= self.vocab_size:
            raise InvalidInput("path", f"a token file with ids below {self.vocab_size}", f"{ids.max()} in {self.path}")
        return torch.from_numpy(ids)

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each document, int64 [documents]."""
        return np.diff(self._ends, prepend=0)

    def digest(self) -> str:
        """A fingerprint of the documents' lengths and the vocabulary."""
        return hashlib.sha256(self._ends.tobytes() + str(self.vocab_size).encode()).hexdigest()[:16]

    def split(self, held_out: float = 0.1) -> tuple[Documents, Documents]:
        """(training documents, held-out documents), as views of this file.

        A document's side depends on its tokens alone: adding documents moves no other, and the copies of one document
        are all on one side. Reads the file once.

        Args:
            held_out: the expected share of held-out documents, in (0, 1).

        Raises:
            InvalidInput: a share out of range, or a side without a document.
        """
        digests = (hashlib.sha256(self._span(document).tobytes()).digest() for document in range(len(self)))
        is_held_out = held_out_sides(digests, held_out, "documents")
        return _Subset(self, np.flatnonzero(~is_held_out)), _Subset(self, np.flatnonzero(is_held_out))

    def _span(self, document: int) -> np.ndarray:
        start = int(self._ends[document - 1]) if document else 0
        return self._tokens[start : int(self._ends[document])]


class _Subset:
    """Some documents of a token file."""

    def __init__(self, file: TokenFile, chosen: np.ndarray) -> None:
        self.vocab_size = file.vocab_size
        self._file = file
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, document: int) -> Tensor:
        if not 0 <= document < len(self):
            raise IndexError(document)
        return self._file[int(self._chosen[document])]

    @property
    def lengths(self) -> np.ndarray:
        return self._file.lengths[self._chosen]

    def digest(self) -> str:
        return hashlib.sha256(self._file.digest().encode() + self._chosen.tobytes()).hexdigest()[:16]


def pack(documents: Sequence[Tensor]) -> dict[str, Tensor]:
    """Documents as the arguments of `Decoder.loss`: each predicts its own next tokens, and sees nothing of the others.

    Args:
        documents: int64 [N_i] each, at least one token; one of a single token has nothing to predict and is left out.

    Returns:
        tokens and targets, int64 [T]; cu_seqlens, int32 [documents + 1].

    Raises:
        InvalidInput: an empty document, or none with two tokens.
    """
    for document in documents:
        if document.dim() != 1 or not len(document) or document.dtype != torch.int64:
            got = f"{document.dtype} of shape {tuple(document.shape)}"
            raise InvalidInput("documents", "int64 tensors [N] of at least one token", got)
    documents = [document for document in documents if len(document) > 1]
    if not documents:
        raise InvalidInput("documents", "at least one of two tokens", "none")
    lengths = torch.tensor([0, *(len(document) - 1 for document in documents)], device="cpu")
    return {
        "tokens": torch.cat([document[:-1] for document in documents]),
        "targets": torch.cat([document[1:] for document in documents]),
        "cu_seqlens": lengths.cumsum(0).to(torch.int32),
    }


class PackedDocuments:
    """Training batches of whole documents, packed up to a number of tokens; long ones are cut to windows.

    Every batch has the same number of tokens: the last document is cut to fit. Documents are drawn by their length, so
    that every token is as likely as any other. The batch of a step hangs on the seed and the step alone.

    Args:
        documents: where the text is.
        tokens: T, tokens a batch, at least 2.
        longest: the most tokens of a document, that is, how far any token looks back; T by default.
        seed: of what is drawn.

    Raises:
        InvalidInput: no document has two tokens.
    """

    def __init__(self, documents: Documents, *, tokens: int, longest: int | None = None, seed: int = 0) -> None:
        longest = tokens if longest is None else longest
        for name, value in (("tokens", tokens), ("longest", longest)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 2:
                raise InvalidInput(name, "an int >= 2", repr(value))
        lengths = documents.lengths
        self._usable = np.flatnonzero(lengths > 1)
        if not len(self._usable):
            raise InvalidInput("documents", "at least one of two tokens", f"{len(documents)} of one")
        self._cumulative = np.cumsum(lengths[self._usable])
        self.documents = documents
        self.tokens = tokens
        self.longest = min(longest, tokens)
        self.seed = seed

    def batch(self, step: int) -> dict[str, Tensor]:
        """What `pack` returns, of T tokens."""
        rng = np.random.default_rng([self.seed, step])
        chosen: list[Tensor] = []
        room = self.tokens
        while room:
            place = rng.integers(self._cumulative[-1])
            document = self.documents[int(self._usable[np.searchsorted(self._cumulative, place, side="right")])]
            most = min(room, self.longest)
            if len(document) > most + 1:
                start = int(rng.integers(len(document) - most))
                document = document[start : start + most + 1]
            chosen.append(document)
            room -= len(document) - 1
        return pack(chosen)

    def describe(self) -> dict[str, Any]:
        """What decides the batches, in plain Python values."""
        settings = {"tokens": self.tokens, "longest": self.longest, "seed": self.seed}
        return {**settings, "documents": self.documents.digest()}


def _ends_file(path: Path) -> Path:
    return path.with_name(path.name + ".ends")
