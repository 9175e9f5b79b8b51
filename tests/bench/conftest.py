"""The scripts of benchmarks/, which are no package of longattn's."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@contextmanager
def _script(name: str) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", _FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def targets() -> Iterator[Any]:
    with _script("targets") as module:
        yield module


@pytest.fixture(scope="module")
def gpu_check() -> Iterator[Any]:
    with _script("gpu_check") as module:
        yield module


@pytest.fixture(scope="module")
def extension() -> Iterator[Any]:
    with _script("extension") as module:
        yield module
