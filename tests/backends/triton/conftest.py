"""Tests of the Triton kernels, in the interpreter: `make test` runs this folder by itself, with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Triton decides how it runs when kernels are defined: one process has either the interpreter or the compiler.
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1", Path(__file__)
