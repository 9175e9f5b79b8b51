"""The examples run, at reduced size."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_sliding_window(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "sliding_window.py"))["main"](4096)
    assert "   4096 tokens" in capsys.readouterr().out


def test_existing_model(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "existing_model.py"))["main"]()
    out = capsys.readouterr().out
    assert float(out.split("swap: ")[1].split()[0]) < 1e-5
    assert "(1, 8192, 64)" in out
