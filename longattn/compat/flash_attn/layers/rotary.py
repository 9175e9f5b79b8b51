"""flash_attn.layers.rotary: rotation by given tables of cosines and sines, out of place and in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longattn.arguments import flag, longest, within
from longattn.compat.errors import described
from longattn.compat.flash_attn.checks import (
    DENSE,
    PACKED,
    check_axes,
    check_contents,
    check_indices,
    check_sequences,
    check_table,
)
from longattn.compat.flash_attn.packing import token_places
from longattn.errors import InvalidInput
from longattn.rope import turn_pairs

Offsets = int | Tensor


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Offsets = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
) -> Tensor:
    """x with the first rotary_dim entries of its heads rotated: token i of a sequence by row i + seqlen_offsets.

    Differentiable in x (and out of place in cos and sin); computed in float32 at least.

    Args:
        x: [batch, seqlen, nheads, headdim], or with cu_seqlens [tokens, nheads, headdim].
        cos, sin: [seqlen_rotary, rotary_dim / 2].
        interleaved: pairs are entries (2i, 2i + 1) in place of (i, i + rotary_dim / 2).
        inplace: overwrite x. Use the result: a leaf that requires grad is overwritten, but gradients flow through the
            result alone.
        seqlen_offsets: an int, or an int32 tensor [batch].
        cu_seqlens: int32 [batch + 1], where packed sequences start and end. Tokens outside all pass through.
        max_seqlen: of a packed sequence, an int or a tensor that holds one; needed with cu_seqlens.

    Raises:
        InvalidInput: an argument that does not fit, or a token past the end of the tables.
    """
    check_axes("x", x, DENSE if cu_seqlens is None else PACKED)
    _check("x", x, interleaved, cos=cos, sin=sin)
    flag("inplace", inplace)
    if cu_seqlens is None:
        at_cos, at_sin = dense_tables(cos, sin, seqlen_offsets, *x.shape[:2])
    else:
        at_cos, at_sin = _packed_tables(cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, x.shape[0])
    if not inplace:
        return rotated(x, at_cos, at_sin, interleaved)
    return _in_place(x, lambda x: _rotate_(x, at_cos, at_sin, interleaved))


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: Offsets = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate the queries and keys of qkv in place, as `apply_rotary_emb`.

    Args:
        qkv: [batch, seqlen, 3, nheads, headdim], or [batch, seqlen, nheads_q + 2 * nheads_k, headdim] beside
            num_heads_q.
        cos, sin: [seqlen_rotary, rotary_dim / 2]; cos_k, sin_k: other tables for the keys.

    Returns:
        qkv.

    Raises:
        InvalidInput: as `apply_rotary_emb`.
    """
    if isinstance(qkv, Tensor) and qkv.dim() == 5:
        check_axes("qkv", qkv, ("batch", "seqlen", 3, "nheads", "headdim"))
    else:
        check_axes("qkv", qkv, DENSE)
    if (cos_k is None) != (sin_k is None):
        raise InvalidInput("sin_k" if sin_k is None else "cos_k", "both cos_k and sin_k, or neither", None)
    _check("qkv", qkv, interleaved, cos=cos, sin=sin)
    for_q = for_k = dense_tables(cos, sin, seqlen_offsets, *qkv.shape[:2])
    if cos_k is not None and sin_k is not None:
        _check("qkv", qkv, interleaved, cos_k=cos_k, sin_k=sin_k)
        for_k = dense_tables(cos_k, sin_k, seqlen_offsets, *qkv.shape[:2])

    def rotate(qkv: Tensor) -> None:
        q, k = _queries_and_keys(qkv, num_heads_q)
        _rotate_(q, *for_q, interleaved)
        _rotate_(k, *for_k, interleaved)

    return _in_place(qkv, rotate)


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: Offsets = 0
) -> Tensor:
    """Rotate the keys of kv [batch, seqlen, 2, nheads, headdim] in place, as `apply_rotary_emb`; return kv.

    Raises:
        InvalidInput: as `apply_rotary_emb`.
    """
    check_axes("kv", kv, ("batch", "seqlen", 2, "nheads", "headdim"))
    _check("kv", kv, interleaved, cos=cos, sin=sin)
    at_cos, at_sin = dense_tables(cos, sin, seqlen_offsets, *kv.shape[:2])
    return _in_place(kv, lambda kv: _rotate_(kv[:, :, 0], at_cos, at_sin, interleaved))


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The plain formula: x [batch, seqlen, nheads, headdim], cos and sin [seqlen, rotary_dim / 2], or per batch."""
    check_axes("x", x, DENSE)
    leading = x.shape[:2] if isinstance(cos, Tensor) and cos.dim() == 3 else x.shape[1:2]
    check_axes("cos", cos, (*leading, "rotary_dim / 2"))
    check_axes("sin", sin, tuple(cos.shape))
    check_width("cos", cos.shape[-1], x)
    return rotated(x, cos[..., None, :], sin[..., None, :], interleaved)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [..., nheads, headdim], its first entries turned by tables [..., 1, rotary_dim / 2]."""
    width = 2 * cos.shape[-1]
    return torch.cat((_turned(x[..., :width], cos, sin, interleaved), x[..., width:]), -1)


