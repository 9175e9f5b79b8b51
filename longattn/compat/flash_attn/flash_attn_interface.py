"""flash_attn.flash_attn_interface: attention in flash-attn's layouts.

Shared by all functions, as flash-attn documents it: the last query stands at the last key ("bottom right"). A query at
position p sees keys p - window_size[0] .. p + window_size[1], -1 for unbounded, none later than p if causal. ALiBi
subtracts slope * |p - j|. A query that sees nothing gives 0 with softmax_lse +inf.

What differs: float32 and float64 are allowed, on every device; any headdim of our backends; headdim of v of its own;
dropout beside softcap; gradients of alibi_slopes and through softmax_lse.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from longattn.arguments import flag, longest, within
from longattn.compat.errors import described, renamed
from longattn.compat.flash_attn.checks import (
    DENSE,
    PACKED,
    PAGES,
    check_axes,
    check_contents,
    check_heads,
    check_indices,
    check_table,
    softcap_or_none,
    window_sides,
)
from longattn.compat.flash_attn.kvcache import Cache, packed_from_pages
from longattn.compat.flash_attn.layers.rotary import check_width, dense_tables, rotated
from longattn.compat.flash_attn.packing import token_places
from longattn.errors import InvalidInput
from longattn.functional import attention, attention_varlen
from longattn.tracing import leaf

WindowSize = Iterable[int]
Output = Tensor | tuple[Tensor, Tensor, Tensor | None]

USE_TRITON_ROCM = False
_THEIR_NAMES = {"scale": "softmax_scale", "window": "window_size"}
_COLUMNS = 256  # every backend's largest head_dim of v


@leaf
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """Attention over q [batch, seqlen_q, nheads, headdim] and k, v [batch, seqlen_k, nheads_k, headdim].

    Args:
        dropout_p: probability of dropping a weight; drawn from torch's default generator.
        softmax_scale: 1 / sqrt(headdim) by default.
        causal, window_size: as above.
        softcap: scores become softcap * tanh(scores / softcap); up to 0: they do not.
        alibi_slopes: [nheads] or [batch, nheads].
        deterministic: bitwise the same gradients in every run.
        return_attn_probs: return (out, softmax_lse, S_dmask); for tests, as memory is quadratic with dropout.

    Returns:
        out, like q. softmax_lse [batch, nheads, seqlen_q], float32 at least. S_dmask [batch, nheads, seqlen_q,
        seqlen_k] in q's dtype, without a gradient, None without dropout: the weights before dropout, each row divided
        by its largest; negative where they were dropped.

    Raises:
        InvalidInput: an argument breaks the contract.
        Unsupported: no backend can run the call.
    """
    keywords = _keywords(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _dense((q, k, v), ("q", "k", "v"), dropout_p, keywords, return_attn_probs)


@leaf
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """`flash_attn_func` over kv [batch, seqlen_k, 2, nheads_k, headdim]."""
    check_axes("kv", kv, ("batch", "seqlen_k", 2, "nheads_k", "headdim"))
    keywords = _keywords(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _dense((q, *kv.unbind(2)), ("q", "kv", "kv"), dropout_p, keywords, return_attn_probs)


@leaf
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """`flash_attn_func` over qkv [batch, seqlen, 3, nheads, headdim]."""
    check_axes("qkv", qkv, ("batch", "seqlen", 3, "nheads", "headdim"))
    keywords = _keywords(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _dense(qkv.unbind(2), ("qkv", "qkv", "qkv"), dropout_p, keywords, return_attn_probs)


@leaf
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Output:
    """`flash_attn_func` over packed sequences q [total_q, nheads, headdim] and k, v [total_k, nheads_k, headdim].

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1], where each sequence starts and the last ends.
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence, an int or a tensor that holds one.
        block_table: int32 [batch, max_blocks]: k and v are pages [blocks, block_size, nheads_k, headdim], and the keys
            of sequence b stand in pages block_table[b]; cu_seqlens_k says how many. The pages are copied together.

    Returns:
        out, like q. softmax_lse [nheads, total_q]. S_dmask [batch, nheads, max_seqlen_q, max_seqlen_k].

    Raises:
        InvalidInput, Unsupported: as `flash_attn_func`.
    """
    keywords = _keywords(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    if block_table is not None:
        check_axes("k", k, PAGES)
        check_axes("v", v, PAGES)
        check_axes("q", q, PACKED)
        check_heads(q, k, v)
        k, v, cu_seqlens_k = packed_from_pages(k, v, block_table, cu_seqlens_k)
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _packed((q, k, v), sequences, {}, dropout_p, keywords, return_attn_probs)


@leaf
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """`flash_attn_varlen_func` over kv [total_k, 2, nheads_k, headdim]."""
    check_axes("kv", kv, ("total_k", 2, "nheads_k", "headdim"))
    keywords = _keywords(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    names = {"k": "kv", "v": "kv"}
    return _packed((q, *kv.unbind(1)), sequences, names, dropout_p, keywords, return_attn_probs)


@leaf
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """`flash_attn_varlen_func` over qkv [total, 3, nheads, headdim]."""
    check_axes("qkv", qkv, ("total", 3, "nheads", "headdim"))
    keywords = _keywords(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    sequences = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    names = dict.fromkeys("qkv", "qkv") | {"cu_seqlens_q": "cu_seqlens", "max_seqlen_q": "max_seqlen"}
    names |= {"cu_seqlens_k": "cu_seqlens", "max_seqlen_k": "max_seqlen"}
    return _packed(qkv.unbind(1), sequences, names, dropout_p, keywords, return_attn_probs)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Put new keys and values into a cache, in place, and attend to all that it holds. Without a backward pass.

    Args:
        q: [batch, seqlen_q, nheads, headdim].
        k_cache, v_cache: [batch_cache, seqlen_cache, nheads_k, headdim]; with block_table pages [blocks, block_size,
            nheads_k, headdim].
        k, v: [batch, seqlen_new, nheads_k, headdim], put at places cache_seqlens and after.
        rotary_cos, rotary_sin: [seqlen_rotary, rotary_dim / 2], beside k. New key i turns by row cache_seqlens + i, and
            so does query i if causal or if window_size bounds a side; else every query turns by row cache_seqlens.
        cache_seqlens: tokens in the cache before the call, an int or an int32 tensor [batch]; None: it is full.
        cache_batch_idx: int32 [batch], the cache's row of each sequence; 0, 1, ... by default.
        cache_leftpad: int32 [batch], where the keys of each sequence start.
        block_table: int32 [batch, max_blocks], the pages of each sequence; they are copied together to be read.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`.
        rotary_interleaved: pairs are entries (2i, 2i + 1) in place of (i, i + rotary_dim / 2).
        num_splits: taken and not needed: our backends share out keys by themselves.
        return_softmax_lse: return (out, softmax_lse [batch, nheads, seqlen_q]).

    Raises:
        InvalidInput: an argument breaks the contract, lengths pass the cache's capacity, or a tensor requires grad
            while gradients are recorded.
        Unsupported: no backend can run the call.
    """
    keywords = _keywords(softmax_scale, causal, window_size, softcap, alibi_slopes, False)
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "alibi_slopes": alibi_slopes}
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise InvalidInput(name, "no gradient (call it under torch.no_grad())", "requires_grad=True")
    if isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 0:
        raise InvalidInput("num_splits", "an int >= 0", described(num_splits))
    flag("return_softmax_lse", return_softmax_lse)
    check_axes("q", q, DENSE)
    batch = q.shape[0]
    cache = Cache.checked(k_cache, v_cache, cache_batch_idx, block_table, batch, q.device)
    check_heads(q, k_cache, v_cache, ("q", "k_cache", "v_cache"))
    if (k is None) != (v is None):
        raise InvalidInput("v" if v is None else "k", "both k and v, or neither", None)
    added = 0
    if k is not None and v is not None:
        check_axes("k", k, (batch, "seqlen_new", *k_cache.shape[2:]))
        check_axes("v", v, (batch, k.shape[1], *v_cache.shape[2:]))
        added = k.shape[1]
    for name, stored in (("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if stored is not None and (stored.dtype != q.dtype or stored.device != q.device):
            raise InvalidInput(name, f"{q.dtype} on {q.device} as q", f"{stored.dtype} on {stored.device}")
    lengths = _cache_lengths(cache_seqlens, batch, cache, added, q.device)

    if rotary_cos is not None or rotary_sin is not None:
        if k is None or lengths is None:
            raise InvalidInput("rotary_cos", "None without k and cache_seqlens", described(rotary_cos))
        q, k = _rotated(q, k, rotary_cos, rotary_sin, lengths, rotary_interleaved, causal, keywords["window"])
    if k is not None and v is not None:
        if lengths is None:
            raise InvalidInput("cache_seqlens", "an int or an int32 tensor beside k", None)
        cache.write(k, v, lengths)
        lengths = lengths + added

    keys, values = cache.read(batch, lengths)
    key_mask = None
    if cache_leftpad is not None:
        if block_table is not None:
            raise InvalidInput("cache_leftpad", "None beside block_table", described(cache_leftpad))
        check_indices("cache_leftpad", cache_leftpad, (batch,), q.device)
        check_contents("cache_leftpad", cache_leftpad, 0, cache.capacity, "places of the cache")
        key_mask = torch.arange(keys.shape[1], device=q.device) >= cache_leftpad[:, None]
    with renamed(**_THEIR_NAMES, k="k_cache", v="v_cache"):
        out, lse = attention(
            q.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            key_lens=lengths,
            key_mask=key_mask,
            return_lse=True,
            **keywords,
        )
    out = out.transpose(1, 2)
    return (out, _their_lse(lse)) if return_softmax_lse else out


def _get_block_size_n(device: object, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """How many keys share the maximum by which S_dmask is divided, as flash-attn's tests ask: all of a row."""
    return sys.maxsize


def _keywords(
    softmax_scale: float | None,
    causal: bool,
    window_size: WindowSize,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
) -> dict[str, Any]:
    """Their arguments as ours."""
    return {
        "scale": softmax_scale,
        "causal": causal,
        "window": window_sides(window_size),
        "softcap": softcap_or_none(softcap),
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
    }


def _dense(
    qkv: tuple[Tensor, ...],
    names: tuple[str, str, str],
    dropout_p: float,
    keywords: dict[str, Any],
    return_attn_probs: bool,
) -> Output:
    for name, x in zip(names, qkv, strict=True):
        check_axes(name, x, DENSE)
    q, k, v = qkv
    check_axes(names[1], k, (q.shape[0], *DENSE[1:]))
    check_heads(q, k, v, names)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        with renamed(**_THEIR_NAMES, **dict(zip("qkv", names, strict=True))):
            out, lse = attention(q, k, v, dropout_p=dropout_p, seed=seed, return_lse=True, **keywords)
        return out, lse

    flag("return_attn_probs", return_attn_probs)
    if not return_attn_probs:
        return attend(q, k, v, dropout_p, None)[0].transpose(1, 2)
    seed = _seed(dropout_p)
    out, lse = attend(q, k, v, dropout_p, seed)
    mask = None
    if seed is not None:
        nk = k.shape[2]
        one_hot = torch.eye(nk, device=k.device).expand(*k.shape[:2], nk, nk)
        mask = _signed_weights(lambda *arguments: attend(*arguments)[0], q, k, one_hot, dropout_p, seed)
    return out.transpose(1, 2), _their_lse(lse), mask


def _packed(
    qkv: tuple[Tensor, ...],
    sequences: tuple[Tensor, Tensor, int | Tensor, int | Tensor],
    names: dict[str, str],
    dropout_p: float,
    keywords: dict[str, Any],
    return_attn_probs: bool,
) -> Output:
    q, k, v = qkv

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        with renamed(**_THEIR_NAMES, **names):
            out, lse = attention_varlen(
                q, k, v, *sequences, dropout_p=dropout_p, seed=seed, return_lse=True, **keywords
            )
        return out, lse

    flag("return_attn_probs", return_attn_probs)
    if not return_attn_probs:
        return attend(q, k, v, dropout_p, None)[0]
    seed = _seed(dropout_p)
    out, lse = attend(q, k, v, dropout_p, seed)
    mask = None
    if seed is not None:
        cu_seqlens_q, cu_seqlens_k = sequences[:2]
        longest_q, longest_k = longest("max_seqlen_q", sequences[2]), longest("max_seqlen_k", sequences[3])
        at_k = token_places(cu_seqlens_k, k.shape[0])
        one_hot = (at_k.place[:, None] == torch.arange(longest_k, device=k.device)).float()
        one_hot = one_hot[:, None].expand(-1, k.shape[1], -1)
        weights = _signed_weights(lambda *arguments: attend(*arguments)[0], q, k, one_hot, dropout_p, seed)
        at_q = token_places(cu_seqlens_q, q.shape[0])
        mask = weights.new_zeros(cu_seqlens_q.shape[0] - 1, longest_q, q.shape[1], longest_k)
        mask[at_q.sequence[at_q.inside], at_q.place[at_q.inside]] = weights[at_q.inside]
        mask = mask.transpose(1, 2)
    return out, _their_lse(lse), mask


def _seed(dropout_p: float) -> Tensor | None:
    """Drawn as attention itself would, so that what is dropped does not depend on return_attn_probs."""
    if not isinstance(dropout_p, (int, float)) or not dropout_p > 0:
        return None
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device="cpu")


@torch.no_grad()
def _signed_weights(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, one_hot: Tensor, dropout_p: float, seed: Tensor
) -> Tensor:
    """S_dmask: the weights over their row's largest, negative where dropped. [..., number of keys], in q's dtype.

    With the rows of the identity for values, attention gives its weights: `one_hot` [..., keys, number of keys].
    """
    dtype = q.dtype
    compute = torch.promote_types(dtype, torch.float32)
    q, k = q.detach().to(compute), k.detach().to(compute)
    if not one_hot.shape[-1]:
        return q.new_zeros(*q.shape[:-1], 0, dtype=dtype)
    columns = one_hot.to(compute).split(_COLUMNS, -1)
    weights = torch.cat([attend(q, k, part, 0.0, None) for part in columns], -1)
    kept = torch.cat([attend(q, k, part, dropout_p, seed) for part in columns], -1)
    largest = weights.amax(-1, keepdim=True)
    scaled = weights / torch.where(largest > 0, largest, 1.0)
    dropped = (kept == 0) & (weights > 0)
    return torch.where(dropped, -scaled.clamp(min=torch.finfo(dtype).tiny), scaled).to(dtype)


def _their_lse(lse: Tensor) -> Tensor:
    """FlashAttention-2 says +inf where nothing is seen."""
    return torch.where(lse == -torch.inf, torch.inf, lse)


def _cache_lengths(
    cache_seqlens: int | Tensor | None, batch: int, cache: Cache, added: int, device: torch.device
) -> Tensor | None:
    """int32 [batch]: the tokens in the cache, or None if it is full."""
    if cache_seqlens is None:
        return None
    most = cache.capacity - added

    def room() -> str:
        holder = "k_cache" if cache.block_table is None else "block_table"
        return f"{holder} has room for {cache.capacity}, {added} of them new"

    if isinstance(cache_seqlens, Tensor):
        check_indices("cache_seqlens", cache_seqlens, (batch,), device)
        check_contents("cache_seqlens", cache_seqlens, 0, most, room)
        return cache_seqlens.to(torch.int32)
    is_int = isinstance(cache_seqlens, (int, torch.SymInt)) and not isinstance(cache_seqlens, bool)
    if not is_int or not within(cache_seqlens, 0, most):
        raise InvalidInput("cache_seqlens", f"0..{most} ({room()}), or a tensor of such", described(cache_seqlens))
    return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=device)


def _rotated(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    lengths: Tensor,
    interleaved: bool,
    causal: bool,
    window: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """q and k turned by the rows of the tables from `lengths` on; q by that row alone if order means nothing to it."""
    cos = check_table("rotary_cos", cos, None, q.device)
    sin = check_table("rotary_sin", sin, tuple(cos.shape), q.device)
    check_width("rotary_cos", cos.shape[1], q)
    flag("rotary_interleaved", interleaved)
    in_order = causal or window != (-1, -1)
    batch = q.shape[0]
    with renamed(seqlen_offsets="rotary_cos"):
        for_q = dense_tables(cos, sin, lengths, batch, q.shape[1] if in_order else 1)
        for_k = dense_tables(cos, sin, lengths, batch, k.shape[1])
    return rotated(q, *for_q, interleaved), rotated(k, *for_k, interleaved)
