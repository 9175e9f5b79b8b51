"""The files of a sharded checkpoint, those of torch.distributed.checkpoint: written whole, read with care.

A save writes new files next to the older ones, replaces `.metadata`, which names them, and then removes the older ones:
whatever ends a save, the folder holds a whole checkpoint. What is read may be damaged or hostile: metadata are pickled,
so nothing but the classes of a checkpoint is loaded, and files outside of the folder are refused.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from longattn.errors import InvalidInput

__all__ = ["Planner", "Reader", "Writer", "check_state"]

_METADATA = ".metadata"
_DATA = ".distcp"
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
}
_EXPECTED = "a complete folder that a training wrote"


class _Files(FileSystem):
    """Files of which the metadata are never missing: `rename` replaces them."""

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        os.replace(path, new_path)

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        if Path(path).name != _METADATA:
            super().rm_file(path)


class Writer(FileSystemWriter):
    """Writes a checkpoint next to the older one in the folder, which it then replaces."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, single_file_per_rank=True, overwrite=True)
        self.fs = _Files()

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        tag = uuid.uuid4().hex[:12]
        return [
            dataclasses.replace(
                plan, storage_data=dataclasses.replace(plan.storage_data, prefix=f"__{tag}{plan.storage_data.prefix}")
            )
            for plan in super().prepare_global_plan(plans)
        ]

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        kept = {info.relative_path for info in (metadata.storage_data or {}).values()}
        for file in Path(self.path).glob(f"*{_DATA}"):
            if file.name not in kept:
                file.unlink(missing_ok=True)


class Reader(FileSystemReader):
    """Reads a checkpoint without running what its files say."""

    def read_metadata(self, *arguments: Any, **keywords: Any) -> Metadata:
        path = Path(self.path) / _METADATA
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
            _check_metadata(metadata, Path(self.path))
        except InvalidInput:
            raise
        except Exception as error:  # whatever damaged pickles lead to
            raise InvalidInput("checkpoint", _EXPECTED, f"{path}: {type(error).__name__}: {error}") from error
        if getattr(metadata, "storage_meta", None) is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(DefaultLoadPlanner):
    """Loads plain values as such, never code."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        loaded = torch.load(value, weights_only=True)
        plain = io.BytesIO()
        torch.save(loaded, plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def check_state(metadata: Metadata, state: Mapping[str, Any]) -> None:
    """Compare what a checkpoint holds with the state that it is for, before any of it is read.

    Args:
        metadata: as `Reader` reads it.
        state: tensors and other values by their names in the checkpoint.

    Raises:
        InvalidInput: missing or unexpected values, or tensors of another shape or dtype.
    """
    problems = [f"unexpected {name}" for name in sorted(metadata.state_dict_metadata.keys() - state.keys())]
    for name, ours in state.items():
        theirs = metadata.state_dict_metadata.get(name)
        if theirs is None:
            problems.append(f"missing {name}")
        elif isinstance(ours, torch.Tensor) != isinstance(theirs, TensorStorageMetadata):
            problems.append(f"{name} that is a {type(theirs).__name__}")
        elif isinstance(theirs, TensorStorageMetadata):
            if theirs.size != ours.shape:
                problems.append(f"{name} of shape {tuple(theirs.size)} for {tuple(ours.shape)}")
            elif theirs.properties.dtype != ours.dtype:
                problems.append(f"{name} of {theirs.properties.dtype} for {ours.dtype}")
    if problems:
        expected = "the weights, optimiser's state and settings of this training"
        raise InvalidInput("checkpoint", expected, "; ".join(problems))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout)):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint")


def _check_metadata(metadata: Any, folder: Path) -> None:
    """Raise InvalidInput unless all tensors have their chunks, in files that are in the folder."""
    if not isinstance(metadata, Metadata):
        raise InvalidInput("checkpoint", _EXPECTED, f"{folder}: metadata of {type(metadata).__name__}")
    if not isinstance(metadata.state_dict_metadata, dict) or not isinstance(metadata.storage_data, dict):
        raise InvalidInput("checkpoint", _EXPECTED, f"{folder}: metadata without tensors")
    sizes: dict[str, int] = {}
    for index, info in metadata.storage_data.items():
        name = info.relative_path
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise InvalidInput("checkpoint", f"{_EXPECTED}, with files in it alone", f"{name!r} in {folder}")
        if name not in sizes:
            sizes[name] = (folder / name).stat().st_size if (folder / name).is_file() else -1
        numbers = (info.offset, info.length)
        if any(type(number) is not int or number < 0 for number in numbers) or sum(numbers) > sizes[name]:
            raise InvalidInput("checkpoint", _EXPECTED, f"{folder} without the part {index.fqn} of {name}")
    stored = {(index.fqn, None if index.offset is None else tuple(index.offset)) for index in metadata.storage_data}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            wanted: Iterable[tuple[str, Any]] = [(name, None)]
        elif isinstance(entry, TensorStorageMetadata):
            wanted = [(name, tuple(chunk.offsets)) for chunk in entry.chunks]
            _check_chunks(name, entry, folder)
        else:
            raise InvalidInput("checkpoint", _EXPECTED, f"{folder}: {name} is a {type(entry).__name__}")
        for part in wanted:
            if part not in stored and (part[0], None) not in stored:
                raise InvalidInput("checkpoint", _EXPECTED, f"{folder} without a part of {name}")


def _check_chunks(name: str, entry: TensorStorageMetadata, folder: Path) -> None:
    """Raise InvalidInput unless the chunks of a tensor lie within it and hold as many numbers."""
    total = 0
    for chunk in entry.chunks:
        if len(chunk.offsets) != len(entry.size) or len(chunk.sizes) != len(entry.size):
            raise InvalidInput("checkpoint", _EXPECTED, f"{folder}: chunks of {name} with other dimensions")
        for start, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True):
            if start < 0 or size < 0 or start + size > whole:
                raise InvalidInput("checkpoint", _EXPECTED, f"{folder}: chunks of {name} outside of it")
        total += chunk.sizes.numel()
    if total != entry.size.numel():
        raise InvalidInput("checkpoint", _EXPECTED, f"{folder}: chunks of {name} with {total} numbers")
