"""The examples of docs/huggingface.md and of the README's section run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
README = (ROOT / "README.md").read_text(encoding="utf-8").split("## In a Hugging Face model\n")[1].split("\n## ")[0]
EXAMPLES = CODE.findall((ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")) + CODE.findall(README)


@pytest.mark.filterwarnings("ignore:longattn runs on its slow:RuntimeWarning")
@pytest.mark.parametrize("example", EXAMPLES, ids=["register", "checkpoints", "README"])
def test_example_runs(example: str) -> None:
    exec(compile(example, "example", "exec"), {})
