"""Ranks that call with different arguments get an error that names rank and argument, in place of a hang.

Before a call moves data, each rank tells all others in a few lines of text what it was called with. All look at the
same lines, so all raise or none does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from longattn.distributed.mesh import Ranks
from longattn.errors import InvalidInput, Unsupported

_REFUSED = "refused"


def agree(ranks: Ranks, call: Mapping[str, str], *, differ: tuple[str, ...] = ()) -> list[dict[str, str]] | None:
    """Compare what the ranks were called with.

    Args:
        call: by argument, what must be the same on all ranks; but for the arguments in `differ`.

    Returns:
        What each rank said, or None where the ranks do not talk (see `Ranks.gather_text`).

    Raises:
        InvalidInput: an argument is not the same on all ranks, or some rank refused its own.
    """
    texts = ranks.gather_text("\n".join(f"{name}={value}" for name, value in call.items()))
    if texts is None:
        return None
    refused = [rank for rank, text in enumerate(texts) if text == _REFUSED]
    if refused:
        raise InvalidInput("call", "valid arguments on every rank", f"an error on rank {refused[0]}, told there")
    said = [dict(line.split("=", 1) for line in text.split("\n")) for text in texts]
    for name in dict.fromkeys(name for each in said for name in each if name not in differ):
        first = said[0].get(name)
        for rank, each in enumerate(said):
            if each.get(name) != first:
                raise InvalidInput(name, f"{first} on every rank, as on rank 0", f"{each.get(name)} on rank {rank}")
    return said


@contextmanager
def refusing(ranks: Ranks) -> Iterator[None]:
    """Where arguments are checked: if that raises, the others, who wait for this rank in `agree`, are told."""
    try:
        yield
    except (InvalidInput, Unsupported):
        ranks.gather_text(_REFUSED)
        raise


def shape_of(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def contents_of(x: Tensor) -> str:
    """A short name of what a small tensor holds; reads it from its device."""
    data = x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return f"{shape_of(x)} with contents {hashlib.blake2b(data, digest_size=6).hexdigest()}"
