"""The examples of docs/modules.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "modules.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore:longattn runs on its slow:RuntimeWarning")
@pytest.mark.parametrize("example", EXAMPLES, ids=["replace_attention", "MultiheadAttention", "Attention"])
def test_example_runs(example: str) -> None:
    exec(compile(example, str(PAGE), "exec"), {})
