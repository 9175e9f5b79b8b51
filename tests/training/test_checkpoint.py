"""Checkpoints: whole or not at all, and a clear word about any that is not whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from longattn import InvalidInput
from longattn.models import Decoder, TransformerConfig
from longattn.scaling import YaRN
from longattn.training import Checkpoint, load_checkpoint, load_model, save_checkpoint

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
