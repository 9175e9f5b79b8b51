"""From a whole sequence to each rank's shard of it and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longattn.distributed.agreement import agree, shape_of
from longattn.distributed.mesh import Ranks
from longattn.distributed.spans import Span, check_layout, spans_of
from longattn.errors import InvalidInput


def shard(x: Tensor, mesh: DeviceMesh, *, dim: int, layout: str = "contiguous") -> Tensor:
    """This rank's shard of x, which all ranks hold whole: tokens, labels, positions, q, k or v.

    On a mesh of two dimensions (ring, ulysses) the ring cuts by `layout`, and the ranks of a row cut each of its parts
    once more, contiguously. Differentiable: the backward gathers, so that every rank has the gradient of the whole x.

    Args:
        x: of any dtype.
        mesh: of one dimension, or of two (ring, ulysses).
        dim: that of the sequence.
        layout: "contiguous" or "zigzag" (see `longattn.distributed.spans_of`).

    Raises:
        InvalidInput: a length that the ranks (zigzag: twice the ring) do not divide.
    """
    ranks = Ranks.of(mesh)
    dim = _check(x, dim, layout)
    tokens, rest = divmod(x.shape[dim], ranks.size)
    parts = ranks.size * (2 if layout == "zigzag" else 1)
    if rest or not tokens or (layout == "zigzag" and x.shape[dim] // ranks.ring.size % 2):
        expected = f"a length along dim {dim} that {parts} parts divide ({ranks.size} ranks, {layout})"
        raise InvalidInput("x", expected, f"shape {tuple(x.shape)}")
    return _Shard.apply(x, ranks, dim, layout)


def unshard(x: Tensor, mesh: DeviceMesh, *, dim: int, layout: str = "contiguous") -> Tensor:
    """The inverse of `shard`: the whole sequence on every rank.

    Differentiable: the backward keeps the own slice, as every rank computes the same from the whole.

    Args:
        x: this rank's shard; all of one shape and dtype.
        mesh, dim, layout: as in `shard`.

    Raises:
        InvalidInput: shards that differ between ranks, or are empty.
    """
    ranks = Ranks.of(mesh)
    dim = _check(x, dim, layout)
    agree(ranks, {"x": shape_of(x), "dim": str(dim), "layout": layout})
    tokens = x.shape[dim] * (1 if ranks.ulysses is None else ranks.ulysses.size)
    if not tokens or (layout == "zigzag" and tokens % 2):
        expected = f"an even number of tokens for zigzag, at least one, along dim {dim}"
        raise InvalidInput("x", expected, f"shape {tuple(x.shape)}")
    return _Unshard.apply(x, ranks, dim, layout)


def _check(x: Tensor, dim: int, layout: str) -> int:
    if not isinstance(x, Tensor):
        raise InvalidInput("x", "a tensor", type(x).__name__)
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        raise InvalidInput("dim", f"a dimension of x, which has {x.dim()}", repr(dim))
    check_layout(layout)
    return dim % x.dim()


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, dim: int, layout: str) -> Tensor:
        ctx.place = ranks, dim, layout
        return own_slice(x, ranks, dim, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Unshard.apply(grad, *ctx.place), None, None, None


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, dim: int, layout: str) -> Tensor:
        ctx.place = ranks, dim, layout
        return gathered(x, ranks, dim, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Shard.apply(grad, *ctx.place), None, None, None


def own_slice(x: Tensor, ranks: Ranks, dim: int, layout: str) -> Tensor:
    """A contiguous copy of this rank's tokens."""
    spans = spans_of(layout, ranks.ring.size, ranks.ring.rank, x.shape[dim] // ranks.ring.size)
    parts = [x.narrow(dim, span.start, span.length) for span in spans]
    mine = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    if ranks.ulysses is not None:
        mine = mine.chunk(ranks.ulysses.size, dim)[ranks.ulysses.rank]
    return mine.clone(memory_format=torch.contiguous_format)


def gathered(x: Tensor, ranks: Ranks, dim: int, layout: str) -> Tensor:
    """The whole of which each rank holds a shard."""
    if ranks.ulysses is not None:
        x = torch.cat(ranks.ulysses.gather(x), dim)
    ring = ranks.ring
    return in_order(ring.gather(x), [spans_of(layout, ring.size, r, x.shape[dim]) for r in range(ring.size)], dim)


def in_order(shards: list[Tensor], spans: list[list[Span]], dim: int) -> Tensor:
    """The tokens of all shards in the order of the sequence."""
    placed = []
    for x, held in zip(shards, spans, strict=True):
        parts = x.split([span.length for span in held], dim)
        placed += [(span.start, part) for span, part in zip(held, parts, strict=True)]
    placed.sort(key=lambda pair: pair[0])
    return torch.cat([part for _, part in placed], dim)
