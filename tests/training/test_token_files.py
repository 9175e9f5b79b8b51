"""Token files: what identifies them, those of version 0.1.0, and damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longattn import InvalidInput
from longattn.training import TokenFile, write_token_file

TEXTS = ["one", "", "three"]


def write(path: Path, **options: bytes) -> TokenFile:
    return write_token_file(path, TEXTS, lambda text: list(text.encode()), 256, **options)


def test_the_source_comes_back(tmp_path: Path) -> None:
    source = bytes(range(32))
    file = write(tmp_path / "t", source=source)
    assert file.source == TokenFile(tmp_path / "t").source == source
    assert write(tmp_path / "u").source is None
    for one, other in zip(file, TokenFile(tmp_path / "u"), strict=True):
        assert one.tolist() == other.tolist()
    with pytest.raises(InvalidInput, match="32 bytes"):
        write(tmp_path / "v", source=b"short")


def test_files_of_version_0_1_0_are_read(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"onethree")
    (tmp_path / "t.ends").write_bytes(np.array([256, 1, 3, 8], dtype=np.uint64).tobytes())
    assert [bytes(ids.tolist()) for ids in TokenFile(tmp_path / "t")] == [b"one", b"three"]
    assert TokenFile(tmp_path / "t").source is None
    write(tmp_path / "u")
    assert (tmp_path / "u.ends").read_bytes() == (tmp_path / "t.ends").read_bytes()


@pytest.mark.parametrize(
    "numbers",
    [
        [],
        [256, 1],
        [256, 3, 3, 8],
        [256, 1 + (1 << 9), 3, 8],
        [256, 1 + (1 << 8), 3, 8],
        [0, 1, 3, 8],
        [257, 1, 3, 8],
        [256, 1, 8, 3, 8],
        [256, 1, 3, 3, 8],
        [256, 1, 2**63, 8],
        [256, 1, 2**64 - 5, 8],
        [256, 1, 3, 9],
    ],
)
def test_damaged_ends_are_refused(tmp_path: Path, numbers: list[int]) -> None:
    write(tmp_path / "t")
    (tmp_path / "t.ends").write_bytes(np.array(numbers, dtype=np.uint64).tobytes())
    with pytest.raises(InvalidInput, match="path"):
        TokenFile(tmp_path / "t")


def test_ids_past_the_vocabulary_are_refused(tmp_path: Path) -> None:
    write_token_file(tmp_path / "t", TEXTS, lambda text: list(text.encode()), 200)
    data = bytearray((tmp_path / "t").read_bytes())
    data[4] = 200
    (tmp_path / "t").write_bytes(data)
    file = TokenFile(tmp_path / "t")
    assert file[0].tolist() == list(b"one")
    with pytest.raises(InvalidInput, match="ids below 200, got 200"):
        file[1]


def test_a_failed_write_leaves_the_older_file(tmp_path: Path) -> None:
    write(tmp_path / "t", source=bytes(32))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(text: str) -> list[int]:
        if text == "three":
            raise OSError("no space left")
        return [1]

    with pytest.raises(OSError, match="no space"):
        write_token_file(tmp_path / "t", TEXTS, fail, 256)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
