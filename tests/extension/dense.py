"""What the methods mean, key by key in float64: scores of every pair, each at the positions that its formula says."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Pair = Callable[[int, int], tuple[float, float] | None]


def pair_of_self_extend(group: int, window: int) -> Pair:
    def positions(p: int, j: int) -> tuple[float, float] | None:
        if j > p:
            return None
        return (p, j) if p - j < window else (p // group + window - window // group, j // group)

    return positions


def pair_of_dual_chunk(chunk: int, longest: int) -> Pair:
    def positions(p: int, j: int) -> tuple[float, float] | None:
        if j > p:
            return None
        apart = p // chunk - j // chunk
        query = p % chunk if apart == 0 else min(p % chunk + chunk, longest) if apart == 1 else longest
        return query, j % chunk

    return positions


def pair_of_streaming(window: int, sinks: int) -> Pair:
    def positions(p: int, j: int) -> tuple[float, float] | None:
        if j > p:
            return None
        if p - j < window:
            return p, j
        return (min(p, window + sinks - 1), j) if j < sinks else None

    return positions


def turned(x: Tensor, position: float, inv_freq: Tensor) -> Tensor:
    """x [..., D] turned in halves."""
    angle = torch.tensor(position, dtype=torch.float64) * inv_freq.double()
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, pair: Pair, starts: list[int]) -> Tensor:
    """q [B, Hq, N, D], k [B, Hkv, N, D] and v, all float64; a token sees those from its sequence's start on."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    tokens = q.shape[2]
    rows = []
    for p in range(tokens):
        scores, seen = [], []
        for j in range(starts[p], p + 1):
            at = pair(p - starts[p], j - starts[p])
            if at is not None:
                product = turned(q[:, :, p], at[0], inv_freq) * turned(k[:, :, j], at[1], inv_freq)
                scores.append(product.sum(-1) / math.sqrt(q.shape[-1]))
                seen.append(j)
        weights = torch.stack(scores, -1).softmax(-1)  # [B, H, keys]
        rows.append((weights[..., None] * v[:, :, seen]).sum(2))
    return torch.stack(rows, 2)
