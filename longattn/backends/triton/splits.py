"""Attention of few queries, on a cache or not: how many programs share the keys, and the launches."""

from __future__ import annotations

import functools
import math

import torch
import triton.language as tl
from torch import Tensor

from longattn.backends.triton import config, launch
from longattn.backends.triton.config import Tiles, padded
from longattn.backends.triton.decode import attend_kernel, combine_kernel
from longattn.backends.triton.params import (
    Lengths,
    Pages,
    Rows,
    ScoreTerms,
    Tables,
    Visibility,
    float32,
    plain_scores,
)
from longattn.problem import Problem

_SPLITS_AT_ONCE = 16
_MULTIPROCESSORS = 132
_COMPUTE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def attend(
    problem: Problem,
    q: Tensor,
    pages: Pages,
    lengths: Lengths,
    mask: Visibility,
    terms: ScoreTerms,
    sink_logits: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tiles: Tiles,
    compute: torch.dtype,
    precision: str,
    far: Tensor | None = None,
    tables: Tables | None = None,
) -> None:
    """Fill out and lse.

    Args:
        q: [B, Hq, Nq, D], rotated; far: rotated for the sinks, where these rotate otherwise.
        compute: what products multiply; precision: of `tiles.product`.
        tables: of keys that rotate when they are read.
    """
    tables = Tables() if tables is None else tables
    row_tiles = math.ceil(problem.nq * problem.group / tiles.m)
    programs = problem.batch * problem.kv_heads * row_tiles
    splits = split_count(problem, programs, tiles.n, _multiprocessors(out.device))
    partial, log_sums = None, lse
    if splits > 1:
        shape = (splits, problem.batch, problem.q_heads, problem.nq)
        partial = torch.empty(*shape, padded(problem.v_head_dim), dtype=torch.float32, device=out.device)
        log_sums = torch.empty(shape, dtype=torch.float32, device=out.device)
    launch.launch(
        attend_kernel, programs * splits, Rows.of(q), Rows.of(far), pages, Rows.of(out),
        log_sums, partial, float32(sink_logits), lengths, mask, terms, tables, problem.kv_heads, problem.group,
        problem.nq, row_tiles, splits,
        WIDTH=problem.head_dim, V_WIDTH=problem.v_head_dim, D=padded(problem.head_dim), DV=padded(problem.v_head_dim),
        M=tiles.m, N=tiles.n, PAIRS=0 if tables.cos is None else tables.cos.shape[2], INTERLEAVED=problem.interleaved,
        PLAIN=plain_scores(problem), PRECISION=precision, COMPUTE=_COMPUTE[compute],
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if partial is not None:
        launch.launch(
            combine_kernel, math.prod(out.shape[:3]), partial, log_sums, Rows.of(out), lse, problem.q_heads,
            problem.nq, splits, V_WIDTH=problem.v_head_dim, DV=padded(problem.v_head_dim), S=_SPLITS_AT_ONCE,
            num_warps=4,
        )  # fmt: skip


def split_count(problem: Problem, programs: int, keys: int, multiprocessors: int) -> int:
    """Programs for each tile of rows: enough to fill the GPU twice, none with less than a few tiles of keys."""
    longest = problem.nk
    if problem.mask.left is not None:
        longest = min(longest, problem.mask.left + problem.nq + problem.mask.sinks)
    wanted = 2 * multiprocessors // max(1, programs)
    return max(1, min(wanted, longest // (config.LEAST_TILES * keys), config.MOST_SPLITS))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; those of an H200 for what is none."""
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
