"""From the public keywords to one validated (Tensors, Problem): the only place that checks a call's arguments."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from longattn.dtensors import is_dtensor
from longattn.errors import InvalidInput
from longattn.forked import on_one_thread
from longattn.mask import Mask
from longattn.problem import (
    OUT_OF_RANGE,
    CacheTensors,
    Problem,
    Tensors,
    cache_features,
    check_memory,
    present_features,
)
from longattn.rope import Rope

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int32, torch.int64)
_INT32_MAX = 2**31 - 1
_FARTHEST = 2.0**53  # position that a scaling can compute with
_PLAIN = (Tensor, torch.nn.Parameter)
_SINGLE, _DOUBLE = torch.finfo(torch.float32), torch.finfo(torch.float64)

Window = int | tuple[int, int] | None
Positions = Tensor | tuple[Tensor, Tensor] | None


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: Window,
    sinks: int,
    align: str | int | Tensor,
    key_mask: Tensor | None,
    key_lens: Tensor | None,
    bounds: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sink_logits: Tensor | None,
    rope: Rope | None,
    positions: Positions,
    dropout_p: float,
    seed: int | Tensor | None,
    deterministic: bool,
) -> tuple[Tensors, Problem]:
    """Check a call on q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv]."""
    q, k, v = _qkv(q, k, v, ("batch", "heads", "length", "head_dim"))
    batch, q_heads, nq, _ = q.shape
    nk = k.shape[2]
    if k.shape[0] != batch:
        raise InvalidInput("k", f"{batch} sequences as in q", f"shape {tuple(k.shape)}")
    offset = None
    if isinstance(align, Tensor):
        offset = _place_tensor("align", align, batch, q.device)
        align = 0
    mask = _mask(causal, window, sinks, align)
    dropout_p = _dropout(dropout_p)
    lo, hi = _bounds(bounds, batch, nq, q.device)
    positions_q, positions_k = rotated_positions(positions, rope, q.device, (batch,), nq, nk)
    inv_freq, factor = frequencies(rope, q, context_length(rope, nk, positions_q, positions_k))
    if positions_k is not None and positions_q is None and offset is None and key_lens is None:
        _check_reach(mask, nq, nk)
    tensors = Tensors(
        q,
        k,
        v,
        key_mask=_key_mask(key_mask, batch, nk, q.device),
        key_lens=None if key_lens is None else _place_tensor("key_lens", key_lens, batch, q.device),
        lo=lo,
        hi=hi,
        offset=offset,
        bias=_bias(bias, (batch, q_heads, nq, nk), q.device),
        alibi_slopes=_floats("alibi_slopes", alibi_slopes, ((q_heads,), (batch, q_heads)), q.device),
        sink_logits=_floats("sink_logits", sink_logits, ((q_heads,),), q.device),
        inv_freq=inv_freq,
        positions_q=positions_q,
        positions_k=positions_k,
        seed=_seed(seed, dropout_p, q.device),
    )
    return tensors, _problem(tensors, mask, batch, scale, softcap, rope, factor, dropout_p, deterministic)


def weights(q: Tensor, k: Tensor, **keywords: Any) -> tuple[Tensors, Problem]:
    """Check a call that asks for weights alone, with the keywords of `dense`: keys take the place of values."""
    if isinstance(q, Tensor) and q.is_meta:
        raise InvalidInput("q", "a tensor with data", "a meta tensor")
    _no_dtensor("q", q)
    for name, x in (("q", q), ("k", k)):
        if isinstance(x, Tensor) and _is_strided(x):
            _held(name, x)
    return dense(q, k, k, **keywords, dropout_p=0.0, seed=None, deterministic=False)


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    causal: bool,
    window: Window,
    sinks: int,
    align: str | int | Tensor,
    key_mask: Tensor | None,
    key_lens: Tensor | None,
    bounds: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sink_logits: Tensor | None,
    rope: Rope | None,
    positions: Positions,
    dropout_p: float,
    seed: int | Tensor | None,
    deterministic: bool,
) -> tuple[Tensors, Problem]:
    """Check a call on packed sequences q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv]; they become [1, H, T, D]."""
    q, k, v = _qkv(q, k, v, ("tokens", "heads", "head_dim"))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    _, q_heads, tq, _ = q.shape
    tk = k.shape[2]
    for name, unwanted in (("key_mask", key_mask), ("bounds", bounds), ("bias", bias)):
        if unwanted is not None:
            raise InvalidInput(name, "None with packed sequences", type(unwanted).__name__)
    cu_seqlens_q = _cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.device)
    cu_seqlens_k = _cu_seqlens("cu_seqlens_k", cu_seqlens_k, q.device)
    batch = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k.shape[0] - 1 != batch:
        raise InvalidInput("cu_seqlens_k", f"{batch + 1} entries as in cu_seqlens_q", f"{cu_seqlens_k.shape[0]}")
    max_seqlen_q = longest("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = longest("max_seqlen_k", max_seqlen_k)
    offset = None
    if isinstance(align, Tensor):
        offset = _place_tensor("align", align, batch, q.device)
        align = 0
    mask = _mask(causal, window, sinks, align)
    dropout_p = _dropout(dropout_p)
    positions_q, positions_k = rotated_positions(positions, rope, q.device, (), tq, tk)
    inv_freq, factor = frequencies(rope, q, context_length(rope, max_seqlen_k, positions_q, positions_k))
    tensors = Tensors(
        q,
        k,
        v,
        key_lens=None if key_lens is None else _place_tensor("key_lens", key_lens, batch, q.device),
        offset=offset,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        alibi_slopes=_floats("alibi_slopes", alibi_slopes, ((q_heads,), (batch, q_heads)), q.device),
        sink_logits=_floats("sink_logits", sink_logits, ((q_heads,),), q.device),
        inv_freq=inv_freq,
        positions_q=positions_q,
        positions_k=positions_k,
        seed=_seed(seed, dropout_p, q.device),
    )
    problem = _problem(tensors, mask, batch, scale, softcap, rope, factor, dropout_p, deterministic)
    return tensors, problem._replace(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)


class CacheShape(NamedTuple):
    """What a cache holds, for the checks of a call on it."""

    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device
    window: int | None  # newest tokens that are kept, None: all
    sinks: int  # first tokens that are kept beside a window
    cache_positions: bool  # keys rotate at their place in the cache
    ring: int  # slots past the sinks where new keys take those of old ones; 0: none do


class Rotation(NamedTuple):
    """How a call on a cache rotates; cos and sin where keys rotate on reading."""

    rope: Rope
    inv_freq: Tensor
    factor: float
    cos: Tensor | None
    sin: Tensor | None


def cached(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    shape: CacheShape,
    after: list[int],
    counts: list[int],
    *,
    causal: bool = True,
    window: Window = None,
    sinks: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    rotation: Rotation | None = None,
    positions: Tensor | None = None,
    tree: Tensor | Sequence[int] | None = None,
    oldest: Sequence[int] = (),
) -> tuple[CacheTensors, Problem]:
    """Check a call on a cache: q [B, Hq, T, D], or None to append only, and new k and v [B, Hkv, T, D or Dv], or None.

    Args:
        after: the sequences' lengths after the call; counts: how many of T are theirs.
        oldest: of a ring, the first token of each sequence, sinks aside, from which on it holds all.
    """
    batch, device = len(counts), shape.device
    q, k, v = _new_tokens(q, k, v, batch, shape)
    x = k if q is None else q
    assert x is not None
    nq, q_heads = x.shape[2], 0 if q is None else q.shape[1]
    if max(after) > _INT32_MAX:
        raise InvalidInput("k", "sequences of less than 2^31 tokens", f"{max(after)}")
    mask = _cache_mask(causal, window, sinks, shape)
    if k is None and shape.ring:  # else room was made for the new tokens
        _check_ring(mask, shape, after, counts, oldest)
    alibi_slopes = _floats("alibi_slopes", alibi_slopes, ((q_heads,), (batch, q_heads)), device)
    sink_logits = _floats("sink_logits", sink_logits, ((q_heads,),), device)
    for name, parameter in (("alibi_slopes", alibi_slopes), ("sink_logits", sink_logits)):
        if parameter is not None:
            _no_derivative(name, parameter)
    branches = depths = None
    if tree is not None:
        for name, unwanted in (("alibi_slopes", alibi_slopes), ("causal", None if causal else "False")):
            if unwanted is not None:
                raise InvalidInput(name, "its default with a tree", _describe(unwanted))
        if rotation is not None and rotation.cos is not None:
            raise InvalidInput("tree", "None where keys rotate on reading", _describe(tree))
        branches, depths = draft_tree(tree, batch, nq, device)
        before = torch.tensor([[n - new] for n, new in zip(after, counts, strict=True)], device=device)
        places = before + depths
        if mask.left is not None:
            if mask.sinks > int(before.min()) and int(depths.max()) > mask.left:
                raise InvalidInput("tree", f"at most {mask.left} ancestors while sinks are missing", "more")
            branches = branches & mask.visible(places[:, :, None], places[:, None])  # [B, T, T]
        mask = replace(mask, right=None)
        if positions is None and rotation is not None:
            positions = places
    if positions is not None:
        if rotation is None or rotation.cos is not None:
            raise InvalidInput("positions", "None without rope, or where keys rotate on reading", _describe(positions))
        positions = _position_tensor("positions", positions, device, (batch,), nq)
    tensors = CacheTensors(
        q,
        k,
        v,
        torch.tensor(after, dtype=torch.int32, device=device),
        torch.tensor(counts, dtype=torch.int32, device=device),
        alibi_slopes=alibi_slopes,
        sink_logits=sink_logits,
        inv_freq=None if rotation is None else rotation.inv_freq,
        positions=positions,
        cos=None if rotation is None else rotation.cos,
        sin=None if rotation is None else rotation.sin,
        tree=branches,
        depths=depths,
    )
    scale, softcap = _scale(scale, shape.head_dim, x.dtype), _softcap(softcap, x.dtype)
    return tensors, Problem(
        batch=batch,
        q_heads=q_heads,
        kv_heads=shape.kv_heads,
        nq=nq,
        nk=max(after),
        head_dim=shape.head_dim,
        v_head_dim=shape.v_head_dim,
        dtype=x.dtype,
        device=device.type,
        mask=mask,
        scale=scale,
        softcap=softcap,
        rope_factor=1.0 if rotation is None else rotation.factor,
        interleaved=rotation is not None and rotation.rope.interleaved,
        storage=shape.dtype,
        frame=shape.window or 0 if shape.cache_positions and rotation is not None else 0,
        features=cache_features(tensors, softcap, shape.window is not None, shape.dtype),
    )


def new_lengths(lengths: Tensor | Sequence[int] | None, batch: int, x: Tensor) -> list[int]:
    """How many of x's T tokens [B, H, T, D] each of the sequences has."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[0] != batch:
        raise InvalidInput("q", f"a tensor [{batch}, heads, tokens, head_dim]", _describe(x))
    most = x.shape[2]
    if lengths is None:
        return [most] * batch
    counts = int_list("lengths", lengths)
    if len(counts) != batch or not all(0 <= n <= most for n in counts):
        raise InvalidInput("lengths", f"{batch} ints of 0 to {most}", counts)
    return counts


