"""Files and folders that are written whole or not at all, and a lock on the path that a command writes."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longattn.errors import InvalidInput

__all__ = ["locked", "new_folder", "remove_temporaries", "replaced", "temporary_folder", "write_text"]

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield the path of an empty temporary file that takes the place of `path` when the block ends.

    The temporary file is in the same folder, which is created if it is missing. If the block raises, or the process
    ends, `path` keeps its contents. The new file has the mode that the umask gives to new files.

    Args:
        path: the file to write. A symbolic link is followed.

    Raises:
        OSError: the folder or the file cannot be written, for example on a full disk.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # a library that writes the file may have replaced it by one with a mode of its own
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        OSError: as `replaced`.
    """
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder next to `path` that is removed when the block ends.

    Raises:
        OSError: the folder cannot be written.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `path` when the block ends; if the block raises, nothing is left.

    Args:
        path: the folder to write; there is none, or an empty one.

    Raises:
        OSError: the folder cannot be written, or `path` has contents.
    """
    with temporary_folder(path) as temporary:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        os.replace(temporary, os.path.realpath(path))


def remove_temporaries(path: Path) -> None:
    """Remove the temporary files of `path`, and those in it, that killed processes left.

    Call it with the lock of `path` held.
    """
    path = Path(os.path.realpath(path))
    left = [file for file in path.parent.glob(f".{glob.escape(path.name)}.*.tmp") if _TEMPORARY.fullmatch(file.name)]
    if path.is_dir():
        left += [file for file in path.iterdir() if _TEMPORARY.fullmatch(file.name)]
    for file in left:
        if file.is_dir():
            shutil.rmtree(file, ignore_errors=True)
        else:
            file.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, argument: str = "--out") -> Iterator[None]:
    """Hold the lock of `path` while the block runs.

    The lock is on the file `.NAME.lock` in the same folder. It ends with the process, however that ends: a file that a
    killed process left locks nothing. The folder is created if it is missing.

    Args:
        path: the file or folder that the caller writes.
        argument: the name of the caller's argument, for the error.

    Raises:
        InvalidInput: another process holds the lock.
        OSError: the folder cannot be written.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    file = _lock(lock)
    if file is None:
        raise InvalidInput(argument, "a path that no other running command writes", path)
    try:
        yield
    finally:
        if sys.platform != "win32":
            lock.unlink(missing_ok=True)
        os.close(file)


def _lock(lock: Path) -> int | None:
    """Return the descriptor of the locked file, or None if another process has it."""
    if sys.platform == "win32":
        try:
            return os.open(lock, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_TEMPORARY)
        except FileExistsError:
            return None
    import fcntl

    while True:
        file = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), os.stat(lock)):
                return file
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(file)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return None
            raise
        os.close(file)  # its holder removed it between open and flock
