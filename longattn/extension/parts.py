"""Attention whose keys stand elsewhere near than far: one call for each part of them, merged through lse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longattn.extension.places import Places
from longattn.functional import attention, merge_attention
from longattn.redirection import refuse_elsewhere
from longattn.rope import Rope

__all__ = ["Part", "attend_in_parts", "window_parts"]


class Part(NamedTuple):
    """Some of the keys that a query sees: lo <= j < hi, int64 [Nq] or [B, Nq], and where both stand in the rotation.

    positions: for queries [Nq] or [B, Nq] and for keys [Nk] or [B, Nk]; None: where they stand in their sequence.
    """

    lo: Tensor
    hi: Tensor
    positions: tuple[Tensor, Tensor] | None = None


def window_parts(places: Places, window: int | None, sinks: int, at_cache: bool) -> list[Part]:
    """What a causal query sees of a sliding layer: its window, and the sinks before that.

    Args:
        window: keys, the query's own included; None: all.
        at_cache: sinks stand where they would in a cache of window + sinks tokens (`SlidingKVCache`,
            positions="cache"): query p and sink j are min(p, window + sinks - 1) - j apart.
    """
    p, at = places.queries, places.in_sequence
    if window is None:
        return [Part(places.starts, p + 1)]
    oldest = torch.maximum(places.starts, p - window + 1)
    parts = [Part(oldest, p + 1)]
    if sinks and places.keys.shape[-1] > window:
        moved = (at.clamp(max=window + sinks - 1), places.keys) if at_cache else None
        parts.append(Part(places.starts, torch.minimum(places.starts + sinks, oldest), moved))
    return parts


def attend_in_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[Part],
    *,
    rope: Rope | None,
    standing: tuple[Tensor, Tensor] | None,
    sink_logits: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    **keywords: Any,
) -> Tensor:
    """One softmax over disjoint parts of the keys: memory linear in the tokens, differentiable.

    Args:
        q, k, v, keywords: as in `longattn.attention`, without what says which keys are seen.
        parts: what each query sees; no key in two of a query's parts.
        rope: turns queries and keys, where they have positions.
        standing: positions of the queries and keys of parts that have none; None: these stay as they are.
        sink_logits: counted once. dropout_p: the weights that are dropped are those of one call.

    Raises:
        Unsupported: tokens are a shard of a sequence (longattn.distributed.context_parallel).
    """
    refuse_elsewhere("attention in parts")
    if dropout_p and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device="cpu")
    outs, lses = [], []
    for number, part in enumerate(parts):
        positions = None if rope is None else part.positions or standing
        out, lse = attention(
            q,
            k,
            v,
            bounds=(part.lo.to(torch.int32), part.hi.to(torch.int32)),
            rope=None if positions is None else rope,
            positions=positions,
            sink_logits=sink_logits if number == 0 else None,
            dropout_p=dropout_p,
            seed=seed,
            return_lse=True,
            **keywords,
        )
        outs.append(out)
        lses.append(lse)
    return outs[0] if len(outs) == 1 else merge_attention(outs, lses)[0]
