"""Errors in the words of the interface that was called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from longattn.errors import InvalidInput


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """An InvalidInput about one of our arguments becomes one about theirs: `renamed(scale="softmax_scale")`."""
    try:
        yield
    except InvalidInput as error:
        name = names.get(error.argument)
        if name is None:
            raise
        raise InvalidInput(name, error.expected, error.got) from None


def described(x: object) -> str:
    """What came, for the message of an InvalidInput."""
    shape = getattr(x, "shape", None)
    return f"{type(x).__name__} {x!r}"[:80] if shape is None else f"a tensor of shape {tuple(shape)}"
