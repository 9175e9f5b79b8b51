"""The example of docs/context-extension.md runs, and the page knows every method."""

from __future__ import annotations

import re
from pathlib import Path

from longattn import extension, scaling
from longattn.cli.methods import METHODS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "context-extension.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(example, str(PAGE), "exec"), {})


def test_every_method_has_a_row() -> None:
    named = re.findall(r"^\| `(?:scaling\.)?(\w+)\(.*?\)` \| ([\w-]+) \|", TEXT, re.MULTILINE)
    values = [*scaling.Scaling._by_name.values(), *extension.Method._by_name.values()]
    assert {name for name, _ in named} == {value.__name__ for value in values}
    assert {option for _, option in named} == set(METHODS)
