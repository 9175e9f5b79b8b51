"""The examples of docs/models.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=["build", "heads", "training"])
def test_example_runs(example: str) -> None:
    exec(compile(example, str(PAGE), "exec"), {})
