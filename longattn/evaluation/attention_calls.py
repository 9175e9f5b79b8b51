"""One attention call over a long context: ours, and PyTorch's ways to compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longattn.errors import InvalidInput
from longattn.evaluation.cost import Cost, measure
from longattn.functional import attention

__all__ = ["ATTENTION_CALLS", "attention_cost"]

Call = Callable[[Tensor, Tensor, Tensor, int | None, int], Tensor]


def _ours(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: int) -> Tensor:
    out = attention(q, k, v, causal=True, window=window, sinks=sinks)
    assert isinstance(out, Tensor)
    return out


def _fused(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: int) -> Tensor:
    if window is not None:
        raise InvalidInput("window", "None: PyTorch's fused kernel knows causal masks only", window)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _masked(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(q.shape[2], window, sinks))


def _dense(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: int) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    scores.masked_fill_(~_visible(q.shape[2], window, sinks), -torch.inf)
    return scores.softmax(-1) @ v


def _visible(length: int, window: int | None, sinks: int) -> Tensor:
    """The mask as PyTorch needs it: bool [N, N]."""
    visible = torch.ones(length, length, dtype=torch.bool, device="cpu").tril_()
    if window is not None:
        first = visible[:, :sinks].clone()
        visible.triu_(1 - window)
        visible[:, :sinks] = first
    return visible


@dataclass(frozen=True)
class AttentionCall:
    """A way to compute attention, and what it is called in a table."""

    label: str
    run: Call


ATTENTION_CALLS = {
    "longattn": AttentionCall("longattn", _ours),
    "fused": AttentionCall("torch SDPA, fused causal kernel", _fused),
    "masked": AttentionCall("torch SDPA with an [N, N] mask", _masked),
    "dense": AttentionCall("torch, dense: softmax(QKᵀ)V", _dense),
}


def attention_cost(
    name: str,
    length: int,
    *,
    heads: int = 1,
    head_dim: int = 64,
    window: int | None = None,
    sinks: int = 0,
    threads: int | None = None,
) -> Cost:
    """Time and peak memory of one causal forward call in float32, in a process of its own. Making a mask counts.

    Args:
        name: of `ATTENTION_CALLS`.
        length: N, queries and keys; one sequence of `heads` heads, `head_dim` wide.
        window, sinks: as in `longattn.attention`.

    Raises:
        InvalidInput: an unknown name.
        CouldNotRun: the call failed, most often for lack of memory.
    """
    if name not in ATTENTION_CALLS:
        raise InvalidInput("name", f"one of {', '.join(ATTENTION_CALLS)}", repr(name))
    arguments: dict[str, Any] = {
        "name": name,
        "length": length,
        "heads": heads,
        "head_dim": head_dim,
        "window": window,
        "sinks": sinks,
    }
    return measure("longattn.evaluation.attention_calls:prepare", arguments, threads=threads)


def prepare(name: str, length: int, heads: int, head_dim: int, window: int | None, sinks: int) -> Callable[[], object]:
    """The call that `attention_cost` measures, for `measure`."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, head_dim, generator=generator, device="cpu") for _ in range(3))
    run = ATTENTION_CALLS[name].run

    def call() -> Tensor:
        with torch.no_grad():
            return run(q, k, v, window, sinks)

    small = slice(0, 64)  # loads what the first call of a process loads
    with torch.no_grad():
        run(q[:, :, small], k[:, :, small], v[:, :, small], window, sinks)
    return call
