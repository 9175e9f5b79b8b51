"""The options that name methods which extend the context, shared by `longattn extend` and `longattn eval`."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from longattn import scaling
from longattn.cli.language_model import trained_length
from longattn.errors import InvalidInput
from longattn.extension import (
    BaseChange,
    DualChunk,
    LayerPattern,
    LearnedPositions,
    LogN,
    Method,
    SelfExtend,
    ShiftedGroups,
    StreamingLLM,
)
from longattn.integrations import extend

__all__ = ["METHODS", "chosen_methods", "extended_by", "method_options"]

METHODS = (
    "linear",
    "ntk",
    "dynamic",
    "yarn",
    "longrope",
    "llama3",
    "p-rope",
    "base",
    "log-n",
    "self-extend",
    "dual-chunk",
    "streaming",
    "pattern",
    "shifted-groups",
    "learned",
)

# The methods that read an option of their own.
_READERS = {
    "base": ("base",),
    "proportion": ("p-rope",),
    "longrope": ("longrope",),
    "group": ("self-extend", "shifted-groups"),
    "window": ("self-extend", "streaming", "pattern"),
    "sinks": ("streaming", "pattern"),
    "pattern": ("pattern",),
}

_Command = TypeVar("_Command", bound=Callable[..., Any])


def method_options(command: _Command) -> _Command:
    """Add the options; the command takes them as **options for `chosen_methods`."""
    for option in reversed(
        (
            click.option("--method", "methods", type=click.Choice(METHODS), multiple=True, help="Repeatable."),
            click.option("--factor", type=float, help="How many times the trained length; at least 1."),
            click.option("--trained", type=int, help="The trained length; by default what the model says."),
            click.option("--base", type=float, help="Of base: the new base."),
            click.option("--proportion", type=float, help="Of p-rope: the share of pairs that turn."),
            click.option(
                "--longrope",
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                help="Of longrope: a JSON file of a search.",
            ),
            click.option("--group", type=int, help="Of self-extend and shifted-groups: tokens of a group."),
            click.option("--window", type=int, help="Of self-extend, streaming and pattern: tokens."),
            click.option("--sinks", type=int, help="Of streaming (by default 4) and pattern: first tokens that stay."),
            click.option("--pattern", help="Of pattern: a letter a layer, L full, S window, N without rotation."),
        )
    ):
        command = option(command)
    return command


def chosen_methods(
    model: Any,
    methods: tuple[str, ...],
    *,
    factor: float | None,
    trained: int | None,
    base: float | None,
    proportion: float | None,
    longrope: Path | None,
    group: int | None,
    window: int | None,
    sinks: int | None,
    pattern: str | None,
) -> list[scaling.Scaling | Method]:
    """The values that the options describe, in the order of --method.

    Raises:
        InvalidInput: an option that a method needs is missing or out of range, or one is given that no method reads.
    """
    given = {"base": base, "proportion": proportion, "longrope": longrope, "group": group, "window": window}
    for name, value in (given | {"sinks": sinks, "pattern": pattern}).items():
        if value is not None and not set(_READERS[name]) & set(methods):
            raise InvalidInput(f"--{name}", f"none without --method {' or '.join(_READERS[name])}", value)
    length = trained_length(model) if trained is None else trained
    if factor is not None and not factor >= 1:
        raise InvalidInput("--factor", "a number of at least 1", factor)

    def needed(name: str, value: Any) -> Any:
        if value is None:
            raise InvalidInput(name, "a value, for this method", None)
        return value

    def make(name: str) -> scaling.Scaling | Method:
        match name:
            case "linear":
                return scaling.Linear(needed("--factor", factor))
            case "ntk":
                return scaling.NTK(needed("--factor", factor))
            case "dynamic":
                return scaling.DynamicNTK(needed("--factor", factor), length)
            case "yarn":
                return scaling.YaRN(needed("--factor", factor), length)
            case "longrope":
                return _read_longrope(needed("--longrope", longrope))
            case "llama3":
                return scaling.Llama3(needed("--factor", factor), length)
            case "p-rope":
                return scaling.Proportional(needed("--proportion", proportion))
            case "base":
                return BaseChange(needed("--base", base))
            case "log-n":
                return LogN(length)
            case "self-extend":
                near = max(1, length // 4) if window is None else window
                return SelfExtend(_group(needed("--factor", factor), length, near) if group is None else group, near)
            case "dual-chunk":
                return DualChunk.of(length)
            case "streaming":
                kept = 4 if sinks is None else sinks
                return StreamingLLM(max(1, length - kept) if window is None else window, kept)
            case "pattern":
                return LayerPattern(needed("--pattern", pattern), window, sinks or 0)
            case "shifted-groups":
                return ShiftedGroups(needed("--group", group))
        return LearnedPositions(needed("--factor", factor))

    return [make(name) for name in methods]


def extended_by(model: Any, methods: Sequence[scaling.Scaling | Method], console: Console | None = None) -> Any:
    """Return the model under all methods, and say on the console what they replace or shorten."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        extended: Any = reduce(extend, methods, model)
    if console is not None:
        for message in dict.fromkeys(str(warning.message) for warning in said):
            console.print(f"Note: {message}", soft_wrap=True)
    return extended


def _group(factor: float, length: int, window: int) -> int:
    """The smallest group with which the trained positions reach `factor` times as far."""
    return max(1, math.ceil((factor * length - window) / max(1, length - window)))


def _read_longrope(path: Path) -> scaling.LongRoPE:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput("--longrope", "a JSON file of a search", f"{path}: {error}") from error
    found = scaling.from_dict(values)
    if not isinstance(found, scaling.LongRoPE):
        raise InvalidInput("--longrope", "a longrope", found)
    return found
