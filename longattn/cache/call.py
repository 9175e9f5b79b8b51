"""The public call: append, rotate and attend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from longattn import arguments, ops
from longattn.arguments import Window
from longattn.backends import registry
from longattn.cache.base import Cache, Room, in_turn
from longattn.errors import InvalidInput
from longattn.redirection import refuse_elsewhere
from longattn.rope import Rope


def attention_with_cache(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache: Cache,
    *,
    causal: bool = True,
    window: Window = None,
    sinks: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    rope: Rope | None = None,
    positions: Tensor | None = None,
    tree: Tensor | Sequence[int] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    sequences: Sequence[int] | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Append keys and values to a cache and attend to all that it holds: one step of a layer.

    The new tokens stand at the end of their sequences, queries and keys alike: where `attention` over the whole
    sequence has them. Prompts may come in pieces, and give what they give at once up to rounding. A rope whose
    frequencies change with the context (DynamicNTK, LongRoPE) takes those of the length after the call.

    Args:
        q: [B, Hq, T, D], float32, float64, bfloat16 or float16; any strides. B: the sequences of the call.
        k, v: [B, Hkv, T, D] and [B, Hkv, T, Dv], of q's dtype. Both None: attend to what is there, append nothing.
        cache: of these heads and widths, on q's device; its dtype is its own.
        causal, scale, softcap, alibi_slopes, sink_logits: as in `attention`; but causal unless said otherwise.
        window, sinks: as in `attention`; by default those of the cache, where it has them, and at most those.
        rope: rotates queries and keys; the same in every call until the cache is empty again.
        positions: int or float32 [T] or [B, T], in place of where the new tokens stand in the rotation. Not where
            keys are rotated on reading.
        tree: the new tokens are drafts that branch: for each its parent among them, or -1 if it follows the old
            tokens; int [T] or [B, T], each less than the token's own number. A token sees its ancestors, and stands as
            far behind the old tokens as it has ancestors. `Cache.accept` keeps one branch.
        lengths: new tokens of each sequence, T by default; the rest of its rows is padding.
        sequences: which of the cache's sequences the rows of q, k and v are, all in order by default.
        return_lse: return (out, lse).
        backend: "auto" takes the first that can run the call; a named one never falls back.

    Returns:
        out [B, Hq, T, Dv], laid out in memory as q, 0 where padded; with return_lse also lse [B, Hq, T], -inf there.

    Raises:
        InvalidInput: an argument breaks the contract or does not fit the cache, or needs a gradient; or another call
            on the cache runs, in another thread.
        CacheFull: no room for the new tokens.
        Unsupported: no backend, or not the named one, can run the call.
        After any exception the cache is as it was.
    """
    refuse_elsewhere("attention_with_cache")
    if not isinstance(cache, Cache):
        raise InvalidInput("cache", "a KVCache, SlidingKVCache or PagedKVCache", type(cache).__name__)
    arguments.flag("return_lse", return_lse)
    out, lse = _attend(
        cache,
        q,
        k,
        v,
        causal=causal,
        window=window,
        sinks=sinks,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sink_logits=sink_logits,
        rope=rope,
        positions=positions,
        tree=tree,
        lengths=lengths,
        sequences=sequences,
        backend=backend,
    )
    return (out, lse) if return_lse else out


@in_turn
def _attend(
    cache: Cache,
    /,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    rope: Rope | None,
    lengths: Tensor | Sequence[int] | None,
    sequences: Sequence[int] | None,
    backend: str,
    **keywords: Any,
) -> tuple[Tensor, Tensor]:
    rows = cache._rows(sequences)
    counts = arguments.new_lengths(lengths, len(rows), q)
    cache._check_rope(rope)
    appended = counts if k is not None else [0] * len(rows)
    cache._check_counts(rows, counts)
    after = [cache._lengths[row] + count for row, count in zip(rows, appended, strict=True)]
    shape = cache._shape()
    rotation = cache._rotations.of(shape, rope, after, max(counts), arguments.accumulate_dtype(q))
    tensors, problem = arguments.cached(
        q,
        k,
        v,
        shape,
        after,
        counts,
        rotation=rotation,
        oldest=[cache._oldest_held(row) for row in rows] if k is None else (),
        **keywords,
    )
    chosen = registry.select(problem, backend).name

    def run(room: Room) -> tuple[Tensor, Tensor]:
        return ops.attention_with_cache(tensors, room.slots, problem, chosen)

    return cache._run(rows, appended, rope, run)
