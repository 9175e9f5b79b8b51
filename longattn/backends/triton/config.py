"""Tile shapes, warps and stages: one small table per architecture, by kernel, padded head width and dtype.

Chosen from what fits: accumulators and operands in registers, operand tiles of all stages in shared memory. They have
compiled for their architectures (`make compile-gpu`); none is tuned by measurement yet.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from longattn.problem import Problem


class Tiles(NamedTuple):
    """M queries by N keys."""

    m: int
    n: int
    warps: int
    stages: int


class Kernels(NamedTuple):
    """One entry per kernel of a call."""

    forward: Tiles
    key_gradient: Tiles
    query_gradient: Tiles
    bias_gradient: Tiles


# Per architecture, {padded head width: tiles} for 16-bit types; the wider of D and Dv counts.
_HALF: dict[int, dict[int, Kernels]] = {
    80: {
        64: Kernels(Tiles(128, 64, 8, 3), Tiles(32, 64, 4, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 4, 1)),
        128: Kernels(Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 1), Tiles(64, 64, 8, 1), Tiles(64, 64, 8, 1)),
        256: Kernels(Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
        512: Kernels(Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(32, 16, 8, 1), Tiles(16, 16, 8, 1)),
    },
    90: {
        64: Kernels(Tiles(128, 128, 8, 3), Tiles(64, 128, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 1)),
        128: Kernels(Tiles(128, 128, 8, 2), Tiles(32, 128, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 1)),
        256: Kernels(Tiles(128, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 1)),
        512: Kernels(Tiles(64, 32, 8, 2), Tiles(16, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(16, 16, 8, 1)),
    },
}
_HALF[100] = {
    **_HALF[90],
    128: _HALF[90][128]._replace(forward=Tiles(128, 64, 8, 3)),
    512: _HALF[90][512]._replace(key_gradient=Tiles(16, 16, 8, 1)),
}

# For want of registers where scores are more than products, weights are dropped, or addresses are computed that the
# hardware else would; wider heads as above.
_SCORED: dict[int, dict[int, Kernels]] = {
    80: {
        64: Kernels(Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 1)),
        128: Kernels(Tiles(64, 32, 4, 2), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1)),
    },
    90: {
        64: Kernels(Tiles(128, 64, 8, 2), Tiles(32, 64, 8, 1), Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 1)),
        128: Kernels(Tiles(128, 32, 8, 2), Tiles(16, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 1)),
    },
}
_SCORED[100] = _SCORED[90]
_SCORING = {"softcap", "alibi_slopes", "bias", "dropout"}

# float32 operands take twice the room, and IEEE products run outside the tensor cores.
_FLOAT: dict[int, Kernels] = {
    64: Kernels(Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
    128: Kernels(Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
    256: Kernels(Tiles(32, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    512: Kernels(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
}

# Calls on a cache, {padded head width: (few rows, many rows)} by the bytes of what products multiply. Memory is what
# bounds few rows: their 16 are the queries, mostly one, of all heads that read the same keys.
_DECODE: dict[int, dict[int, tuple[Tiles, Tiles]]] = {
    2: {
        64: (Tiles(16, 128, 4, 3), Tiles(64, 64, 4, 2)),
        128: (Tiles(16, 64, 4, 3), Tiles(64, 32, 4, 2)),
        256: (Tiles(16, 64, 4, 2), Tiles(64, 32, 8, 2)),
        512: (Tiles(16, 32, 4, 2), Tiles(32, 32, 8, 1)),
    },
    4: {
        64: (Tiles(16, 64, 4, 2), Tiles(32, 32, 4, 2)),
        128: (Tiles(16, 32, 4, 2), Tiles(32, 32, 8, 1)),
        256: (Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1)),
        512: (Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
    },
}
# Keys that rotate when they are read take their cosines and sines along.
_DECODE_TURNING = {width: Tiles(16, 32 if width <= 128 else 16, 4, 1) for width in _FLOAT}
_DECODE_ROWS = 16
_NOT_IN_SPLITS = {"key_mask", "bounds", "bias", "dropout", "varlen"}
LEAST_TILES = 4  # of keys, for a program of its own
MOST_SPLITS = 128

ARCHITECTURES = tuple(_HALF)  # compute capabilities, 10 * major + minor
WIDTHS = (64, 128, 256, 512)
LONGEST_TILE = 128  # rows
ROPE_ENTRIES = 1024  # of a head's tile: tokens times pairs
ROPE_HEADS = 4
MIN_WIDTH = 16  # what a product needs


def padded(width: int) -> int:
    """The tile's width for vectors of `width` entries."""
    return max(MIN_WIDTH, 1 << (width - 1).bit_length())


def kernels(problem: Problem, architecture: int, described: bool) -> Kernels:
    """The table's entry for a call; an architecture without one takes that of the next older.

    Args:
        described: whether tiles are read by their descriptors, where the architecture has them.
    """
    width = max(64, padded(max(problem.head_dim, problem.v_head_dim)))
    if problem.dtype == torch.float32:
        return _FLOAT[width]
    known = _known(architecture)
    computes_addresses = known >= 90 and not described
    if width in _SCORED[known] and (computes_addresses or not _SCORING.isdisjoint(problem.features)):
        return _SCORED[known][width]
    return _HALF[known][width]


@functools.cache
def _known(architecture: int) -> int:
    """It, or the next older one that has a table."""
    return max(known for known in ARCHITECTURES if known <= max(architecture, ARCHITECTURES[0]))


def decode_tiles(problem: Problem, dtype: torch.dtype) -> Tiles:
    """The table's entry for few queries, or a call on a cache, whose products multiply `dtype`."""
    width = max(64, padded(max(problem.head_dim, problem.v_head_dim)))
    if "rotate_on_read" in problem.features:
        return _DECODE_TURNING[width]
    few, many = _DECODE[dtype.itemsize][width]
    return few if problem.nq * problem.group <= few.m else many


def is_decode(problem: Problem) -> bool:
    """Whether a call without a cache has too few queries to fill a tile of the forward, or a GPU."""
    rows = problem.nq * problem.group
    return rows <= _DECODE_ROWS and _NOT_IN_SPLITS.isdisjoint(problem.features)


def product_dtype(problem: Problem) -> torch.dtype:
    """What the queries of a call on a cache and its keys both fit; int8 keys fit all."""
    stored = problem.storage
    assert stored is not None
    return problem.dtype if stored == torch.int8 else torch.promote_types(problem.dtype, stored)


def uses_descriptors(problem: Problem, architecture: int) -> bool:
    """Whether the hardware reads tiles by their descriptor: NVIDIA's from 9.0 on. Wide operands are not worth it."""
    return problem.dtype != torch.float32 and architecture >= 90
