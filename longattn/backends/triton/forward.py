"""Attention forward: one program per tile of queries and head, an online softmax over tiles of keys.

Tile vocabulary: M queries, N keys, D and DV widths of heads. With x the scores in units of log 2, a program holds

    top = max x,   total = sum 2^(x - top),   acc = sum 2^(x - top) v

(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022).
"""

import triton
import triton.language as tl

from longattn.backends.triton.dropout import kept
from longattn.backends.triton.mask import (
    key_tiles,
    keys_shown,
    query_bound,
    sequence,
    tile_start,
    visible,
)
from longattn.backends.triton.scores import LN2, LOG2E, scores, slope_of, unit
from longattn.backends.triton.tiles import load_rows, load_tile, narrow, product, program_of, rows_of, store_rows


@triton.jit
def _attend(
    acc, top, total, q, k_base, v_base, k_rows, v_rows, k_tiles, v_tiles, row, k_first, start, i, p, lo, hi, b, h,
    group, lq, lk, nk, slope, mask, terms, dropout,
    N: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr, TEST: tl.constexpr,
):  # fmt: skip
    """Take keys start..start + N in."""
    j = start + tl.arange(0, N)
    shown = keys_shown(mask, b, nk, j, lk)
    if TEST:
        k = load_rows(k_base, k_rows, start, shown, N, WIDTH, D, True)
    else:
        k = load_tile(k_tiles, k_base, k_rows, row, h // group, k_first, start, N, WIDTH, D)
    products = product(q, tl.trans(k), None, PRECISION)  # [M, D] @ [D, N]
    inside = (i < lq)[:, None] & (j < lk)[None, :]
    x, _ = scores(products, terms, b, h, i[:, None], j[None, :], p[:, None], inside, slope, PLAIN)
    if TEST:
        x = tl.where(visible(mask, p[:, None], j[None, :], shown[None, :], lo, hi), x, float("-inf"))

    factor = unit(terms, PLAIN)
    new_top = tl.maximum(top, tl.max(x, 1) * factor)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing so far
    weights = tl.exp2(x * factor - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    if dropout.seed is not None:
        weights = tl.where(kept(dropout, b, h, i, start, N), weights, 0.0)
    if TEST:
        v = load_rows(v_base, v_rows, start, shown, N, V_WIDTH, DV, True)
    else:
        v = load_tile(v_tiles, v_base, v_rows, row, h // group, k_first, start, N, V_WIDTH, DV)
    acc = product(narrow(weights, v, PRECISION), v, acc * shrink[:, None], PRECISION)  # [M, N] @ [N, DV]
    return acc, new_top, total


@triton.jit
def forward_kernel(
    q_rows, k_rows, v_rows, k_tiles, v_tiles, out_rows, lse, sink_logits, sequences, mask, terms, dropout, q_heads,
    group, tiles, together,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill out and lse (float32 [B, Hq, Nq])."""
    tile, h, b = program_of(tiles, q_heads, together, mask.right is not None)
    row, q_first, lq, k_first, lk, shift = sequence(sequences, mask, b)
    first = tile * M
    if first >= lq:
        return
    i = first + tl.arange(0, M)
    inside = i < lq
    p = i + shift
    lo = query_bound(mask.lo, mask, b, i[:, None], lq)
    hi = query_bound(mask.hi, mask, b, i[:, None], lq)
    sink_start, sink_tiles, start, left_tiles, middle, right, stop = key_tiles(
        mask, first + shift, tl.minimum(first + M, lq) - 1 + shift, lk, lo, hi, N
    )
    slope = slope_of(terms, b, h)
    q = load_rows(rows_of(q_rows, row, h, q_first), q_rows, first, inside, M, WIDTH, D, True)
    k_base = rows_of(k_rows, row, h // group, k_first)
    v_base = rows_of(v_rows, row, h // group, k_first)

    acc = tl.zeros([M, DV], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    if sink_logits is not None:  # one more key, without a value
        sink = tl.load(sink_logits + h) * LOG2E
        top = tl.zeros([M], tl.float32) + sink
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    if mask.left is not None:
        for n in range(left_tiles):
            at = tile_start(n, sink_start, sink_tiles, start, N)
            acc, top, total = _attend(
                acc, top, total, q, k_base, v_base, k_rows, v_rows, k_tiles, v_tiles, row, k_first, at, i, p, lo,
                hi, b, h, group, lq, lk, sequences.nk, slope, mask, terms, dropout,
                N, WIDTH, V_WIDTH, D, DV, PLAIN, PRECISION, True,
            )  # fmt: skip
    for at in range(middle, right, N):
        acc, top, total = _attend(
            acc, top, total, q, k_base, v_base, k_rows, v_rows, k_tiles, v_tiles, row, k_first, at, i, p, lo, hi, b, h,
            group, lq, lk, sequences.nk, slope, mask, terms, dropout,
            N, WIDTH, V_WIDTH, D, DV, PLAIN, PRECISION, False,
        )  # fmt: skip
    for at in range(right, stop, N):
        acc, top, total = _attend(
            acc, top, total, q, k_base, v_base, k_rows, v_rows, k_tiles, v_tiles, row, k_first, at, i, p, lo, hi, b, h,
            group, lq, lk, sequences.nk, slope, mask, terms, dropout,
            N, WIDTH, V_WIDTH, D, DV, PLAIN, PRECISION, True,
        )  # fmt: skip

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    share = 1.0 / total
    if dropout.seed is not None:
        share *= dropout.scale
    store_rows(rows_of(out_rows, row, h, q_first), out_rows, first, inside, acc * share[:, None], M, V_WIDTH, DV)
    lse_base = lse + (tl.cast(row, tl.int64) * q_heads + h) * sequences.nq + q_first
    tl.store(lse_base + i, tl.where(seen, (top + tl.log2(total)) * LN2, float("-inf")), mask=inside)
