"""All-to-all over heads: each rank trades its part of the sequence for all of it, of some heads.

Jacobs et al., "DeepSpeed Ulysses", arXiv 2309.14509.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longattn.distributed.mesh import Group


def to_heads(x: Tensor, group: Group) -> Tensor:
    """[B, H, N, D] of each rank to [B, H / ranks, ranks N, D]: its heads, of all ranks' tokens in their order."""
    return _ToHeads.apply(x, group)


def to_tokens(x: Tensor, group: Group) -> Tensor:
    """The inverse of `to_heads`."""
    return _ToTokens.apply(x, group)


def repeated(x: Tensor, group: Group) -> Tensor:
    """Keys or values whose heads the group divides: where there are too few for that, each occurs several times."""
    times = group.size // gcd(x.shape[1], group.size)
    return x if times == 1 else x.repeat_interleave(times, 1)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        parts = x.unflatten(1, (group.size, -1)).movedim(1, 0)  # [ranks, B, H / ranks, N, D]
        return _traded(parts, group).movedim(0, 2).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ToTokens.apply(grad, ctx.group), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        parts = x.unflatten(2, (group.size, -1)).movedim(2, 0)  # [ranks, B, H / ranks, N, D]
        return _traded(parts, group).movedim(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ToHeads.apply(grad, ctx.group), None


def _traded(parts: Tensor, group: Group) -> Tensor:
    """Part r goes to rank r; part r comes from rank r."""
    parts = parts.contiguous()
    came = torch.empty_like(parts)
    dist.all_to_all_single(came, parts, group=group.group)
    return came
