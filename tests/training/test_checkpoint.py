"""Checkpoints: whole or not at all, and a clear word about any that is not whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from longattn import InvalidInput
from longattn.models import Decoder, TransformerConfig
from longattn.scaling import YaRN
from longattn.training import Checkpoint, load_checkpoint, load_model, save_checkpoint
from longattn.training.checkpoint import saved_steps

CONFIG = TransformerConfig(dim=32, layers=2, heads=2, max_length=16, rope_scaling=YaRN(4, 16))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Decoder]:
    model = Decoder(CONFIG)
    path = tmp_path / "folder" / "model.safetensors"
    save_checkpoint(path, Checkpoint(CONFIG, model.state_dict(), progress={"step": 3}, settings={"a": [1]}))
    return path, model


def test_everything_comes_back(saved: tuple[Path, Decoder]) -> None:
    path, model = saved
    checkpoint = load_checkpoint(path)
    assert (checkpoint.config, checkpoint.progress, checkpoint.settings) == (CONFIG, {"step": 3}, {"a": [1]})
    assert checkpoint.optimizer == {} and checkpoint.rng is None
    tokens = torch.randint(0, 256, (1, 20))
    torch.testing.assert_close(load_model(path)(tokens), model(tokens), rtol=0, atol=0)


def test_only_the_file_is_left(saved: tuple[Path, Decoder]) -> None:
    path, _ = saved
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "os.replace"])
def test_a_save_that_fails_leaves_the_old_file(
    saved: tuple[Path, Decoder], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path, model = saved
    before = path.read_bytes()

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, fail)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, Checkpoint(CONFIG, model.state_dict(), progress={"step": 4}))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file_is_told(saved: tuple[Path, Decoder], kept: int) -> None:
    path, _ = saved
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InvalidInput, match=r"complete safetensors file.*model\.safetensors"):
        load_checkpoint(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="a file that exists"):
        load_checkpoint(tmp_path / "none.safetensors")


@pytest.mark.parametrize("header", [None, {"other": "{}"}, {"longattn": json.dumps({"format": 99})}])
def test_files_of_others_are_told(tmp_path: Path, header: dict[str, str] | None) -> None:
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, metadata=header)
    with pytest.raises(InvalidInput, match="saved by longattn"):
        load_checkpoint(path)


def test_weights_that_do_not_fit_are_named(saved: tuple[Path, Decoder]) -> None:
    path, model = saved
    weights = model.state_dict()
    weights["extra"] = weights.pop("norm.weight")
    weights["embedding.weight"] = torch.zeros(3, 32)
    save_checkpoint(path, Checkpoint(CONFIG, weights))
    with pytest.raises(InvalidInput) as error:
        load_model(path)
    for part in ("missing norm.weight", "unexpected extra", "embedding.weight of shape (3, 32) for (256, 32)"):
        assert part in str(error.value)


HEADER: dict[str, Any] = {"format": 1, "config": CONFIG.to_dict(), "progress": {}, "settings": {}}


@pytest.mark.parametrize(
    "header",
    [
        "{nope",
        "[" * 100_000,
        "NaN",
        "1" * 5000,
        "[]",
        json.dumps({"format": 1}),
        json.dumps({**HEADER, "format": True}),
        *(json.dumps({key: value for key, value in HEADER.items() if key != name}) for name in HEADER),
        *(json.dumps({**HEADER, name: value}) for name in HEADER for value in ([], "x", None)),
    ],
)
def test_damaged_metadata_is_told(tmp_path: Path, header: str) -> None:
    path = tmp_path / "damaged.safetensors"
    tensors = {f"model.{name}": weight.contiguous() for name, weight in Decoder(CONFIG).state_dict().items()}
    safetensors.torch.save_file(tensors, path, metadata={"longattn": header})
    assert saved_steps(path) is None
    with pytest.raises(InvalidInput, match="saved by longattn") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": "32"},
        {"dim": float("nan")},
        {"layers": 10**9},
        {"layers": 60_000},
        {"head_dim": 10**15},
        {"vocab_size": 60_000, "dim": 2**15, "heads": 2},
        {"max_length": 10**400},
        {"pattern": {}},
        {"rope_base": []},
        {"rope_scaling": [1]},
        {"rope_scaling": {"type": "yarn", "factor": float("inf")}},
        {"methods": 5},
        {"methods": [None]},
        {"architecture": ["decoder"]},
        {"unknown": 1},
    ],
)
def test_configs_that_are_not_of_the_weights_are_told(saved: tuple[Path, Decoder], changes: dict[str, Any]) -> None:
    path, model = saved
    header = {**HEADER, "config": {**CONFIG.to_dict(), **changes}}
    tensors = {f"model.{name}": weight.contiguous() for name, weight in model.state_dict().items()}
    safetensors.torch.save_file(tensors, path, metadata={"longattn": json.dumps(header)})
    with pytest.raises(InvalidInput):
        load_model(path)


@pytest.mark.parametrize("broken", ["nan", "inf", "int", "complex"])
def test_weights_that_cannot_be_used_are_told(saved: tuple[Path, Decoder], broken: str) -> None:
    path, model = saved
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    if broken in ("nan", "inf"):
        weights["norm.weight"][3] = float(broken)
    else:
        weights["norm.weight"] = weights["norm.weight"].to(torch.int32 if broken == "int" else torch.complex64)
    save_checkpoint(path, Checkpoint(CONFIG, weights))
    with pytest.raises(InvalidInput, match=r"norm\.weight (is not finite|of torch)"):
        load_model(path)


def test_other_tensors_are_told(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, metadata={"longattn": json.dumps(HEADER)})
    with pytest.raises(InvalidInput, match=r"named model\.\*.* x$"):
        load_checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_come_back_in_the_dtype_that_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Decoder(CONFIG).to(dtype).eval()
    save_checkpoint(tmp_path / "m", Checkpoint(CONFIG, model.state_dict()))
    loaded, tokens = load_model(tmp_path / "m"), torch.randint(0, 256, (1, 20))
    assert {weight.dtype for weight in loaded.parameters()} == {dtype}
    torch.testing.assert_close(loaded(tokens), model(tokens), rtol=0, atol=0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_a_full_disk_leaves_the_old_file(saved: tuple[Path, Decoder]) -> None:
    import resource

    path, model = saved
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match="folder"):
            save_checkpoint(path, Checkpoint(CONFIG, model.state_dict(), progress={"step": 4}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
