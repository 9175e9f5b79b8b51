"""The evaluation of a long-context model, in cells that are measured one at a time and kept in a file.

A cell is one reading: a window of text, or a question. An evaluation that was interrupted goes on with the cells that
are missing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.evaluation.cost import PeakMemory
from longattn.evaluation.metrics import perplexity
from longattn.evaluation.reading import Reader, check_memory
from longattn.evaluation.retrieval import RULER_TASKS, Question, passkey, ruler
from longattn.files import write_text

__all__ = ["TASKS", "TEXT_TASKS", "Cell", "Evaluation", "Plan", "Results", "summary"]

TASKS = ("loss", "short_windows", "perplexity", "passkey", *RULER_TASKS, "speed")
TEXT_TASKS = ("loss", "short_windows", "perplexity")

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        tasks: of TASKS. loss: of every token of whole windows, as means of buckets; of the longest length alone, where
            the others would read the same. short_windows: of the same tokens, when at most `context` are read at once,
            `stride` further each time: what the model does without extension. perplexity: of the same tokens at every
            length, `stride` at a time, each read after as much text as makes up the length. passkey, and RULER's tasks:
            questions. speed: tokens per second and memory.
        lengths: in tokens.
        windows: of text, for loss; how many strides, for perplexity.
        stride: in tokens. bucket: tokens that a loss is the mean of. context: in tokens, for short_windows.
        depths: where the passkey stands, evenly from 0 to 1. trials: questions of each kind, length and depth.
        seed: of the questions.

    Raises:
        InvalidInput: a value out of range.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    windows: int = 1
    stride: int = 256
    bucket: int = 256
    depths: int = 5
    trials: int = 1
    seed: int = 0
    context: int | None = None

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise InvalidInput("tasks", f"some of {', '.join(TASKS)}", unknown or "none")
        if not self.lengths:
            raise InvalidInput("lengths", "at least one", "none")
        numbers = {"stride": self.stride, "bucket": self.bucket, "depths": self.depths, "trials": self.trials}
        lengths = [("lengths", length) for length in self.lengths]
        for name, value in (*lengths, ("windows", self.windows), *numbers.items()):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInput(name, "an int >= 1", repr(value))
        if "perplexity" in self.tasks and min(self.lengths) < self.stride:
            raise InvalidInput("lengths", f"at least the stride {self.stride}", min(self.lengths))
        if "short_windows" in self.tasks and self.context is not None:
            longest = max(self.lengths)
            if not self.stride <= self.context <= longest:
                expected = f"for short_windows, between the stride {self.stride} and the longest length {longest}"
                raise InvalidInput("context", expected, self.context)

    @property
    def text_tokens(self) -> int:
        """Tokens of text that it takes."""
        longest = max(self.lengths)
        loss = self.windows * longest + 1 if {"loss", "short_windows"} & set(self.tasks) else 0
        perplexity = longest + (self.windows - 1) * self.stride + 1 if "perplexity" in self.tasks else 0
        return max(loss, perplexity)

    @property
    def most_tokens(self) -> int:
        """Tokens that a model reads and writes in one go, at most."""
        return max(self.lengths) + (_DECODED if "speed" in self.tasks else 0)

    def depth(self, number: int) -> float:
        return 0.5 if self.depths == 1 else number / (self.depths - 1)


@dataclass(frozen=True)
class Cell:
    """One reading: number is the window, stride or trial; depth the passkey's."""

    task: str
    length: int
    number: int = 0
    depth: float = 0.0

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))


