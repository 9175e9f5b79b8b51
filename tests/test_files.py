"""Files that are written whole or not at all, and the lock on what a command writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longattn.errors import InvalidInput
from longattn.files import locked, new_folder, remove_temporaries, replaced, write_text


def test_a_failed_write_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.txt"
    write_text(path, "old\r\n")
    with pytest.raises(RuntimeError), replaced(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_bytes() == b"old\r\n"
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_of_the_umask(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        with replaced(tmp_path / "a") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "a")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "a").read_text() == "x"


def test_temporary_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    own, other = tmp_path / ".a[1].7.tmp", tmp_path / ".a[1]b.7.tmp"
    for path in (own, other):
        path.touch()
    remove_temporaries(tmp_path / "a[1]")
    assert not own.exists()
    assert other.exists()


_HOLD = """
import sys
from longattn.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InvalidInput, match="--out"), locked(path):
        pass
    holder.kill()
    holder.communicate()
    with locked(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a" / "m") as temporary:
        (temporary / "weights").touch()
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    with new_folder(tmp_path / "a" / "m") as temporary:
        (temporary / "weights").write_text("x")
    assert [str(path.relative_to(tmp_path)) for path in (tmp_path / "a").rglob("*")] == ["a/m", "a/m/weights"]


def test_temporary_folders_and_files_in_a_folder_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / ".out.7.tmp").mkdir()
    out.mkdir()
    for name in (".results.json.7.tmp", "results.json", ".notes.tmp"):
        (out / name).touch()
    remove_temporaries(out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".notes.tmp", "out", "results.json"]
