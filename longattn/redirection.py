"""A change of what a call means, for all modules below a model at once: its tokens are a shard of a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from longattn.errors import Unsupported


class Elsewhere(Protocol):
    """What stands in for the calls of `longattn.functional` where tokens are but a shard of a sequence."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor | tuple[Tensor, Tensor]:
        """As `longattn.attention`."""

    def attention_varlen(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **keywords: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `longattn.attention_varlen`."""

    def token_places(self, tokens: int, device: torch.device) -> Tensor:
        """Where so many tokens at hand stand in the sequence, int64."""

    def whole_length(self, tokens: int) -> int:
        """The length of the sequence of which so many tokens are at hand."""


# One for all threads: a backward that computes a layer again may do so in a thread of its own.
_elsewhere: Elsewhere | None = None


@contextmanager
def redirected(to: Elsewhere) -> Iterator[None]:
    """While it lasts, another runs what `attention` and `attention_varlen` are asked for, by whatever module."""
    global _elsewhere
    before, _elsewhere = _elsewhere, to
    try:
        yield
    finally:
        _elsewhere = before


def target() -> Elsewhere | None:
    """Who runs the calls now; None: they run as they are."""
    return _elsewhere


def on_shards() -> bool:
    """Whether tokens are a shard of a sequence now."""
    return _elsewhere is not None


def token_places(tokens: int, device: torch.device) -> Tensor:
    """Where the tokens at hand stand in their sequence, int64: 0, 1, 2, .. unless they are a shard of it."""
    return torch.arange(tokens, device=device) if _elsewhere is None else _elsewhere.token_places(tokens, device)


def whole_length(tokens: int) -> int:
    """The length of the sequence that so many tokens are, or are a shard of."""
    return tokens if _elsewhere is None else _elsewhere.whole_length(tokens)


def refuse_elsewhere(name: str) -> None:
    """
    Raises:
        Unsupported: tokens are a shard of a sequence now, and the call of that name would take them for the whole.
    """
    if _elsewhere is not None:
        raise Unsupported(name, {"every backend": ["it does not run on shards of a sequence (context_parallel)"]})
