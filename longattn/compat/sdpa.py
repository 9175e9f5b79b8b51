"""torch.nn.functional.scaled_dot_product_attention on every backend of ours."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from longattn.arguments import autocast_dtype, broadcasts, flag
from longattn.compat.errors import described, renamed
from longattn.errors import InvalidInput, Unsupported
from longattn.functional import attention
from longattn.tracing import leaf

__all__ = ["scaled_dot_product_attention"]

_NAMES = ("query", "key", "value")
_OUR_NAMES = {"q": "query", "k": "key", "v": "value", "bias": "attn_mask"}


@leaf
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention with PyTorch's signature and meaning, in memory linear in L and S.

    Args:
        query: [..., Hq, L, E]; key: [..., H, S, E]; value: [..., H, S, Ev]. Any number of dimensions from 2 on; those
            before the last two are broadcast against each other.
        attn_mask: broadcastable to [..., Hq, L, S]: bool, True = visible, or float32 or query's dtype, added to the
            scores, with a gradient. A torch.nn.attention.bias.CausalBias is never made dense.
        dropout_p: probability of dropping a weight, below 1; applied whether or not a module is training.
        is_causal: query i sees keys 0..i (aligned at the start, whatever L and S are). Not beside attn_mask.
        scale: of the scores; 1 / sqrt(E) by default.
        enable_gqa: Hq may be a multiple of H.

    Returns:
        [..., Hq, L, Ev]. A query that sees no key gives 0.

    Raises:
        InvalidInput: PyTorch would raise, too, or read past the end of a tensor.
        Unsupported: PyTorch may compute it, but no backend of ours: nested tensors, dropout_p = 1.
    """
    tensors = (query, key, value)
    for name, x in zip(_NAMES, tensors, strict=True):
        if isinstance(x, Tensor) and x.is_nested:
            raise _unsupported(f"a nested {name}")
        if not isinstance(x, Tensor) or x.dim() < 2 or x.layout != torch.strided:
            raise InvalidInput(name, "a strided tensor of at least 2 dimensions [..., L, E]", described(x))
    if isinstance(dropout_p, (int, float)) and dropout_p == 1:
        raise _unsupported("dropout_p = 1")
    flag("is_causal", is_causal)
    flag("enable_gqa", enable_gqa)
    if attn_mask is not None and is_causal:
        raise InvalidInput("attn_mask", "None beside is_causal", described(attn_mask))
    align, causal = "start", is_causal
    if _is_causal_bias(attn_mask):
        align, causal = _alignment(attn_mask, query, key), True
        attn_mask = None

    leading = _leading(tensors, enable_gqa)
    q, k, v = (_as_four(x, leading if not enable_gqa else (*leading[:-1], x.shape[-3])) for x in tensors)
    bias = None if attn_mask is None else _bias(attn_mask, query, key, leading)
    with renamed(**_OUR_NAMES):
        out = attention(q, k, v, causal=causal, align=align, bias=bias, scale=scale, dropout_p=dropout_p)
    assert isinstance(out, Tensor)
    return out.reshape(*leading, *out.shape[-2:])


def _leading(tensors: tuple[Tensor, Tensor, Tensor], enable_gqa: bool) -> tuple[int, ...]:
    """The dimensions of the result before its last two: the batch and the query heads, if there are any."""
    query, key, value = tensors
    if not enable_gqa:
        return _broadcast(tensors, 2, " (fewer heads of key and value need enable_gqa)")
    for name, x in zip(_NAMES, tensors, strict=True):
        if x.dim() < 3:
            raise InvalidInput(name, "a tensor [..., heads, L, E] beside enable_gqa", described(x))
    if key.shape[-3] != value.shape[-3]:
        raise InvalidInput("value", f"{key.shape[-3]} heads as key", described(value))
    return (*_broadcast(tensors, 3, ""), query.shape[-3])


def _broadcast(tensors: tuple[Tensor, Tensor, Tensor], inner: int, hint: str) -> tuple[int, ...]:
    """The common shape of the dimensions before the `inner` last."""
    try:
        return tuple(torch.broadcast_shapes(*(x.shape[:-inner] for x in tensors)))
    except RuntimeError:
        got = f"shapes {', '.join(str(tuple(x.shape)) for x in tensors)}"
        raise InvalidInput("key", f"dimensions that broadcast against query's{hint}", got) from None


def _as_four(x: Tensor, leading: tuple[int, ...]) -> Tensor:
    """x broadcast to [*leading, N, E], as [batch, heads, N, E]; a view where strides allow."""
    x = x.expand(*leading, *x.shape[-2:])
    return x.reshape(math.prod(leading[:-1]), leading[-1] if leading else 1, *x.shape[-2:])


def _bias(attn_mask: Tensor, query: Tensor, key: Tensor, leading: tuple[int, ...]) -> Tensor:
    """attn_mask as [batch, heads, L, S]; where it is broadcast, it stays 1, but for a batch that it varies over."""
    full = (*leading, query.shape[-2], key.shape[-2])
    dtypes = {torch.bool, torch.float32, query.dtype}
    autocast = autocast_dtype(query.device.type)
    if autocast is not None:
        dtypes.add(autocast)
    if isinstance(attn_mask, Tensor) and attn_mask.is_nested:
        raise _unsupported("a nested attn_mask")
    typed = isinstance(attn_mask, Tensor) and attn_mask.dtype in dtypes
    if not typed or not broadcasts(attn_mask, full):
        expected = f"a bool, float32 or {str(query.dtype)[6:]} tensor broadcastable to {full}"
        raise InvalidInput("attn_mask", expected, described(attn_mask))
    shape = (1,) * (len(full) - attn_mask.dim()) + tuple(attn_mask.shape)
    batch, rest = leading[:-1], shape[-3:]
    if all(size == 1 for size in shape[: len(batch)]):
        return attn_mask.reshape(1, *rest)
    return attn_mask.expand(*batch, *rest).reshape(math.prod(batch), *rest)


def _is_causal_bias(attn_mask: object) -> bool:
    module = sys.modules.get("torch.nn.attention.bias")  # not imported: there is no such mask
    return module is not None and isinstance(attn_mask, module.CausalBias)


def _alignment(attn_mask: object, query: Tensor, key: Tensor) -> str:
    from torch.nn.attention.bias import CausalBias, CausalVariant

    assert isinstance(attn_mask, CausalBias)
    if (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (query.shape[-2], key.shape[-2]):
        expected = f"a CausalBias for {query.shape[-2]} queries and {key.shape[-2]} keys"
        raise InvalidInput("attn_mask", expected, f"{attn_mask.seq_len_q} and {attn_mask.seq_len_kv}")
    return "end" if attn_mask.variant == CausalVariant.LOWER_RIGHT else "start"


def _unsupported(what: str) -> Unsupported:
    return Unsupported(f"scaled_dot_product_attention with {what}", {"every backend": [f"has no {what}"]})