@dataclass
class Results:
    """What was measured: settings of the model and the plan, and of each cell a dictionary of numbers."""

    settings: dict[str, Any]
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, task: str) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """A task's cells."""
        for key, found in self.cells.items():
            cell = Cell(**json.loads(key))
            if cell.task == task:
                yield cell, found

    def save(self, path: Path) -> None:
        """Write the file whole or not at all.

        Raises:
            OSError: it cannot be written, for example on a full disk.
        """
        cells = [{**json.loads(key), **found} for key, found in self.cells.items()]
        write_text(path, json.dumps({"settings": self.settings, "cells": cells}, indent=1))

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote.

        Raises:
            InvalidInput: another or a damaged file.
        """
        expected = "a complete file of an evaluation"
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InvalidInput("results", expected, f"{path}: {error}") from error
        if not isinstance(saved, dict) or not isinstance(saved.get("settings"), dict):
            raise InvalidInput("results", f"{expected}, with its settings", path)
        if not isinstance(saved.get("cells"), list):
            raise InvalidInput("results", f"{expected}, with its cells", path)
        found: dict[str, dict[str, Any]] = {}
        for number, values in enumerate(saved["cells"]):
            where = f"{path}, cell {number}"
            if not isinstance(values, dict):
                raise InvalidInput("results", expected, where)
            cell = _read_cell(values, where)
            if cell.key in found:
                raise InvalidInput("results", f"{expected}, each cell once", where)
            found[cell.key] = {name: value for name, value in values.items() if name not in _COORDINATES}
        return cls(saved["settings"], found)


_COORDINATES = ("task", "length", "number", "depth")
_OF_QUESTIONS = ("recall", "characters", "seconds")
_OF_TASKS = {"loss": ("seconds",), "short_windows": ("seconds",), "perplexity": ("loss", "seconds")}
_OF_TASKS["speed"] = ("seconds", "tokens_per_second", "new_tokens_per_second")


def _read_cell(values: dict[str, Any], where: str) -> Cell:
    """Check the entries of one cell. What was measured may be infinite or NaN, as a model's losses may be."""

    def refuse(name: str, expected: str) -> InvalidInput:
        return InvalidInput(f"results' {name}", expected, f"{values.get(name)!r} in {where}")

    def is_number(value: object) -> bool:
        return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)

    coordinates: list[Any] = [values.get(name) for name in _COORDINATES]
    task, length, number, depth = coordinates
    if task not in TASKS:
        raise refuse("task", f"one of {', '.join(TASKS)}")
    for name, value, least in (("length", length, 1), ("number", number, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise refuse(name, f"an int >= {least}")
    if not is_number(depth) or not 0.0 <= depth <= 1.0:
        raise refuse("depth", "a number in [0, 1]")
    for name in _OF_TASKS.get(task, _OF_QUESTIONS):
        if not is_number(values.get(name)):
            raise refuse(name, "a number")
    losses = values.get("losses")
    if task in ("loss", "short_windows") and not (isinstance(losses, list) and losses and all(map(is_number, losses))):
        raise refuse("losses", "a list of numbers")
    memory = values.get("peak_bytes")
    if task in (*TEXT_TASKS, "speed") and memory is not None and not is_number(memory):
        raise refuse("peak_bytes", "None or a number")
    return Cell(task, length, number, depth)


class Evaluation:
    """A model, a text and a plan.

    Args:
        reader: the model.
        encode, decode: of its tokenizer, without special tokens.
        prefix: tokens that every prompt starts with; suffix: tokens that every question ends with (of a chat template).
        text: int64 [T], for loss and perplexity.
        device: whose memory counts.

    Raises:
        InvalidInput: a text shorter than the plan takes, lengths too short for a task, or too long for the memory,
            by estimate.
    """

    def __init__(
        self,
        reader: Reader,
        plan: Plan,
        *,
        encode: Callable[[str], Sequence[int]],
        decode: Decode,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        text: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.reader, self.plan = reader, plan
        self.encode, self.decode, self.prefix, self.suffix = encode, decode, tuple(prefix), tuple(suffix)
        self.text = text
        self.device = torch.device(device)
        if "short_windows" in plan.tasks and plan.context is None:
            raise InvalidInput("context", "a number of tokens, for short_windows", None)
        have = 0 if text is None else len(text)
        if have < plan.text_tokens:
            expected = f"a text of at least {plan.text_tokens:,} tokens, for these lengths and windows"
            raise InvalidInput("text", expected, f"{have:,} tokens")
        longest = max(plan.lengths)
        for cell in self.cells():
            if cell.task not in TEXT_TASKS and cell.task != "speed" and cell.length <= _SHORT:
                self._question(cell)
        check_memory("lengths", longest, reader.bytes_for(longest), device)

    def cells(self) -> list[Cell]:
        """All that the plan takes, short lengths first."""
        plan = self.plan
        found = []
        for length in sorted(set(plan.lengths)):
            for task in plan.tasks:
                if task == "loss":
                    if length == max(plan.lengths) or self.reader.length_matters:
                        found += [Cell(task, length, number) for number in range(plan.windows)]
                elif task == "short_windows":
                    if length == max(plan.lengths):
                        found += [Cell(task, length, number) for number in range(plan.windows)]
                elif task == "perplexity":
                    found += [Cell(task, length, number) for number in range(plan.windows)]
                elif task == "speed":
                    found.append(Cell(task, length))
                else:
                    depths = range(plan.depths) if task == "passkey" else range(1)
                    found += [
                        Cell(task, length, trial, plan.depth(depth) if task == "passkey" else 0.0)
                        for depth in depths
                        for trial in range(plan.trials)
                    ]
        return found

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Read what a cell asks for."""
        if cell.task in TEXT_TASKS:
            assert self.text is not None
            start, stop = self._span(cell)
            with PeakMemory(self.device) as memory:
                begun = time.perf_counter()
                tokens = self.text[start:stop]
                losses = self._in_short_windows(tokens) if cell.task == "short_windows" else self.reader.losses(tokens)
                seconds = time.perf_counter() - begun
            cost = {"seconds": seconds, "peak_bytes": memory.bytes}
            if cell.task == "perplexity":
                return {"loss": losses[-self.plan.stride :].double().mean().item(), **cost}
            buckets = losses.double().split(self.plan.bucket)
            return {"losses": [round(bucket.mean().item(), 5) for bucket in buckets], **cost}
        if cell.task == "speed":
            return self._speed(cell.length)
        question = self._question(cell)
        begun = time.perf_counter()
        prompt = [*self.prefix, *question.prompt, *self.suffix]
        answer = self.decode(list(self.reader.answer(prompt, question.new_tokens)))
        return {
            "recall": question.recall(answer),
            "characters": question.characters(answer),
            "wanted": list(question.answers),
            "answer": answer,
            "seconds": time.perf_counter() - begun,
        }

    def run(
        self, results: Results, save: Callable[[], None], show: Callable[[Cell, int, int], None] | None = None
    ) -> None:
        """Measure what results lack, and save after each cell.

        Raises:
            InvalidInput: the results hold cells that are not of this evaluation.
        """
        cells = self.cells()
        self._check(results, cells)
        for number, cell in enumerate(cells):
            if show is not None:
                show(cell, number, len(cells))
            if cell.key not in results.cells:
                results.cells[cell.key] = self.measure(cell)
                save()

    def _check(self, results: Results, cells: Sequence[Cell]) -> None:
        unknown = results.cells.keys() - {cell.key for cell in cells}
        if unknown:
            raise InvalidInput("results", "cells of this evaluation alone", min(unknown))
        for cell in cells:
            losses, buckets = results.cells.get(cell.key, {}).get("losses"), -(-cell.length // self.plan.bucket)
            if losses is not None and len(losses) != buckets:
                raise InvalidInput("results", f"{buckets} losses of {cell.key}", len(losses))

    def _in_short_windows(self, tokens: Tensor) -> Tensor:
        """Each token counts where it stands latest: after context - stride tokens or more, but for the first ones."""
        context, count = self.plan.context, len(tokens) - 1
        assert context is not None
        found = [self.reader.losses(tokens[: context + 1])]
        for read in range(context, count, self.plan.stride):
            stop = min(read + self.plan.stride, count)
            found.append(self.reader.losses(tokens[stop - context : stop + 1])[read - stop :])
        return torch.cat(found)

    def _span(self, cell: Cell) -> tuple[int, int]:
        """Where a cell's text starts and ends; the end is a target only."""
        if cell.task in ("loss", "short_windows"):
            start = cell.number * max(self.plan.lengths)
            return start, start + cell.length + 1
        stop = max(self.plan.lengths) + cell.number * self.plan.stride
        return stop - cell.length, stop + 1

    def _question(self, cell: Cell) -> Question:
        seed = (self.plan.seed, cell.number)
        around = len(self.prefix) + len(self.suffix)
        room = cell.length - around
        try:
            if cell.task == "passkey":
                return passkey(self.encode, room, cell.depth, (cell.length, cell.depth, *seed))
            return ruler(cell.task, self.encode, room, seed)
        except InvalidInput as error:
            start = f", next to {around} that every prompt has" if around else ""
            raise InvalidInput("lengths", f"{error.expected} of {cell.task}{start}", cell.length) from error

    def _speed(self, length: int) -> dict[str, Any]:
        """Reading a prompt of so many tokens, and then a few more one at a time."""
        tokens = [*self.prefix, *(self._filler(length))][:length]
        with PeakMemory(self.device) as memory:
            times = [time.perf_counter()]
            for _ in self.reader.answer(tokens, 1 + _DECODED):
                times.append(time.perf_counter())
        reading = times[1] - times[0]
        return {
            "seconds": reading,
            "tokens_per_second": length / reading,
            "new_tokens_per_second": _DECODED / max(times[-1] - times[1], 1e-9),
            "peak_bytes": memory.bytes,
        }

    def _filler(self, length: int) -> list[int]:
        sentence = list(self.encode("The grass is green. "))
        return sentence * math.ceil(length / len(sentence))


_SHORT = 1 << 15  # tokens: no task's question needs more
_DECODED = 16  # new tokens whose time is taken


def summary(results: Results) -> Mapping[str, Any]:
    """Means over windows and trials: of each task a dictionary by length (and depth)."""
    found: dict[str, Any] = {}
    for task in TASKS:
        rows: dict[Any, list[dict[str, Any]]] = {}
        for cell, measured in results.of(task):
            rows.setdefault((cell.length, cell.depth), []).append(measured)
        if not rows:
            continue
        found[task] = [
            {"length": length, "depth": depth, **_mean(task, many)} for (length, depth), many in sorted(rows.items())
        ]
    return found


def _mean(task: str, many: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(name: str) -> float:
        return sum(one[name] for one in many) / len(many)

    if task in ("loss", "short_windows"):
        losses = [sum(at) / len(many) for at in zip(*(one["losses"] for one in many), strict=True)]
        return {"losses": losses, "windows": len(many)}
    if task == "perplexity":
        return {"perplexity": perplexity(mean("loss")), "loss": mean("loss"), "strides": len(many)}
    if task == "speed":
        return dict(many[0])
    return {"recall": mean("recall"), "characters": mean("characters"), "trials": len(many)}
