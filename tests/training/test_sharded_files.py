"""The files of sharded checkpoints: whole whatever ends a save, and read without running what they say."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from longattn import InvalidInput
from longattn.training.sharded_files import Planner, Reader, Writer, check_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


def state(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((3, 2), value)}, "step": int(value), "settings": {"a": [value]}}


def written(folder: Path, value: float) -> Path:
    save(state(value), storage_writer=Writer(folder), no_dist=True)
    return folder


def read(folder: Path) -> dict[str, Any]:
    found = state(0.0)
    load(found, storage_reader=Reader(folder), planner=Planner(), no_dist=True)
    return found


def test_a_save_replaces_the_older_one(tmp_path: Path) -> None:
    first = set(os.listdir(written(tmp_path / "c", 1.0)))
    second = set(os.listdir(written(tmp_path / "c", 2.0)))
    assert len(first) == len(second) == 2 and first & second == {".metadata"}
    found = read(tmp_path / "c")
    assert found["step"] == 2 and found["settings"] == {"a": [2.0]}
    assert torch.equal(found["model"]["w"], torch.full((3, 2), 2.0))


def test_folders_of_version_0_1_0_are_read(tmp_path: Path) -> None:
    save(state(7.0), storage_writer=FileSystemWriter(tmp_path / "c"), no_dist=True)
    assert read(tmp_path / "c")["step"] == 7


@pytest.mark.parametrize("fails", ["write_data", "finish"])
def test_a_save_that_is_cut_short_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    written(tmp_path / "c", 1.0)

    def cut(*arguments: Any, **keywords: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, fails, cut)
        with pytest.raises(CheckpointException):
            written(tmp_path / "c", 2.0)
    assert read(tmp_path / "c")["step"] == 1
    written(tmp_path / "c", 3.0)
    assert read(tmp_path / "c")["step"] == 3 and len(os.listdir(tmp_path / "c")) == 2


class _Runs:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def _chunk(metadata: Metadata, part: str, value: Any) -> None:
    entry: Any = metadata.state_dict_metadata["model.w"]
    setattr(entry.chunks[0], part, value)


def _info(metadata: Metadata, part: str, value: Any) -> None:
    for info in (metadata.storage_data or {}).values():
        setattr(info, part, value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda metadata: _Runs(),
        lambda metadata: {"a": 1},
        lambda metadata: _info(metadata, "relative_path", "../other"),
        lambda metadata: _info(metadata, "relative_path", "gone.distcp"),
        lambda metadata: _info(metadata, "length", 10**9),
        lambda metadata: _info(metadata, "offset", -1),
        lambda metadata: _chunk(metadata, "offsets", torch.Size([1, 0])),
        lambda metadata: _chunk(metadata, "sizes", torch.Size([2, 2])),
        lambda metadata: _chunk(metadata, "sizes", torch.Size([6])),
        lambda metadata: metadata.storage_data.clear(),
        lambda metadata: setattr(metadata, "state_dict_metadata", None),
    ],
)
def test_damaged_metadata_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "c", 1.0) / ".metadata"
    metadata = Reader(tmp_path / "c").read_metadata()
    path.write_bytes(pickle.dumps(damage(metadata) or metadata))
    with pytest.raises(InvalidInput, match="a complete folder"):
        Reader(tmp_path / "c").read_metadata()
    assert not (tmp_path / "ran").exists()
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InvalidInput, match="a complete folder"):
        Reader(tmp_path / "c").read_metadata()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.w", torch.zeros(2, 3), "of shape"),
        ("model.w", torch.zeros(3, 2).double(), "of torch.float32 for torch.float64"),
        ("model.w", 1, "TensorStorageMetadata"),
        ("model.v", torch.zeros(1), "missing model.v"),
        ("model.w", None, "unexpected model.w"),
    ],
)
def test_state_that_does_not_fit_is_refused(tmp_path: Path, name: str, value: Any, message: str) -> None:
    metadata = Reader(written(tmp_path / "c", 1.0)).read_metadata()
    ours = {"model.w": torch.zeros(3, 2), "step": 0, "settings.a": [0.0]}
    check_state(metadata, ours)
    ours[name] = value
    with pytest.raises(InvalidInput, match=message):
        check_state(metadata, {name: value for name, value in ours.items() if value is not None})


def test_values_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save({"step": _Runs()}, storage_writer=Writer(tmp_path / "c"), no_dist=True)
    with pytest.raises(CheckpointException):
        load({"step": 0}, storage_reader=Reader(tmp_path / "c"), planner=Planner(), no_dist=True)
    assert not (tmp_path / "ran").exists()
