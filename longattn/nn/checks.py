"""Checks that the constructors share: sizes and structure that cannot work are reported when the module is made."""

from __future__ import annotations

from longattn.arguments import Window
from longattn.errors import InvalidInput
from longattn.mask import Mask
from longattn.rope import Rope


def check_positive_int(argument: str, value: object) -> None:
    """Raise InvalidInput unless the value is an int >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInput(argument, "an int >= 1", repr(value))


def check_dropout(p: object) -> None:
    """Raise InvalidInput unless p is a probability below 1, as `longattn.attention` takes it."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0.0 <= p < 1.0:
        raise InvalidInput("dropout", "a number in [0, 1)", repr(p))


def check_structure(window: Window, sinks: int, rope: Rope | None, head_dim: int) -> None:
    """Raise InvalidInput unless these describe an attention over heads of this width."""
    Mask.from_window(window=window, sinks=sinks)
    if rope is not None and (not isinstance(rope, Rope) or rope.dim > head_dim):
        raise InvalidInput("rope", f"None or a longattn.Rope of dim <= head_dim {head_dim}", repr(rope))
