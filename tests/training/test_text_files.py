"""Which files are texts, how they are decoded, and what is held out."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from longattn import InvalidInput
from longattn.training import text_files
from longattn.training.data import held_out_sides, split_files
from longattn.training.text_files import check_same_texts, find_texts, read_json_lines, read_pieces, read_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text {name}")
    return tmp_path


def names(found: Any) -> list[str]:
    return [path.name for path in found]


def test_binary_files_and_what_commands_wrote_are_left_out_and_counted(folder: Path) -> None:
    (folder / "zeros.bin").write_bytes(b"text" * 2047 + b"\0")
    (folder / "late.txt").write_bytes(b"text" * 2048 + b"\0")  # the NUL is past the bytes that decide
    safetensors.torch.save_file({"x": torch.zeros(3)}, folder / "model")
    for ending in (".json", ".tokens", ".tokens.ends", ".training.json"):
        (folder / f"model{ending}").write_text("anything")
    (folder / "orphan.json").write_text('{"purpose": "causal", "tokenizer": null, "labels": []}')
    (folder / "tokenizer.json").write_text(
        '{\n "version": "1.0",\n "truncation": null, "padding": null, "added_tokens": []}'
    )
    (folder / "data.json").write_text('{"version": "1.0"}')
    found = find_texts([folder])
    assert names(found.files) == ["a.txt", "b.txt", "data.json", "late.txt"]
    assert sorted(names(found.left_out)) == sorted(
        ["zeros.bin", "model", "model.json", "model.tokens", "model.tokens.ends", "model.training.json"]
        + ["orphan.json", "tokenizer.json"]
    )
    warning = found.warning()
    assert warning is not None and warning.startswith("8 files are not text") and "3 more" in warning
    assert find_texts([folder / "a.txt"]).warning() is None


def test_what_a_command_writes_and_reads_is_not_its_text(folder: Path) -> None:
    out = folder / "b.txt"
    for path in (folder / "b.txt.json", folder / "b.txt.training", folder / ".b.txt.7.tmp", folder / ".b.txt.lock"):
        path.write_text("x")
    (folder / "results").mkdir()
    (folder / "results" / "report.md").write_text("x")
    assert names(find_texts([folder / "a.txt", folder], out=out).files) == ["a.txt", "report.md"]
    assert names(find_texts([folder], "*.txt", inputs=[folder / "a.txt"]).files) == ["b.txt"]
    assert "report.md" not in names(find_texts([folder], out=folder / "results").files)
    with pytest.raises(InvalidInput, match="not what this command writes"):
        find_texts([out], out=out)


@pytest.mark.parametrize("name", ["zeros.bin", "gone", "empty"])
def test_named_files_that_are_no_texts_are_refused(folder: Path, name: str) -> None:
    (folder / "zeros.bin").write_bytes(b"ab\0")
    (folder / "empty").mkdir()
    with pytest.raises(
        InvalidInput, match={"zeros.bin": "byte 2 is NUL", "gone": "that exist"}.get(name, "at least one")
    ):
        find_texts([folder / name])


@pytest.mark.parametrize("pattern", ["", "/etc/*", "../*"])
def test_patterns_that_leave_the_folder_are_refused(folder: Path, pattern: str) -> None:
    with pytest.raises(InvalidInput, match="files"):
        find_texts([folder], pattern)


@pytest.mark.parametrize("before", [0, 5, 4095, 4096, 10_000])
def test_what_is_not_utf8_is_named_with_its_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    monkeypatch.setattr(text_files, "_BLOCK", 4096)
    path = tmp_path / "latin.txt"
    path.write_bytes("é".encode() * (before // 2) + b"a" * (before % 2) + "é".encode("latin-1") + b"nd")
    for read in (read_text, lambda path: list(read_pieces(path, 1000)), lambda path: list(read_json_lines(path))):
        with pytest.raises(InvalidInput, match=rf"latin\.txt: .* byte 0xe9 at offset {before}$"):
            read(path)
    path.write_bytes(b"ab\xc3")
    with pytest.raises(InvalidInput, match="byte 0xc3 at offset 2"):
        read_text(path)


def test_line_ends_are_those_of_python_in_texts_and_newline_alone_in_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one\r\ntwo\rthree\n")
    assert read_text(path) == "".join(read_pieces(path, 3)) == "one\ntwo\nthree\n"
    separators = "\u2028\u2029\x85\x1c"
    path.write_text(f'\ufeff"a{separators[:3]}b"\r\n\n"c"\n', encoding="utf-8", newline="")
    assert [(number, value) for number, _, value in read_json_lines(path)] == [(1, f"a{separators[:3]}b"), (3, "c")]


@pytest.mark.parametrize("line", ["{", "[" * 10_000, '"\\ud800"', "1" * 5000])
def test_lines_that_are_not_json_are_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a").write_text(f'"fine"\n{line}\n')
    with pytest.raises(InvalidInput, match="a, line 2"):
        list(read_json_lines(tmp_path / "a"))


def test_other_texts_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = find_texts([folder]).fingerprints()
    assert before[str(folder / "a.txt")] == hashlib.sha256(b"text a.txt").hexdigest()[:16]
    monkeypatch.chdir(folder)
    check_same_texts("--resume", before, find_texts([Path()]).fingerprints())  # the same files from another folder
    (folder / "a.txt").write_text("TEXT a.txt")
    (folder / "b.txt").rename(folder / "c.txt")
    with pytest.raises(InvalidInput, match=r"1 new: .*c\.txt; 1 gone: .*b\.txt; 1 changed: .*a\.txt"):
        check_same_texts("--resume", before, find_texts([folder]).fingerprints())


def test_a_side_depends_on_the_digest_alone() -> None:
    digests = [hashlib.sha256(bytes([n])).digest() for n in range(200)]
    sides = held_out_sides(digests, 0.25, "files")
    assert 30 < sides.sum() < 70
    assert (held_out_sides(digests[100:], 0.25, "files") == sides[100:]).all()
    with pytest.raises(InvalidInput, match=r"both sides, got 0\.5 of 1 files: [01] for training, [01] held out"):
        held_out_sides(digests[:1], 0.5, "files")
    with pytest.raises(InvalidInput, match="of 0 files"):
        split_files([], 0.5)
    for share in (0.0, 1.0, float("nan"), True):
        with pytest.raises(InvalidInput, match="held_out"):
            held_out_sides(digests, share, "files")
