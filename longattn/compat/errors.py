"""Errors in the words of the interface that was called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

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
    if not isinstance(x, Tensor):
        return f"{type(x).__name__} {x!r}"[:80]
    if x.is_nested:
        return "a nested tensor"
    return f"{str(x.dtype)[6:]} tensor of shape {tuple(x.shape)}" + (
        "" if x.layout == torch.strided else f", {x.layout}"
    )
