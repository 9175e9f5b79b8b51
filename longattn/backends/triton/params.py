"""What a kernel is told, as named tuples: Triton compiles an absent field away, so None costs nothing on the device."""

from __future__ import annotations

from typing import Any, NamedTuple


class Rows(NamedTuple):
    """A tensor [B, H, N, D] with unit stride in D: its address, and strides in elements."""

    ptr: Any
    batch: Any
    head: Any
    token: Any
    wide: Any  # not None: offsets within a tile may exceed 32 bits


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
    offset: Any  # int32 [B]: in place of shift
    key_mask: Any  # uint8 [B, Nk]
    lo: Any  # int32 [Nq] or [B, Nq]
    hi: Any
    bounds_batch: Any  # stride of lo and hi


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


class Dropout(NamedTuple):
    """An entry is dropped if its 32 random bits are below the threshold; what is kept is scaled up."""

    seed: Any  # int64 [1], or None: no dropout
    threshold: Any
    scale: Any
