"""Which files, which side of the split, and windows that are the documents' own bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longattn import InvalidInput
from longattn.training import ByteCorpus, RandomWindows, find_files, split_files, stdlib_files


def write(folder: Path, **texts: bytes) -> list[Path]:
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    return [folder / name for name in texts]


def test_finds_files_below_folders_once_and_sorted(tmp_path: Path) -> None:
    (tmp_path / "b" / ".hidden").mkdir(parents=True)
    for name in ("z.txt", "b/a.txt", "b/c.py", "b/.hidden/d.txt", ".e.txt"):
        (tmp_path / name).write_text("x")
    found = find_files([tmp_path, tmp_path / "b", tmp_path / "z.txt"], "*.txt")
    assert found == [tmp_path / "b" / "a.txt", tmp_path / "z.txt"]
    assert find_files([tmp_path / "b" / "c.py"], "*.txt") == [tmp_path / "b" / "c.py"]
    with pytest.raises(InvalidInput, match="nowhere"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(InvalidInput, match=r"at least one file named \*\.md"):
        find_files([tmp_path], "*.md")


def test_the_standard_library_is_at_hand() -> None:
    files = stdlib_files()
    assert any(file.name == "argparse.py" for file in files)
    assert not any("site-packages" in file.parts or "test" in file.parts for file in files)
    assert sum(file.stat().st_size for file in files) > 5_000_000


def test_split_is_disjoint_complete_and_by_name_alone(tmp_path: Path) -> None:
    files = [tmp_path / "one" / f"{n}.txt" for n in range(300)] + [tmp_path / "two" / "x.txt"]
    training, held_out = split_files(files, 0.1)
    assert sorted(training + held_out) == sorted(files) and not set(training) & set(held_out)
    assert 10 <= len(held_out) <= 60
    assert split_files(files[::-1], 0.1) == (training, held_out)

    fewer = [file for file in files if file.name != "7.txt"]
    assert set(split_files(fewer, 0.1)[1]) == set(held_out) - {tmp_path / "one" / "7.txt"}
    elsewhere = [Path("/elsewhere") / file.relative_to(tmp_path) for file in files]
    assert [file.name for file in split_files(elsewhere, 0.1)[1]] == [file.name for file in held_out]
    assert set(held_out) <= set(split_files(files, 0.3)[1])


@pytest.mark.parametrize(("count", "held_out"), [(0, 0.1), (1, 0.1), (5, 0.0), (5, 1.0)])
def test_a_split_with_an_empty_side_is_refused(count: int, held_out: float) -> None:
    with pytest.raises(InvalidInput):
        split_files([Path(f"/folder/{n}") for n in range(count)], held_out)


def test_reads_bytes_as_tokens(tmp_path: Path) -> None:
    corpus = ByteCorpus(write(tmp_path, a="aé\0".encode(), b=b""))
    assert len(corpus) == 4
    assert corpus.read(0, 1, 3).tolist() == [0xC3, 0xA9, 0]
    with pytest.raises(InvalidInput, match="at least 5 bytes"):
        corpus.read(0, 2, 3)


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="at least one byte"):
        ByteCorpus(write(tmp_path, a=b"", b=b""))
    with pytest.raises(InvalidInput, match="files"):
        ByteCorpus([])


def test_a_file_that_shrinks_is_told(tmp_path: Path) -> None:
    (file,) = write(tmp_path, a=b"0123456789")
    windows = RandomWindows(ByteCorpus([file]), batch_size=1, length=9)
    file.write_bytes(b"01234")
    with pytest.raises(InvalidInput, match="5 bytes in"):
        windows.batch(0)


def test_windows_lie_within_documents_and_reach_every_place(tmp_path: Path) -> None:
    texts = {"a": b"abcdefg", "b": b"12", "c": b"", "d": b"xyz"}
    windows = RandomWindows(ByteCorpus(write(tmp_path, **texts)), batch_size=400, length=2, seed=3)
    seen = [bytes(window.tolist()) for window in windows.batch(0)]
    wanted = {b"abc", b"bcd", b"cde", b"def", b"efg", b"xyz"}
    assert set(seen) == wanted
    assert all(40 <= seen.count(window) <= 100 for window in wanted)


def test_batches_hang_on_seed_and_step_alone(tmp_path: Path) -> None:
    corpus = ByteCorpus(write(tmp_path, a=bytes(range(256))))
    windows = RandomWindows(corpus, batch_size=4, length=8, seed=1)
    first, second = windows.batch(0), windows.batch(1)
    assert first.shape == (4, 9) and first.dtype == torch.int64
    assert torch.equal(RandomWindows(corpus, batch_size=4, length=8, seed=1).batch(1), second)
    assert not torch.equal(first, second)
    assert not torch.equal(RandomWindows(corpus, batch_size=4, length=8, seed=2).batch(1), second)


def test_spread_takes_documents_in_turn(tmp_path: Path) -> None:
    texts = {name: name.encode() * size for name, size in (("a", 50), ("b", 9), ("c", 8), ("d", 7))}
    corpus = ByteCorpus(write(tmp_path, **texts))
    windows = corpus.spread(7, 8, seed=5)
    names = [chr(window[0]) for window in windows]
    assert windows.shape == (7, 8)
    assert sorted(names[:3]) == sorted(names[3:6]) == ["a", "b", "c"]
    assert torch.equal(corpus.spread(7, 8, seed=5), windows)


def test_texts_too_short_are_told(tmp_path: Path) -> None:
    corpus = ByteCorpus(write(tmp_path, a=b"1234", b=b"1"))
    with pytest.raises(InvalidInput, match="at least 6 bytes, got 2 documents of at most 4"):
        RandomWindows(corpus, batch_size=1, length=5)
    with pytest.raises(InvalidInput, match="at least 5 bytes"):
        corpus.spread(1, 5)
    with pytest.raises(InvalidInput, match="batch_size"):
        RandomWindows(corpus, batch_size=0, length=1)