_convert = on_one_thread(Tensor.to)
_contiguous = on_one_thread(Tensor.contiguous)
_first_positions = on_one_thread(torch.arange)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rotation(x: Tensor, rope: Rope, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor, float]:
    """Check an apply_rope call on x [..., N, D]: (x [B, H, N, D], inv_freq, positions float32, factor)."""
    if not isinstance(rope, Rope):
        raise InvalidInput("rope", "a longattn.Rope", type(rope).__name__)
    if not isinstance(x, Tensor) or x.dim() < 2 or x.dim() > 4:
        raise InvalidInput("x", "a tensor of 2 to 4 dimensions [..., N, D]", _describe(x))
    _floating("x", x)
    batch = tuple(x.shape[:1]) if x.dim() == 4 else ()
    while x.dim() < 4:
        x = x[None]
    n = x.shape[2]
    given = None if positions is None else _position_tensor("positions", positions, x.device, batch, n)
    inv_freq, factor = frequencies(rope, x, context_length(rope, n, given))
    assert inv_freq is not None
    places = _first_positions(n, dtype=torch.float32, device=x.device) if given is None else given
    return x, inv_freq, places, factor


def parts(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Check partial results, outs [..., N, Dv] and lses [..., N]."""
    for name, tensors in (("outs", outs), ("lses", lses)):
        if not isinstance(tensors, Sequence) or not all(isinstance(x, Tensor) for x in tensors):
            raise InvalidInput(name, "a sequence of tensors", _describe(tensors))
        if not tensors or len(tensors) != len(outs):
            raise InvalidInput(name, "as many as outs, at least one", f"{len(tensors)} {name} and {len(outs)} outs")
        for x in tensors:
            _floating(name, x)
            _held(name, x)
            if x.dtype != tensors[0].dtype:
                raise InvalidInput(name, f"dtype {tensors[0].dtype} as the first", str(x.dtype))
            if x.device != outs[0].device:
                raise InvalidInput(name, f"device {outs[0].device} as the first of outs", str(x.device))
    shape = tuple(outs[0].shape)
    for out, lse in zip(outs, lses, strict=True):
        if not shape or tuple(out.shape) != shape:
            raise InvalidInput("outs", f"tensors [..., N, Dv] of one shape, that of the first {shape}", _describe(out))
        if tuple(lse.shape) != shape[:-1]:
            raise InvalidInput("lses", f"tensors of shape {shape[:-1]}", _describe(lse))
    return list(outs), list(lses)


def query_rows(rows: Sequence[int] | Tensor, nq: int, device: torch.device) -> Tensor:
    """Check rows [R] of 0..nq - 1, or of -nq..-1 from the end: int64 [R], none negative."""
    found = int_list("rows", rows)
    if any(not -nq <= row < nq for row in found):  # before any of them meets 64 bits
        raise InvalidInput("rows", f"ints of {-nq} to {nq - 1}", found)
    return torch.tensor([row % nq for row in found], dtype=torch.int64, device=device)


def int_list(name: str, x: object) -> list[int]:
    """A sequence of ints, or an int tensor of one dimension, as a list."""
    if isinstance(x, Tensor):
        if x.dim() == 1 and x.dtype in _INTEGERS and _is_strided(x) and not x.is_meta:
            return _held(name, x).tolist()
    elif isinstance(x, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) for n in x):
        return list(x)
    raise InvalidInput(name, "a sequence of ints, or an int tensor of one dimension", _describe(x))


def log_sums(lse: Tensor | None, problem: Problem, device: torch.device) -> Tensor | None:
    """Check the lse of a call, [B, Hq, Nq]; it comes back in the dtype of sums."""
    lse = _floats("lse", lse, ((problem.batch, problem.q_heads, problem.nq),), device)
    return None if lse is None else _convert(lse, problem.accumulate_dtype)


def count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _INT32_MAX:
        raise InvalidInput(name, "an int from 0 to 2^31 - 1", _describe(value))


def flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise InvalidInput(name, "a bool", _describe(value))


def rotation_problem(x: Tensor, rope: Rope) -> Problem:
    """A rotation alone, described as the call it would be part of."""
    batch, heads, n, width = x.shape
    return Problem(
        batch=batch,
        q_heads=heads,
        kv_heads=heads,
        nq=n,
        nk=n,
        head_dim=width,
        v_head_dim=width,
        dtype=x.dtype,
        device=x.device.type,
        mask=Mask(),
        scale=1.0,
        interleaved=rope.interleaved,
        features=("rope",),
        needs_grad=torch.is_grad_enabled() and x.requires_grad,
    )


def _problem(
    tensors: Tensors,
    mask: Mask,
    batch: int,
    scale: float | None,
    softcap: float | None,
    rope: Rope | None,
    factor: float,
    dropout_p: float,
    deterministic: bool,
) -> Problem:
    q, k, v = tensors.q, tensors.k, tensors.v
    (_, q_heads, nq, width), (_, kv_heads, nk, _) = q.shape, k.shape
    scale, softcap = _scale(scale, width, q.dtype), _softcap(softcap, q.dtype)
    flag("deterministic", deterministic)
    needs_grad = torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or any(x is not None and x.requires_grad for x in (tensors.bias, tensors.alibi_slopes, tensors.sink_logits))
    )
    return Problem(
        batch=batch,
        q_heads=q_heads,
        kv_heads=kv_heads,
        nq=nq,
        nk=nk,
        head_dim=width,
        v_head_dim=v.shape[-1],
        dtype=q.dtype,
        device=q.device.type,
        mask=mask,
        scale=scale,
        softcap=softcap,
        rope_factor=factor,
        interleaved=rope is not None and rope.interleaved,
        dropout_p=dropout_p,
        deterministic=deterministic,
        features=present_features(tensors, softcap, dropout_p),
        needs_grad=needs_grad,
    )


def _new_tokens(
    q: Tensor | None, k: Tensor | None, v: Tensor | None, batch: int, shape: CacheShape
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`_qkv` of a call on a cache, where q, or k and v, may be missing."""
    if (k is None) != (v is None):
        raise InvalidInput("v", "None exactly if k is", _describe(v))
    first = k if q is None else q
    if not isinstance(first, Tensor) or first.dim() != 4:
        raise InvalidInput("k" if q is None else "q", "a tensor [batch, heads, length, head_dim]", _describe(first))
    length = first.shape[2]
    found: list[Tensor | None] = []
    for name, x, width in (("q", q, shape.head_dim), ("k", k, shape.head_dim), ("v", v, shape.v_head_dim)):
        if x is None:
            found.append(None)
            continue
        if not _fits_cache(x, name == "q", batch, shape.kv_heads, length, width):
            heads = "a multiple of " if name == "q" else ""
            expected = f"a tensor [{batch}, {heads}{shape.kv_heads}, {length}, {width}], to fit the cache"
            raise InvalidInput(name, expected, _describe(x))
        _no_dtensor(name, x)
        _floating(name, x)
        if x.device != shape.device:
            raise InvalidInput(name, f"device {shape.device} as the cache", str(x.device))
        _no_derivative(name, x)
        x = _unit_stride(_autocast(_held(name, x))[0])
        if found and found[0] is not None and x.dtype != found[0].dtype:
            raise InvalidInput(name, f"dtype {found[0].dtype} as q", str(x.dtype))
        found.append(x)
    if found[1] is not None and found[2] is not None and found[1].dtype != found[2].dtype:
        raise InvalidInput("v", f"dtype {found[1].dtype} as k", str(found[2].dtype))
    return found[0], found[1], found[2]


def _no_dtensor(name: str, x: object) -> None:
    if is_dtensor(x):
        raise InvalidInput(name, "a plain tensor (see DTensor.to_local)", "a DTensor")


def _no_derivative(name: str, x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise InvalidInput(name, "no gradient in a call on a cache (see torch.no_grad)", "requires_grad")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise InvalidInput(name, "no derivative in a call on a cache", "a dual tensor")


def _fits_cache(x: object, is_query: bool, batch: int, kv_heads: int, length: int, width: int) -> bool:
    if not isinstance(x, Tensor) or x.dim() != 4:
        return False
    fits = x.shape[1] % kv_heads == 0 if is_query else x.shape[1] == kv_heads
    return fits and (x.shape[0], x.shape[2], x.shape[3]) == (batch, length, width)


def _cache_mask(causal: bool, window: Window, sinks: int | None, shape: CacheShape) -> Mask:
    mask = _mask(causal, window, shape.sinks if sinks is None else sinks, "end")
    if shape.window is None:
        return mask
    if mask.left is None:
        mask = replace(mask, left=shape.window - 1)
    for name, value, most in (("window", mask.left, shape.window - 1), ("sinks", mask.sinks, shape.sinks)):
        if value is not None and value > most:
            kept = f"the cache's {shape.window}" if name == "window" else f"the cache's {most}"
            raise InvalidInput(name, f"at most {kept}", window if name == "window" else sinks)
    return mask


def _check_ring(mask: Mask, shape: CacheShape, after: list[int], counts: list[int], oldest: Sequence[int]) -> None:
    """Raise InvalidInput if a query of old tokens sees a key whose slot another token has taken or had."""
    for length, count, held in zip(after, counts, oldest, strict=True):
        seen = max(shape.sinks, 0 if mask.left is None else length - count - mask.left)
        if count and seen < min(held, length):
            raise InvalidInput("window", "keys that the ring still holds", f"keys from {seen} on; it has {held} on")


def draft_tree(tree: object, batch: int, nq: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ancestors (bool, the token itself included) and depths of drafts: [T, T] and [T], or [B, T, T] and [B, T]."""
    if isinstance(tree, Tensor):
        tree = _int_tensor("tree", tree, ((nq,), (batch, nq)), tree.device).tolist()
    if not isinstance(tree, Sequence) or not tree:
        raise InvalidInput("tree", f"ints [{nq}] or [{batch}, {nq}]", _describe(tree))
    by_sequence = isinstance(tree[0], (list, tuple))
    if by_sequence and (len(tree) != batch or not all(isinstance(row, (list, tuple)) for row in tree)):
        raise InvalidInput("tree", f"ints [{nq}] or [{batch}, {nq}]", f"{len(tree)} rows for {batch} sequences")
    parents = [tuple(row) for row in tree] if by_sequence else [tuple(tree)]
    for row in parents:
        if len(row) != nq or not all(type(n) is int and -1 <= n < i for i, n in enumerate(row)):
            raise InvalidInput("tree", f"{nq} parents, -1 or less than the token's own number", f"{list(row)}"[:80])
    found = [_ancestors(row) for row in parents]
    branches, depths = found[0] if len(found) == 1 else (torch.stack(parts) for parts in zip(*found, strict=True))
    return branches.to(device), depths.to(device)


@lru_cache(maxsize=256)
def _ancestors(parents: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    branches = torch.eye(len(parents), dtype=torch.bool, device="cpu")
    for i, parent in enumerate(parents):
        if parent >= 0:
            branches[i] |= branches[parent]
    return branches, (branches.sum(-1) - 1).to(torch.int32)


def _qkv(q: Tensor, k: Tensor, v: Tensor, axes: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Rank, dtype, device, head counts and lengths; the last dimension of each gets unit stride."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != len(axes):
            raise InvalidInput(name, f"a tensor [{', '.join(axes)}]", _describe(x))
        _floating(name, x)
    device = q.device
    for name, x in (("k", k), ("v", v)):
        if x.device != device:
            raise InvalidInput(name, f"device {device} as q", str(x.device))
    q, k, v = _autocast(q, k, v)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise InvalidInput(name, f"dtype {q.dtype} as q", str(x.dtype))
    heads = axes.index("heads")
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    q_heads, kv_heads = q_shape[heads], k_shape[heads]
    if q_shape[-1] < 1:
        raise InvalidInput("q", "head_dim >= 1", "0")
    if k_shape[-1] != q_shape[-1]:
        raise InvalidInput("k", f"head_dim {q_shape[-1]} as q", f"shape {tuple(k_shape)}")
    if v_shape[-1] < 1:
        raise InvalidInput("v", "head_dim >= 1", "0")
    if v_shape[:-1] != k_shape[:-1]:
        raise InvalidInput("v", f"k's shape {tuple(k_shape)} but for head_dim", f"shape {tuple(v_shape)}")
    if kv_heads < 1 or q_heads % kv_heads:
        raise InvalidInput("q", f"a number of heads that is a multiple of k's {kv_heads}", f"shape {tuple(q_shape)}")
    return _unit_stride(q), _unit_stride(k), _unit_stride(v)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast q, k and v take its dtype, as in PyTorch's own attention (float64 stays)."""
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(x if x.dtype in (torch.float64, dtype) else _convert(_held("q, k, v", x), dtype) for x in tensors)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast on this type of device, None where autocast is off."""
    # PyTorch has no autocast on meta, and raises; is_autocast_available breaks graphs in PyTorch 2.9.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride()[-1] == 1 or x.shape[-1] == 1 else _contiguous(_held("q, k, v", x))


def _floating(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise InvalidInput(name, "dtype float32, float64, bfloat16 or float16", str(x.dtype))
    if not _is_strided(x):
        raise InvalidInput(name, "a strided (dense) tensor", _describe(x))


def _held(name: str, x: Tensor) -> Tensor:
    """x, which has memory. What wraps another tensor (torch.func, torch.compile, DTensor) is checked where it ends."""
    if type(x) in _PLAIN and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        check_memory(name, x)
    return x


def _is_strided(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_nested


def _mask(causal: bool, window: Window, sinks: int, align: str | int) -> Mask:
    mask = Mask.from_window(causal=causal, window=window, sinks=sinks, align=align)
    for name, value in (("window", mask.left), ("window", mask.right), ("sinks", mask.sinks), ("align", mask.offset)):
        if value is not None and not -_INT32_MAX <= value <= _INT32_MAX:
            raise InvalidInput(name, "an int below 2^31", repr(value))
    return mask


def _key_mask(key_mask: Tensor | None, batch: int, nk: int, device: torch.device) -> Tensor | None:
    if key_mask is None:
        return None
    return _tensor("key_mask", key_mask, "bool (True = visible)", (torch.bool,), ((batch, nk),), device)


def _bounds(
    bounds: tuple[Tensor, Tensor] | None, batch: int, nq: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    if bounds is None:
        return None, None
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise InvalidInput("bounds", "a pair (lo, hi) of int tensors", _describe(bounds))
    lo, hi = (_int_tensor("bounds", x, ((nq,), (batch, nq)), device) for x in bounds)
    if lo.shape != hi.shape:
        raise InvalidInput("bounds", f"lo and hi of one shape {tuple(lo.shape)}", f"hi of shape {tuple(hi.shape)}")
    return lo, hi


def _bias(bias: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    if bias is None:
        return None
    if not isinstance(bias, Tensor) or bias.dtype not in (*DTYPES, torch.bool) or not broadcasts(bias, shape):
        raise InvalidInput("bias", f"a floating or bool tensor broadcastable to {shape}", _describe(bias))
    while bias.dim() < 4:
        bias = bias[None]
    return _on_device("bias", bias, device)


def broadcasts(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether x is a strided tensor that broadcasts to `shape`."""
    if not _is_strided(x) or x.dim() > len(shape):
        return False
    own = shape[len(shape) - x.dim() :]
    return all(size == 1 or size == full for size, full in zip(x.shape, own, strict=True))


def _floats(name: str, x: Tensor | None, shapes: Sequence[tuple[int, ...]], device: torch.device) -> Tensor | None:
    return None if x is None else _tensor(name, x, "floating", DTYPES, shapes, device)


def _int_tensor(name: str, x: object, shapes: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    return _to_int32(_tensor(name, x, "int32", _INTEGERS, shapes, device))


def _cu_seqlens(name: str, x: object, device: torch.device) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() != 1 or x.shape[0] < 1:
        raise InvalidInput(name, "an int32 tensor [batch + 1]", _describe(x))
    return _to_int32(_tensor(name, x, "int32", _INTEGERS, (tuple(x.shape),), device))


def _place_tensor(name: str, x: object, batch: int, device: torch.device) -> Tensor:
    """Numbers that queries are placed by, int32 [B]; those beyond 32 bits become OUT_OF_RANGE, which ops refuse."""
    found = _tensor(name, x, "int32", _INTEGERS, ((batch,),), device)
    return _marked(found) if found.dtype == torch.int64 else found


@on_one_thread
def _marked(x: Tensor) -> Tensor:
    return torch.where((x < -_INT32_MAX) | (x > _INT32_MAX), OUT_OF_RANGE, x).to(torch.int32)


def longest(name: str, value: int | Tensor) -> int:
    """Check the length of the longest packed sequence: an int, or a tensor that holds one and is read."""
    found: Any = value
    if isinstance(found, Tensor) and found.numel() == 1 and found.dtype in _INTEGERS and not found.is_meta:
        found = found.item()
    is_int = isinstance(found, (int, torch.SymInt)) and not isinstance(found, bool)
    if not is_int or not within(found, 0, _INT32_MAX):
        raise InvalidInput(name, "an int from 0 to 2^31 - 1, or a tensor that holds one", _describe(found))
    return found


def within(value: int, low: int, high: int) -> bool:
    """Return whether low <= value <= high. A number that a graph reads from a tensor is checked when the graph runs."""
    if not torch.compiler.is_compiling() and not any(isinstance(x, torch.SymInt) for x in (value, low, high)):
        return low <= value <= high
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    if not guard_or_true(low <= value) or not guard_or_true(value <= high):
        return False
    torch._check(low <= value)
    torch._check(value <= high)
    return True


def _to_int32(x: Tensor) -> Tensor:
    """Numbers beyond 32 bits become the largest ones, which mean the same: beyond all tokens."""
    return _clamped(x) if x.dtype == torch.int64 else x


@on_one_thread
def _clamped(x: Tensor) -> Tensor:
    return x.clamp(-_INT32_MAX, _INT32_MAX).to(torch.int32)


def frequencies(rope: Rope | None, q: Tensor, length: int) -> tuple[Tensor | None, float]:
    """(inv_freq, factor) of a context of so many tokens, for heads as wide as q's."""
    if rope is None:
        return None, 1.0
    if not isinstance(rope, Rope):
        raise InvalidInput("rope", "None or a longattn.Rope", type(rope).__name__)
    if rope.dim > q.shape[-1]:
        raise InvalidInput("rope", f"a rotated width of at most head_dim {q.shape[-1]}", f"dim {rope.dim}")
    return rope.frequencies(length, q.device)


def context_length(rope: Rope | None, tokens: int, *positions: Tensor | None) -> int:
    """The length that frequencies may depend on: one more than the largest position, or `tokens` where none is given.

    Only a rope that looks at the length has positions read from their device, which waits for it.
    """
    given = [x for x in positions if x is not None and x.numel()]
    if not given or not isinstance(rope, Rope) or not rope.depends_on_length or given[0].is_meta:
        return tokens
    largest = _largest(given)
    if not largest < _FARTHEST:  # NaN, too
        raise InvalidInput("positions", f"numbers below 2^53 with a {type(rope.scaling).__name__}", largest)
    return max(1, math.floor(largest) + 1)


@on_one_thread
def _largest(tensors: Sequence[Tensor]) -> float:
    return torch.stack([x.amax() for x in tensors]).amax().item()


def rotated_positions(
    positions: Positions, rope: Rope | None, device: torch.device, batch: tuple[int, ...], nq: int, nk: int
) -> tuple[Tensor | None, Tensor | None]:
    """(for q or None, for k) as float32: the angle is a product of float32 numbers."""
    if positions is None:
        return None, None
    if rope is None:
        raise InvalidInput("positions", "None without rope (masks and ALiBi ignore positions)", _describe(positions))
    if isinstance(positions, Tensor):
        return None, _position_tensor("positions", positions, device, batch, nk)
    if not isinstance(positions, (tuple, list)) or len(positions) != 2:
        raise InvalidInput("positions", "a tensor or a pair of tensors (for q, for k)", _describe(positions))
    for_q, for_k = positions
    return (
        _position_tensor("positions[0]", for_q, device, batch, nq),
        _position_tensor("positions[1]", for_k, device, batch, nk),
    )


def _position_tensor(name: str, x: object, device: torch.device, batch: tuple[int, ...], n: int) -> Tensor:
    shapes = ((n,), (*batch, n)) if batch else ((n,),)
    found = _tensor(name, x, "int or float32", (*_INTEGERS, torch.float32), shapes, device)
    return found if found.dtype == torch.float32 else _convert(found, torch.float32)


def _check_reach(mask: Mask, nq: int, nk: int) -> None:
    """Queries read their rotation at entry p_i of positions: each that can see a key must stand inside."""
    first, last = mask.position(0, nq, nk), mask.position(nq - 1, nq, nk)
    if nq and nk and (last >= nk or (first < 0 and mask.right != 0)):
        raise InvalidInput(
            "positions",
            f"a pair (for q, for k), as queries stand at {first}..{last}, outside k's {nk} entries",
            "one tensor",
        )


def _dropout(dropout_p: float) -> float:
    return _number("dropout_p", dropout_p, "a number in [0, 1)", low=0.0, below=1.0)


def _seed(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    expected = "None, an int of 64 bits, or an int64 tensor with one entry"
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or not _is_strided(seed) or seed.numel() != 1:
            raise InvalidInput("seed", expected, _describe(seed))
        if seed.is_meta and device.type != "meta":
            raise InvalidInput("seed", expected, _describe(seed))
        return _held("seed", seed).reshape(1).to(device) if dropout_p else None
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63):
        raise InvalidInput("seed", expected, _describe(seed))
    if not dropout_p:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device="cpu").to(device)
    return torch.tensor([seed], dtype=torch.int64, device=device)


def _scale(scale: float | None, width: int, dtype: torch.dtype) -> float:
    """Half of the largest number of the sums' dtype is the limit, as exponents are scale / ln 2 times a product."""
    if scale is None:
        return 1.0 / math.sqrt(width)
    most = _DOUBLE.max / 2 if dtype == torch.float64 else _SINGLE.max / 2
    return _number("scale", scale, f"None or a number of at most {most:.3g} in magnitude", low=-most, below=most)


def _softcap(softcap: float | None, dtype: torch.dtype) -> float:
    if softcap is None:
        return 0.0
    limits = _DOUBLE if dtype == torch.float64 else _SINGLE
    expected = f"None, 0, or a number of {limits.tiny:.3g} to {limits.max:.3g}"
    cap = _number("softcap", softcap, expected, low=0.0)
    if cap and not limits.tiny <= cap <= limits.max:
        raise InvalidInput("softcap", expected, repr(softcap))
    return cap


def _number(name: str, value: float, expected: str, low: float = -math.inf, below: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidInput(name, expected, _describe(value))
    if not (-sys.float_info.max <= value <= sys.float_info.max and low <= value < below):
        raise InvalidInput(name, expected, repr(value))
    return float(value)


def _tensor(
    name: str,
    x: object,
    what: str,
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
) -> Tensor:
    """x itself, a strided tensor of one of these dtypes and shapes on q's device."""
    if not isinstance(x, Tensor) or x.dtype not in dtypes or not _is_strided(x) or tuple(x.shape) not in shapes:
        listing = " or ".join([str(list(shape)) for shape in shapes])
        article = "an" if what[0] in "aeiou" else "a"
        raise InvalidInput(name, f"{article} {what} tensor {listing}", _describe(x))
    return _on_device(name, x, device)


def _on_device(name: str, x: Tensor, device: torch.device) -> Tensor:
    if x.device != device:
        raise InvalidInput(name, f"device {device} as q", str(x.device))
    return _held(name, x)


def _describe(x: object) -> str:
    if isinstance(x, Tensor):
        if not _is_strided(x):
            return f"{'nested' if x.is_nested else str(x.layout)[6:]} tensor"
        return f"{str(x.dtype)[6:]} tensor of shape {tuple(x.shape)}"
    return f"{type(x).__name__} {x!r}"[:80]
