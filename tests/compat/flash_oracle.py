"""Attention as flash-attn documents it, on dense float64 matrices, one sequence at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [Nq, H, D], k and v [Nk, Hk, D], slopes [H], keep bool [H, Nq, Nk]: out [Nq, H, D], lse and weights."""
    nq, heads, width = q.shape
    nk = k.shape[0]
    k, v = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (1 / math.sqrt(width) if softmax_scale is None else softmax_scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(nq)[:, None] + nk - nq - torch.arange(nk)  # p - j
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance.abs()
    left, right = (int(side) for side in window_size)
    if causal:
        right = 0
    hidden = torch.zeros(nq, nk, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= distance < -right
    scores = scores.masked_fill(hidden, -math.inf)
    lse = scores.logsumexp(-1) if nk else scores.new_full((heads, nq), -math.inf)
    weights = torch.where(hidden, 0.0, (scores - lse[..., None]).exp())
    weights = torch.where((lse == -math.inf)[..., None], 0.0, weights)
    kept = weights if keep is None else weights * keep / (1 - dropout_p)
    return torch.einsum("hij,jhd->ihd", kept, v), lse.masked_fill(lse == -math.inf, math.inf), weights


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [N, H, D] with complex number i of each head multiplied by cos + i sin, both [N, rotary_dim / 2]."""
    half = cos.shape[-1]
    real = [2 * i if interleaved else i for i in range(half)]
    imaginary = [2 * i + 1 if interleaved else i + half for i in range(half)]
    product = torch.complex(x[..., real], x[..., imaginary]) * torch.complex(cos, sin)[:, None]
    result = x.clone()
    result[..., real], result[..., imaginary] = product.real, product.imag
    return result
