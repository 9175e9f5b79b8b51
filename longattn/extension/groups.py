"""Shifted groups: cheap attention for fine-tuning on long texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.extension.parts import Part, attend_in_parts
from longattn.extension.places import Places

__all__ = ["attend_in_shifted_groups"]


def attend_in_shifted_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Places,
    group: int,
    *,
    first_seen: Tensor | None = None,
    sink_logits: Tensor | None = None,
    **keywords: Any,
) -> Tensor:
    """Causal attention within groups of tokens; for half of the heads groups start half a group later.

    Half of the key heads, rounded down; of a single one, half of the query heads.

    Args:
        q, k, v, keywords: as in `attend_in_parts`.
        group: tokens of a group, even; the first group of shifted heads has half as many.
        first_seen: int [Nq] or [B, Nq], the first key that each query may see, for layers with chunks of their own.

    Raises:
        InvalidInput: a single head.
    """
    q_heads, kv_heads = q.shape[1], k.shape[1]
    if q_heads == 1:
        raise InvalidInput("heads", "at least 2, as half of them are shifted", q_heads)
    kept = kv_heads - kv_heads // 2 if kv_heads > 1 else 1
    kept_queries = kept * (q_heads // kv_heads) if kv_heads > 1 else q_heads - q_heads // 2
    halves = (
        (slice(0, kept_queries), slice(0, kept), 0),
        (slice(kept_queries, None), slice(kept, None) if kv_heads > 1 else slice(None), group // 2),
    )
    at = places.in_sequence
    outs = []
    for of_q, of_k, shift in halves:
        first = (torch.div(at + shift, group, rounding_mode="floor") * group - shift).clamp(min=0)
        lo = places.starts + first
        part = Part(lo if first_seen is None else lo.maximum(first_seen), places.queries + 1)
        sinks = None if sink_logits is None else sink_logits[of_q]
        outs.append(attend_in_parts(q[:, of_q], k[:, of_k], v[:, of_k], [part], sink_logits=sinks, **keywords))
    return torch.cat(outs, dim=1)