def dense_tables(cos: Tensor, sin: Tensor, offsets: Offsets, batch: int, seqlen: int) -> tuple[Tensor, Tensor]:
    """The rows of `seqlen` tokens from `offsets` on: [1 or batch, seqlen, 1, rotary_dim / 2]."""
    if isinstance(offsets, Tensor):
        _check_offsets(offsets, batch, cos, seqlen)
        rows = offsets[:, None] + torch.arange(seqlen, device=cos.device)
        return cos[rows][:, :, None], sin[rows][:, :, None]
    _check_offset(offsets, cos, seqlen)
    return cos[None, offsets : offsets + seqlen, None], sin[None, offsets : offsets + seqlen, None]


def _packed_tables(
    cos: Tensor, sin: Tensor, offsets: Offsets, cu_seqlens: Tensor, max_seqlen: int | Tensor | None, tokens: int
) -> tuple[Tensor, Tensor]:
    """The rows of packed tokens: [tokens, 1, rotary_dim / 2]."""
    check_sequences("cu_seqlens", cu_seqlens, cos.device)
    if max_seqlen is None:
        raise InvalidInput("max_seqlen", "an int or a tensor that holds one with cu_seqlens", None)
    max_seqlen = longest("max_seqlen", max_seqlen)
    check_contents("cu_seqlens", cu_seqlens, 0, tokens, "the tokens")
    check_contents("cu_seqlens", cu_seqlens.diff(), 0, max_seqlen, "lengths up to max_seqlen")
    sequence, place, inside = token_places(cu_seqlens, tokens)
    if isinstance(offsets, Tensor):
        _check_offsets(offsets, cu_seqlens.shape[0] - 1, cos, max_seqlen)
        place = place + offsets[sequence] if offsets.numel() else place
    else:
        _check_offset(offsets, cos, max_seqlen)
        place = place + offsets
    inside = inside[:, None, None]
    rows = place.clamp(0, max(cos.shape[0] - 1, 0))
    return torch.where(inside, cos[rows][:, None], 1.0), torch.where(inside, sin[rows][:, None], 0.0)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    return turn_pairs(x.to(compute), cos.to(compute), sin.to(compute), interleaved).to(x.dtype)


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    turning = x[..., : 2 * cos.shape[-1]]
    turning.copy_(_turned(turning, cos, sin, interleaved))


def _in_place(x: Tensor, rotate_: Callable[[Tensor], None]) -> Tensor:
    """x after rotate_(x), to be used in its place. Autograd forbids that to a leaf: there a copy carries the graph."""
    if not (torch.is_grad_enabled() and x.requires_grad and x.is_leaf):
        rotate_(x)
        return x
    copy = x.clone()
    rotate_(copy)
    x.detach().copy_(copy.detach())
    return copy


def _queries_and_keys(qkv: Tensor, heads_q: int | None) -> tuple[Tensor, Tensor]:
    """Views of qkv [.., 3, nheads, headdim] or [.., heads_q + 2 * heads_k, headdim]."""
    if qkv.dim() == 5:
        return qkv[:, :, 0], qkv[:, :, 1]
    heads = qkv.shape[2]
    if isinstance(heads_q, bool) or not isinstance(heads_q, int) or not 0 < heads_q < heads or (heads - heads_q) % 2:
        raise InvalidInput("num_heads_q", f"the query heads among {heads}, the rest keys and values", heads_q)
    heads_k = (heads - heads_q) // 2
    return qkv[:, :, :heads_q], qkv[:, :, heads_q : heads_q + heads_k]


def _check(name: str, x: Tensor, interleaved: bool, **tables: Tensor | None) -> None:
    """x is floating, and the tables, by name, fit each other and its heads."""
    if not x.is_floating_point():
        raise InvalidInput(name, "a floating dtype", x.dtype)
    flag("interleaved", interleaved)
    shape = None
    for table_name, table in tables.items():
        shape = tuple(check_table(table_name, table, shape, x.device).shape)
        check_width(table_name, shape[-1], x)


def check_width(name: str, width: int, x: Tensor) -> None:
    """Tables of this width turn entries that x [..., headdim] has."""
    if 2 * width > x.shape[-1]:
        raise InvalidInput(name, f"rotary_dim / 2 <= headdim / 2 = {x.shape[-1] / 2:g}", width)


def _check_offset(offset: int, cos: Tensor, seqlen: int) -> None:
    rows = cos.shape[0]
    is_int = isinstance(offset, (int, torch.SymInt)) and not isinstance(offset, bool)
    if not is_int or not within(offset, 0, rows - seqlen):
        raise InvalidInput(
            "seqlen_offsets", f"0..{rows - seqlen}, as cos has {rows} rows for {seqlen} tokens", described(offset)
        )


def _check_offsets(offsets: Tensor, batch: int, cos: Tensor, seqlen: int) -> None:
    check_indices("seqlen_offsets", offsets, (batch,), cos.device)
    rows = cos.shape[0]
    check_contents("seqlen_offsets", offsets, 0, rows - seqlen, lambda: f"cos has {rows} rows for {seqlen} tokens")
