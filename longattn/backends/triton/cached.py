"""From a call on a cache to launches: first the new tokens, then attention to all."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from longattn.backends.triton import config, launch
from longattn.backends.triton.append import append_kernel
from longattn.backends.triton.config import padded
from longattn.backends.triton.params import (
    Lengths,
    Pages,
    Rotation,
    Rows,
    ScoreTerms,
    Tables,
    Visibility,
    precision,
)
from longattn.backends.triton.splits import attend
from longattn.problem import CacheTensors, Problem, Slots

_NEW_ENTRIES = 1024  # of a head a program: tokens times padded width


def append(problem: Problem, tensors: CacheTensors, slots: Slots) -> None:
    """Backend.append."""
    _take_in(problem, tensors, slots)


def decode(problem: Problem, tensors: CacheTensors, slots: Slots, out: Tensor, lse: Tensor, interpreted: bool) -> None:
    """Backend.decode."""
    near, far = _take_in(problem, tensors, slots)
    assert near is not None
    attend(
        problem,
        near,
        _pages(slots),
        _lengths(tensors),
        Visibility.of(problem.mask),
        ScoreTerms.of(problem, None, tensors.alibi_slopes),
        tensors.sink_logits,
        out,
        lse,
        config.decode_tiles(problem, config.product_dtype(problem)),
        torch.float32 if interpreted else config.product_dtype(problem),
        precision(problem, interpreted),
        far,
        _tables(tensors),
    )


def _take_in(problem: Problem, tensors: CacheTensors, slots: Slots) -> tuple[Tensor | None, Tensor | None]:
    """Append the new keys and values. (q rotated as for most keys, and as for the sinks if their places differ)."""
    q, turn = tensors.q, tensors.inv_freq is not None
    near = far = None
    if q is not None and turn:
        near = torch.empty_like(q)
        far = torch.empty_like(q) if problem.frame else None
    heads = (0 if near is None else problem.q_heads), (0 if tensors.k is None else problem.kv_heads)
    most = max(1, _NEW_ENTRIES // padded(max(problem.head_dim, problem.v_head_dim)))
    tokens = min(most, 1 << max(0, problem.nq - 1).bit_length())
    tiles = math.ceil(problem.nq / tokens)
    rotation, pairs = Rotation(None, 0, None, 0, 1.0, 0), 0
    if tensors.inv_freq is not None:
        pairs = tensors.inv_freq.shape[-1]
        rotation = Rotation(
            *_per_sequence(tensors.inv_freq, 1),
            *_per_sequence(tensors.positions, 1),
            problem.rope_factor,
            problem.frame + slots.sinks - 1,
        )
    launch.launch(
        append_kernel, problem.batch * tiles * sum(heads), *map(Rows.of, (q, near, far, tensors.k, tensors.v)),
        _pages(slots), _lengths(tensors), rotation, *heads,
        problem.nq, tiles,
        WIDTH=problem.head_dim, V_WIDTH=problem.v_head_dim, D=padded(problem.head_dim), DV=padded(problem.v_head_dim),
        PAIRS=pairs, INTERLEAVED=problem.interleaved, TURN_KEYS=turn and tensors.cos is None, T=tokens, num_warps=4,
    )  # fmt: skip
    return q if near is None else near, far


def _pages(slots: Slots) -> Pages:
    places = slots.table.shape[1]
    return Pages(
        Rows.of(slots.k),
        Rows.of(slots.v),
        slots.k_scales,
        slots.v_scales,
        slots.table,
        places if places > 1 else None,
        slots.k.shape[2],
        slots.ring or None,
        slots.sinks,
    )


def _lengths(tensors: CacheTensors) -> Lengths:
    tree = None if tensors.tree is None else tensors.tree.contiguous().view(torch.uint8)
    return Lengths(
        None, tensors.key_lens, tensors.query_lens, *_per_sequence(tree, 2), *_per_sequence(tensors.depths, 1)
    )


def _tables(tensors: CacheTensors) -> Tables:
    if tensors.cos is None or tensors.sin is None:
        return Tables()
    cos, batch = _per_sequence(tensors.cos, 2)
    return Tables(cos.float(), tensors.sin.contiguous().float(), batch if tensors.cos.shape[0] > 1 else 0)


def _per_sequence(x: Tensor | None, dims: int) -> tuple[Any, int]:
    """x, contiguous, and its batch stride: 0 where all sequences share its `dims` dimensions."""
    if x is None:
        return None, 0
    x = x.contiguous()
    return x, x.stride(0) if x.dim() > dims else 0
