"""The two models of examples/passkey.py: what they find, and what each method finds untuned."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from longattn.integrations import extend
from longattn.models import Decoder
from longattn.scaling import NTK, YaRN
from longattn.training import load_model

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "passkey"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "passkey.py"))


@pytest.fixture(scope="module")
def trained() -> Decoder:
    return load_model(FOLDER / "trained.safetensors")


def test_they_are_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 4e6


def test_at_the_trained_length(example: dict[str, Any], trained: Decoder) -> None:
    assert example["right_digits"](trained, 512, prompts=40) >= 0.95


@pytest.mark.parametrize(("length", "prompts", "least"), [(512, 40, 0.95), (2048, 40, 0.95), (4096, 20, 0.95)])
def test_after_tuning(example: dict[str, Any], length: int, prompts: int, least: float) -> None:
    tuned = load_model(FOLDER / "tuned.safetensors")
    assert tuned.config.rope_scaling == YaRN(8, 512)
    assert example["right_digits"](tuned, length, prompts) >= least


def test_the_order_of_methods_untuned_at_four_times(example: dict[str, Any], trained: Decoder) -> None:
    methods = {"none": None, "NTK": NTK(4), "YaRN": YaRN(4, 512)}
    digits = {
        name: example["right_digits"](extend(trained, method) if method else trained, 2048, prompts=40)
        for name, method in methods.items()
    }
    assert digits["YaRN"] >= digits["NTK"] > digits["none"]
