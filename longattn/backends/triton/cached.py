"""From a call on a cache to launches: the new tokens' own, the keys' in splits, and what merges those."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from longattn.backends.triton import architecture, config, launch
from longattn.backends.triton.append import append_kernel
from longattn.backends.triton.config import padded
from longattn.backends.triton.decode import attend_kernel, combine_kernel
from longattn.backends.triton.params import (
    Lengths,
    Pages,
    Rotation,
    Rows,
    ScoreTerms,
    Tables,
    Visibility,
    float32,
    plain_scores,
    precision,
)
from longattn.errors import InvalidInput
from longattn.problem import CacheTensors, Problem, Slots

_NEW_TOKENS = 16  # of a head a program
_SPLITS_AT_ONCE = 16
_COMPUTE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def append(problem: Problem, tensors: CacheTensors, slots: Slots) -> None:
    """Backend.append."""
    _take_in(problem, tensors, slots)


def decode(
    problem: Problem, tensors: CacheTensors, slots: Slots, out: Tensor, lse: Tensor, interpreted: bool
) -> None:
    """Backend.decode."""
    if tensors.k is None and slots.ring:
        _check_ring(problem, tensors, slots)
    near, far = _take_in(problem, tensors, slots)
    tiles = config.decode_tiles(problem)
    row_tiles = math.ceil(problem.nq * problem.group / tiles.m)
    programs = problem.batch * problem.kv_heads * row_tiles
    splits = _splits(problem, programs, tiles.n)
    partial, log_sums = None, lse
    if splits > 1:
        shape = (splits, problem.batch, problem.q_heads, problem.nq)
        partial = torch.empty(*shape, padded(problem.v_head_dim), dtype=torch.float32, device=out.device)
        log_sums = torch.empty(shape, dtype=torch.float32, device=out.device)
    wide = torch.float32 if interpreted else config.product_dtype(problem)
    launch.launch(
        attend_kernel, programs * splits, Rows.of(near), None if far is None else Rows.of(far), _pages(slots),
        Rows.of(out), log_sums, partial, float32(tensors.sink_logits), _lengths(tensors), Visibility.of(problem.mask),
        ScoreTerms.of(problem, None, tensors.alibi_slopes), _tables(tensors), problem.kv_heads, problem.group,
        problem.nq, row_tiles, splits,
        WIDTH=problem.head_dim, V_WIDTH=problem.v_head_dim, D=padded(problem.head_dim), DV=padded(problem.v_head_dim),
        M=tiles.m, N=tiles.n, PAIRS=0 if tensors.cos is None else tensors.cos.shape[2],
        INTERLEAVED=problem.interleaved, PLAIN=plain_scores(problem), PRECISION=precision(problem, interpreted),
        COMPUTE=_COMPUTE[wide], num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if partial is not None:
        launch.launch(
            combine_kernel, math.prod(out.shape[:3]), partial, log_sums, Rows.of(out), lse, problem.q_heads,
            problem.nq, splits, V_WIDTH=problem.v_head_dim, DV=padded(problem.v_head_dim), S=_SPLITS_AT_ONCE,
            num_warps=4,
        )  # fmt: skip


def _take_in(problem: Problem, tensors: CacheTensors, slots: Slots) -> tuple[Tensor, Tensor | None]:
    """Append the new keys and values. (q rotated as for most keys, and as for the sinks if their places differ)."""
    q, turn = tensors.q, tensors.inv_freq is not None
    near = far = None
    if q is not None and turn:
        near = torch.empty_like(q)
        far = torch.empty_like(q) if problem.frame else None
    heads = (0 if near is None else problem.q_heads), (0 if tensors.k is None else problem.kv_heads)
    tiles = math.ceil(problem.nq / _NEW_TOKENS)
    tokens = min(_NEW_TOKENS, 1 << max(0, problem.nq - 1).bit_length())
    rotation, pairs = Rotation(None, 0, None, 0, 1.0, 0), 0
    if tensors.inv_freq is not None:
        pairs = tensors.inv_freq.shape[-1]
        rotation = Rotation(
            *_per_sequence(tensors.inv_freq, 1),
            *_per_sequence(tensors.positions, 1),
            problem.rope_factor,
            problem.frame + slots.sinks - 1,
        )
    rows = [None if x is None else Rows.of(x) for x in (q, near, far, tensors.k, tensors.v)]
    launch.launch(
        append_kernel, problem.batch * tiles * sum(heads), *rows, _pages(slots), _lengths(tensors), rotation, *heads,
        problem.nq, tiles,
        WIDTH=problem.head_dim, V_WIDTH=problem.v_head_dim, D=padded(problem.head_dim), DV=padded(problem.v_head_dim),
        PAIRS=pairs, INTERLEAVED=problem.interleaved, TURN_KEYS=turn and tensors.cos is None, T=tokens, num_warps=4,
    )  # fmt: skip
    return q if near is None else near, far


def _check_ring(problem: Problem, tensors: CacheTensors, slots: Slots) -> None:
    """Queries of old tokens may see keys that newer ones have taken the slots of. (New tokens were made room for.)

    Raises:
        InvalidInput: they do.
    """
    left = problem.nk if problem.mask.left is None else problem.mask.left
    if problem.nk <= slots.sinks + slots.ring or left + problem.nq <= slots.ring:
        return
    seen = left + int(tensors.query_lens.max())
    if seen > slots.ring:
        raise InvalidInput("window", "keys that the ring still holds", f"{seen} keys of {slots.ring}")


def _splits(problem: Problem, programs: int, keys: int) -> int:
    """Programs for each tile of rows: enough to fill the GPU twice, none with less than a few tiles of keys."""
    longest = problem.nk
    if problem.mask.left is not None:
        longest = min(longest, problem.mask.left + problem.nq + problem.mask.sinks)
    wanted = 2 * architecture.multiprocessors() // max(1, programs)
    return max(1, min(wanted, longest // (config.LEAST_TILES * keys), config.MOST_SPLITS))


def _pages(slots: Slots) -> Pages:
    places = slots.table.shape[1]
    return Pages(
        slots.k,
        slots.v,
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
    return Lengths(tensors.key_lens, tensors.query_lens, *_per_sequence(tree, 2), *_per_sequence(tensors.depths, 1))


def _tables(tensors: CacheTensors) -> Tables:
    if tensors.cos is None or tensors.sin is None:
        return Tables(None, None, 0)
    cos, batch = _per_sequence(tensors.cos, 2)
    return Tables(cos.float(), tensors.sin.contiguous().float(), batch if tensors.cos.shape[0] > 1 else 0)


def _per_sequence(x: Tensor | None, dims: int) -> tuple[Any, int]:
    """x, contiguous, and its batch stride: 0 where all sequences share its `dims` dimensions."""
    if x is None:
        return None, 0
    x = x.contiguous()
    return x, x.stride(0) if x.dim() > dims else 0
