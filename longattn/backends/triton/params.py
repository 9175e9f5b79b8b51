"""What a kernel is told, as named tuples: Triton compiles an absent field away, so None costs nothing on the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from longattn.backends.triton.config import LONGEST_TILE
from longattn.mask import Mask
from longattn.problem import Problem

_SCORED = frozenset({"softcap", "bias", "alibi_slopes"})
_UNBOUNDED = 1 << 30  # a window side that no position reaches the end of


class Rows(NamedTuple):
    """A tensor [B, H, N, D] with unit stride in D: its address, and strides in elements. Of none, Nones.

    (Triton 3.6 cannot ask a tuple that holds None whether it is None.)
    """

    ptr: Any
    batch: Any
    head: Any
    token: Any
    wide: Any  # not None: offsets within a tile may exceed 32 bits

    @classmethod
    def of(cls, x: Tensor | None) -> Rows:
        if x is None:
            return cls(None, None, None, None, None)
        batch, head, token, _ = x.stride()
        return cls(x, batch, head, token, 1 if token * LONGEST_TILE >= 2**31 else None)


class Sequences(NamedTuple):
    """Where each sequence lies. Packed ones (cu_q, cu_k int32 [B + 1]) share the rows of batch 0."""

    nq: Any  # queries of a sequence; of all packed sequences
    nk: Any
    key_lens: Any  # int32 [B]
    cu_q: Any
    cu_k: Any


class Visibility(NamedTuple):
    """The fields of Mask (None: unbounded, or no sinks), and the tensors beside it."""

    left: Any
    right: Any
    sinks: Any
    shift: Any
    from_end: Any  # 0 or 1
    offset: Any = None  # int32 [B]: in place of shift
    key_mask: Any = None  # uint8 [B, Nk]
    lo: Any = None  # int32 [Nq] or [B, Nq]
    hi: Any = None
    bounds_batch: Any = 0  # stride of lo and hi

    @classmethod
    def of(cls, mask: Mask, *beside: Any) -> Visibility:
        """Of a mask, and what stands beside it: offset and all that follow."""
        return cls(
            None if mask.left is None else min(mask.left, _UNBOUNDED),
            None if mask.right is None else min(mask.right, _UNBOUNDED),
            min(mask.sinks, _UNBOUNDED) if mask.sinks else None,
            mask.offset,
            int(mask.from_end),
            *beside,
        )


class ScoreTerms(NamedTuple):
    """How products become scores."""

    scale: Any
    softcap: Any
    bias: Any  # floating, or uint8 for bool; broadcast dimensions have stride 0
    bias_batch: Any
    bias_head: Any
    bias_query: Any
    bias_key: Any
    slopes: Any  # float32 [Hq] or [B, Hq]
    slopes_batch: Any

    @classmethod
    def of(cls, problem: Problem, bias: Tensor | None, slopes: Tensor | None) -> ScoreTerms:
        strides = [0, 0, 0, 0]
        if bias is not None:
            strides = [0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)]
            bias = bias.view(torch.uint8) if bias.dtype == torch.bool else bias
        batch, head, query, key = strides
        slopes = float32(slopes)
        slopes_batch = problem.q_heads if slopes is not None and slopes.dim() == 2 else 0
        softcap = problem.softcap or None
        return cls(problem.scale, softcap, bias, batch, head, query, key, slopes, slopes_batch)


class Dropout(NamedTuple):
    """An entry is dropped if its 32 random bits are below the threshold; what is kept is scaled up."""

    seed: Any = None  # int64 [1], or None: no dropout
    threshold: Any = None
    scale: Any = None
    sequence: Any = None  # problem.Origin, from which counters count; None: the call's own first
    head: Any = None
    query: Any = None
    key: Any = None
    uneven: Any = None  # not None: key is no multiple of 4, which is how many numbers a counter gives


class Pages(NamedTuple):
    """problem.Slots; or, without a table, the keys and values of a call, each sequence a page."""

    k: Any  # Rows [P, Hkv, S, D], floating or int8
    v: Any
    k_scales: Any = None  # float32 [P, Hkv, S], of int8
    v_scales: Any = None
    table: Any = None  # int32 [B, places]
    places: Any = None  # pages of a sequence; None: one
    size: Any = 0  # S, with a table
    ring: Any = None  # None: no key takes another's slot
    sinks: Any = 0


class Lengths(NamedTuple):
    """Of sequences that few queries attend to, and how new tokens branch."""

    nk: Any = None  # of all sequences, where there is no query_lens
    key_lens: Any = None  # int32 [B]
    query_lens: Any = None  # int32 [B]: the queries that count
    tree: Any = None  # uint8 [Nq, Nq] or [B, Nq, Nq]
    tree_batch: Any = 0  # stride, 0 where sequences share it
    depths: Any = None  # int32 [Nq] or [B, Nq]
    depths_batch: Any = 0


class Rotation(NamedTuple):
    """How the new tokens of a cache rotate."""

    inv_freq: Any  # float32 [pairs] or [B, pairs], or None
    inv_freq_batch: Any
    positions: Any  # float32 [Nq] or [B, Nq], in place of where the tokens stand
    positions_batch: Any
    factor: Any
    last: Any  # the farthest place, for queries of `far_rows`


class Tables(NamedTuple):
    """Cosines and sines, float32 [1 or B, places, pairs], of keys that rotate when they are read."""

    cos: Any = None
    sin: Any = None
    batch: Any = 0


def float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def plain_scores(problem: Problem) -> bool:
    """Whether scores are products times a positive scale, which the exponential then takes on for nothing."""
    return problem.scale > 0 and _SCORED.isdisjoint(problem.features)


def precision(problem: Problem, interpreted: bool) -> str:
    """Of float32 products: as PyTorch's own matrix products have it."""
    if interpreted:
        return "widen"
    return "tf32" if problem.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
