"""Text files: which files of a user are texts, what identifies them, and how they are decoded.

Every text is UTF-8. A file that is not is an error that names the file and the byte, in every command; training on
bytes decodes nothing and takes any encoding.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longattn.errors import InvalidInput
from longattn.training.data import find_files

__all__ = ["TextFiles", "check_same_texts", "find_texts", "outputs", "read_json_lines", "read_pieces", "read_text"]

_SNIFFED = 8192  # bytes that decide whether a file is binary
_BLOCK = 1 << 20
_NAMED = 5  # files that a message names
_BESIDE = (".json", ".tokens", ".tokens.ends", ".training", ".training.json")
_OF_TOKENIZER = ("version", "truncation", "padding", "added_tokens")
_OF_CARD = ("purpose", "tokenizer")


def outputs(out: Path) -> tuple[Path, ...]:
    """Return every path that a command with this --out may write, `out` first."""
    return (out, *(out.with_name(out.name + ending) for ending in _BESIDE))


@dataclass(frozen=True)
class TextFiles:
    """The texts that a command reads.

    Attributes:
        files: sorted, each once.
        left_out: files found below a folder that are no texts: binary files, and what other commands wrote.
    """

    files: tuple[Path, ...]
    left_out: tuple[Path, ...] = ()

    def warning(self) -> str | None:
        """Return a line that counts and names the files that were left out; None if there are none."""
        if not self.left_out:
            return None
        count = len(self.left_out)
        return f"{count} {'file is' if count == 1 else 'files are'} not text and left out: {_listed(self.left_out)}"

    def fingerprints(self) -> dict[str, str]:
        """Return 16 hexadecimal digits of the SHA-256 of each file's contents, by path. This reads every file.

        Raises:
            InvalidInput: a file cannot be read.
        """
        return {str(file): _digest(file) for file in self.files}


def find_texts(
    paths: Iterable[Path],
    pattern: str = "*",
    *,
    out: Path | None = None,
    inputs: Iterable[Path] = (),
    argument: str = "PATHS",
) -> TextFiles:
    """Find the texts among `paths` and below its folders, and open each of them once.

    A file is binary if its first 8,192 bytes hold a NUL, as in every safetensors file. Files found below a folder are
    left out if they are binary, or written by `longattn` (checkpoints and what is beside them, tokenizers).

    Args:
        paths: files and folders.
        pattern: which names to take below folders.
        out: the path that the command writes. It and the files beside it are never texts.
        inputs: other files that the command reads, such as its tokenizer. They are not texts either.
        argument: the name of `paths` for errors.

    Raises:
        InvalidInput: a path does not exist, cannot be read, is named and binary or written by this command; or no text
            is found.
    """
    paths = [Path(path) for path in paths]
    named = {path for path in paths if path.is_file()}
    ours = {path.resolve() for path in outputs(out)} if out is not None else set()
    used = {Path(path).resolve() for path in inputs}

    def is_ours(path: Path) -> bool:
        return not ours.isdisjoint((path, *path.parents))

    files, left_out = [], []
    for file in find_files(paths, pattern):
        head = _head(file)
        if file in named:
            if is_ours(file.resolve()):
                raise InvalidInput(argument, "texts, not what this command writes", file)
            if b"\0" in head:
                raise InvalidInput(argument, "text files", f"{file}, a binary file (byte {head.index(0)} is NUL)")
            files.append(file)
        elif is_ours(file.resolve()) or file.resolve() in used:
            continue
        elif b"\0" in head or _is_written(file, head):
            left_out.append(file)
        else:
            files.append(file)
    if not files:
        got = f"{len(left_out)} other files: {_listed(left_out)}" if left_out else "none"
        raise InvalidInput(argument, "at least one text file", got)
    return TextFiles(tuple(files), tuple(left_out))


def check_same_texts(argument: str, before: dict[str, str], now: dict[str, str]) -> None:
    """Compare two results of `TextFiles.fingerprints`; the same files may have been named from another folder.

    Raises:
        InvalidInput: other texts. It names the files that are new, gone and changed.
    """

    def contents(files: dict[str, str]) -> list[tuple[str, str]]:
        return sorted((Path(name).name, digest) for name, digest in files.items())

    if contents(before) == contents(now):
        return
    changes = {
        "new": sorted(now.keys() - before.keys()),
        "gone": sorted(before.keys() - now.keys()),
        "changed": sorted(name for name in before.keys() & now.keys() if before[name] != now[name]),
    }
    folders = {Path(name).parent for name in (*before, *now)}
    is_comparable = len({folder.is_absolute() for folder in folders}) == 1
    root = Path(os.path.commonpath(folders)) if is_comparable else Path()
    got = "; ".join(
        f"{len(names)} {what}: {_listed([os.path.relpath(name, root) for name in names])}"
        for what, names in changes.items()
        if names
    )
    raise InvalidInput(argument, "the texts that it was started with", got)


def read_text(path: Path, *, any_line_end: bool = True) -> str:
    """Read a text in UTF-8.

    Args:
        path: the file.
        any_line_end: turn "\\r\\n" and "\\r" into "\\n".

    Raises:
        InvalidInput: it is not UTF-8, or cannot be read.
    """
    try:
        with path.open(encoding="utf-8", newline=None if any_line_end else "") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def read_pieces(path: Path, characters: int) -> Iterator[str]:
    """Yield a text in UTF-8 in pieces of so many characters, with "\\n" as the only line end.

    Raises:
        InvalidInput: as `read_text`.
    """
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(characters):
                yield piece
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def read_json_lines(path: Path) -> Iterator[tuple[int, str, object]]:
    """Yield (number, line, value) of each line that is not empty. Lines end at "\\n" only, as JSON Lines has it.

    Raises:
        InvalidInput: as `read_text`; or a line that is not JSON, named by its number.
    """
    text = read_text(path, any_line_end=False).removeprefix("\ufeff")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(where, "a JSON object", str(error)) from error
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(where, "text that UTF-8 can say", f"a lone surrogate, {line[:80]}") from error
        yield number, line, value


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(_SNIFFED)
    except OSError as error:
        raise _unreadable(file, error) from error


def _is_written(file: Path, head: bytes) -> bool:
    """Whether `longattn` wrote it: beside a checkpoint, a token file, or JSON that starts as a card or a tokenizer."""
    for ending in _BESIDE:
        owner = file.with_name(file.name.removesuffix(ending))
        if file.name.endswith(ending) and owner != file and owner.is_file() and b"\0" in _head(owner)[:9]:
            return True
    if file.with_name(file.name + ".ends").is_file():
        return True
    if not head.lstrip().startswith(b"{"):
        return False
    start = head[:1024]
    return any(all(f'"{key}"'.encode() in start for key in keys) for keys in (_OF_TOKENIZER, _OF_CARD))


def _digest(file: Path) -> str:
    found = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK):
                found.update(block)
    except OSError as error:
        raise _unreadable(file, error) from error
    return found.hexdigest()[:16]


def _not_utf8(path: Path) -> InvalidInput:
    """Find the first byte of a file that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                got = f"byte 0x{error.object[error.start]:02x} at offset {done - pending + error.start}"
                return InvalidInput(str(path), "a text in UTF-8", got)
            done += len(block)
            if not block:
                return InvalidInput(str(path), "a text in UTF-8", "a file that changed while it was read")


def _unreadable(path: Path, error: OSError) -> InvalidInput:
    return InvalidInput(str(path), "a file that can be read", error.strerror or str(error))


def _listed(names: Sequence[object]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(str, names[:_NAMED])) + more
