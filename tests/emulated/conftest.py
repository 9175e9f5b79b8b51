"""The CUDA backend on the host emulator. `make emulate` builds it, and runs this folder with LONGATTN_EMULATOR set."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import longattn
from emulator.engine import Engine
from longattn.backends.cuda import native

FOLDER = os.environ.get("LONGATTN_EMULATOR")
if FOLDER is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """The emulated backend; what the emulator reports fails the test."""
    assert FOLDER is not None
    monkeypatch.setattr(native, "found", native.load(Path(FOLDER).resolve() / "_cuda.so"))
    engine = Engine()
    yield engine
    reports = engine.take_reports()
    assert not reports, reports


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are deterministic ones: the oracle has no such keyword."""
    for name in ("attention", "attention_varlen"):
        monkeypatch.setattr(longattn, name, functools.partial(getattr(longattn, name), deterministic=True))
