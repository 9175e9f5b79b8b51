"""Attention backward: one program per tile of keys for dk and dv, one per tile of queries for dq; no atomics.

With P = exp(s - lse), W = dropout(dout v^T) and delta_i = sum_j P_ij W_ij - dlse_i = dout_i . out_i - dlse_i,

    ds = P * (W - delta),   dq = scale * ds k,   dk = scale * ds^T q,   dv = dropout(P)^T dout

(Dao et al., "FlashAttention", 2022, appendix B). Every sum is taken by one program in one order, so results repeat bit
by bit. Tile vocabulary as in forward.py.
"""

import triton
import triton.language as tl

from longattn.backends.triton.dropout import kept
from longattn.backends.triton.mask import (
    key_tiles,
    keys_shown,
    query_bound,
    query_tiles,
    sequence,
    tile_start,
    visible,
)
from longattn.backends.triton.scores import LOG2E, scores, slope_of, unit
from longattn.backends.triton.tiles import load_rows, load_tile, narrow, product, program_of, rows_of, store_rows


@triton.jit
def delta_kernel(
    out_rows, dout_rows, lse, dlse, delta, n, heads, V_WIDTH: tl.constexpr, DV: tl.constexpr, M: tl.constexpr
):
    """Fill delta [B, Hq, Nq]; 0 for queries that see nothing."""
    tile, h, b = program_of(tl.cdiv(n, M), heads, 1, False)
    first = tile * M
    i = first + tl.arange(0, M)
    inside = i < n
    out = load_rows(rows_of(out_rows, b, h, b * 0), out_rows, first, inside, M, V_WIDTH, DV, True)
    dout = load_rows(rows_of(dout_rows, b, h, b * 0), dout_rows, first, inside, M, V_WIDTH, DV, True)
    sums = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    at = (tl.cast(b, tl.int64) * heads + h) * n + i
    if dlse is not None:
        sums -= tl.load(dlse + at, mask=inside, other=0.0)
    sees = tl.load(lse + at, mask=inside, other=float("-inf")) > float("-inf")
    tl.store(delta + at, tl.where(sees, sums, 0.0), mask=inside)


@triton.jit
def row_statistics(lse, delta, base, i, lq):
    """(lse / ln 2, delta) of queries i; lse is inf where no query is or it sees nothing, so that weights come to 0."""
    inside = i < lq
    x = tl.load(lse + base + i, mask=inside, other=float("inf"))
    x = tl.where(x == float("-inf"), float("inf"), x * LOG2E)
    return x, tl.load(delta + base + i, mask=inside, other=0.0)


@triton.jit
def score_gradient(
    q, k, v, dout, lse, delta, i, start, p, lo, hi, b, h, lq, lk, nk, slope, mask, terms, dropout,
    N: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr, TEST: tl.constexpr,
):  # fmt: skip
    """(ds, d) of queries i and keys start..start + N, both [M, N]; d is the derivative of softcap."""
    j = start + tl.arange(0, N)
    products = product(q, tl.trans(k), None, PRECISION)  # [M, D] @ [D, N]
    inside = (i < lq)[:, None] & (j < lk)[None, :]
    x, derivative = scores(products, terms, b, h, i[:, None], j[None, :], p[:, None], inside, slope, PLAIN)
    if TEST:
        shown = keys_shown(mask, b, nk, j, lk)
        x = tl.where(visible(mask, p[:, None], j[None, :], shown[None, :], lo, hi), x, float("-inf"))
    weights = tl.exp2(x * unit(terms, PLAIN) - lse[:, None])
    dweights = product(dout, tl.trans(v), None, PRECISION)  # [M, DV] @ [DV, N]
    if dropout.seed is not None:
        dweights = tl.where(kept(dropout, b, h, i, start, N), dweights * dropout.scale, 0.0)
    return weights * (dweights - delta[:, None]), derivative


@triton.jit
def _add_queries(
    acc, dslope, q, dout, k_base, v_base, k_rows, v_rows, k_tiles, v_tiles, row, k_first, start, lse, delta, i, p, lo,
    hi, b, h, group, lq, lk, nk, slope, mask, terms, dropout,
    N: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr, TEST: tl.constexpr,
):  # fmt: skip
    """Add what keys start..start + N give to dq / scale, and to the slope's gradient of each query."""
    j = start + tl.arange(0, N)
    shown = keys_shown(mask, b, nk, j, lk)
    if TEST:
        k = load_rows(k_base, k_rows, start, shown, N, WIDTH, D, True)
        v = load_rows(v_base, v_rows, start, shown, N, V_WIDTH, DV, True)
    else:
        k = load_tile(k_tiles, k_base, k_rows, row, h // group, k_first, start, N, WIDTH, D)
        v = load_tile(v_tiles, v_base, v_rows, row, h // group, k_first, start, N, V_WIDTH, DV)
    ds, derivative = score_gradient(
        q, k, v, dout, lse, delta, i, start, p, lo, hi, b, h, lq, lk, nk, slope, mask, terms, dropout,
        N, PLAIN, PRECISION, TEST,
    )  # fmt: skip
    if slope is not None:
        dslope -= tl.sum(ds * tl.abs(p[:, None] - j[None, :]).to(tl.float32), 1)
    acc = product(narrow(ds * derivative, k, PRECISION), k, acc, PRECISION)  # [M, N] @ [N, D]
    return acc, dslope


@triton.jit
def query_gradient_kernel(
    q_rows, k_rows, v_rows, dout_rows, k_tiles, v_tiles, dq_rows, lse, delta, dslopes, sequences, mask, terms, dropout,
    q_heads, group, tiles, together,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill dq, and each query's part of the slopes' gradient, dslopes float32 [B, Hq, Nq]."""
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
    dout = load_rows(rows_of(dout_rows, row, h, q_first), dout_rows, first, inside, M, V_WIDTH, DV, True)
    statistics = (tl.cast(row, tl.int64) * q_heads + h) * sequences.nq + q_first
    x, d = row_statistics(lse, delta, statistics, i, lq)
    k_base = rows_of(k_rows, row, h // group, k_first)
    v_base = rows_of(v_rows, row, h // group, k_first)

    acc = tl.zeros([M, D], tl.float32)
    dslope = tl.zeros([M], tl.float32)
    if mask.left is not None:
        for n in range(left_tiles):
            at = tile_start(n, sink_start, sink_tiles, start, N)
            acc, dslope = _add_queries(
                acc, dslope, q, dout, k_base, v_base, k_rows, v_rows, k_tiles, v_tiles, row, k_first, at, x, d, i,
                p, lo, hi, b, h, group, lq, lk, sequences.nk, slope, mask, terms, dropout,
                N, WIDTH, V_WIDTH, D, DV, PLAIN, PRECISION, True,
            )  # fmt: skip
    for at in range(middle, right, N):
        acc, dslope = _add_queries(
            acc, dslope, q, dout, k_base, v_base, k_rows, v_rows, k_tiles, v_tiles, row, k_first, at, x, d, i, p, lo,
            hi, b, h, group, lq, lk, sequences.nk, slope, mask, terms, dropout,
            N, WIDTH, V_WIDTH, D, DV, PLAIN, PRECISION, False,
        )  # fmt: skip
    for at in range(right, stop, N):
        acc, dslope = _add_queries(
            acc, dslope, q, dout, k_base, v_base, k_rows, v_rows, k_tiles, v_tiles, row, k_first, at, x, d, i, p, lo,
            hi, b, h, group, lq, lk, sequences.nk, slope, mask, terms, dropout,
            N, WIDTH, V_WIDTH, D, DV, PLAIN, PRECISION, True,
        )  # fmt: skip

    store_rows(rows_of(dq_rows, row, h, q_first), dq_rows, first, inside, acc * terms.scale, M, WIDTH, D)
    if dslopes is not None:
        tl.store(dslopes + statistics + i, dslope, mask=inside)


@triton.jit
def _add_keys(
    dk, dv, k, v, h, at, q_rows, dout_rows, q_tiles, dout_tiles, row, q_first, lse, delta, first, shown, b, heads,
    lq, lk, shift, sequences, mask, terms, dropout,
    M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr, TEST: tl.constexpr,
):  # fmt: skip
    """Add what queries at..at + M of head h give to dk / scale and dv.

    Tiles of scores lie transposed, [N, M]: weights stand left.
    """
    slope = slope_of(terms, b, h)
    statistics = (tl.cast(row, tl.int64) * heads + h) * sequences.nq + q_first
    i = at + tl.arange(0, M)
    j = first + tl.arange(0, N)
    p = i + shift
    q_base = rows_of(q_rows, row, h, q_first)
    dout_base = rows_of(dout_rows, row, h, q_first)
    if TEST:
        q = load_rows(q_base, q_rows, at, i < lq, M, WIDTH, D, True)
        dout = load_rows(dout_base, dout_rows, at, i < lq, M, V_WIDTH, DV, True)
    else:
        q = load_tile(q_tiles, q_base, q_rows, row, h, q_first, at, M, WIDTH, D)
        dout = load_tile(dout_tiles, dout_base, dout_rows, row, h, q_first, at, M, V_WIDTH, DV)
    x_row, d_row = row_statistics(lse, delta, statistics, i, lq)
    products = product(k, tl.trans(q), None, PRECISION)  # [N, D] @ [D, M]
    inside = (j < lk)[:, None] & (i < lq)[None, :]
    x, derivative = scores(products, terms, b, h, i[None, :], j[:, None], p[None, :], inside, slope, PLAIN)
    if TEST:
        lo = query_bound(mask.lo, mask, b, i[None, :], lq)
        hi = query_bound(mask.hi, mask, b, i[None, :], lq)
        x = tl.where(visible(mask, p[None, :], j[:, None], shown[:, None], lo, hi), x, float("-inf"))
    weights = tl.exp2(x * unit(terms, PLAIN) - x_row[None, :])
    dweights = product(v, tl.trans(dout), None, PRECISION)  # [N, DV] @ [DV, M]
    dropped = weights
    if dropout.seed is not None:
        keep = tl.trans(kept(dropout, b, h, i, first, N))
        dropped = tl.where(keep, weights * dropout.scale, 0.0)
        dweights = tl.where(keep, dweights * dropout.scale, 0.0)
    dv = product(narrow(dropped, dout, PRECISION), dout, dv, PRECISION)  # [N, M] @ [M, DV]
    ds = weights * (dweights - d_row[None, :]) * derivative
    dk = product(narrow(ds, q, PRECISION), q, dk, PRECISION)  # [N, M] @ [M, D]
    return dk, dv


@triton.jit
def key_gradient_kernel(
    q_rows, k_rows, v_rows, dout_rows, q_tiles, dout_tiles, dk_rows, dv_rows, lse, delta, sequences, mask, terms,
    dropout, kv_heads, group, n_tiles, together,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill dk and dv of a tile of keys, summed over the query heads that read it."""
    tile, kv_head, b = program_of(n_tiles, kv_heads, together, False)
    row, q_first, lq, k_first, lk, shift = sequence(sequences, mask, b)
    first = tile * N
    if first >= lk:
        return
    j = first + tl.arange(0, N)
    inside = j < lk
    shown = keys_shown(mask, b, sequences.nk, j, lk)
    start, middle, right, stop = query_tiles(mask, first, tl.minimum(first + N, lk) - 1, lq, shift, M)
    k = load_rows(rows_of(k_rows, row, kv_head, k_first), k_rows, first, shown, N, WIDTH, D, True)
    v = load_rows(rows_of(v_rows, row, kv_head, k_first), v_rows, first, shown, N, V_WIDTH, DV, True)
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, DV], tl.float32)
    left_tiles = tl.cdiv(middle - start, M)
    tiles = left_tiles + tl.cdiv(stop - right, M)
    for n in range(tiles * group):
        at = n % tiles
        at = tl.where(at < left_tiles, start + at * M, right + (at - left_tiles) * M)
        dk, dv = _add_keys(
            dk, dv, k, v, kv_head * group + n // tiles, at, q_rows, dout_rows, q_tiles, dout_tiles, row, q_first, lse,
            delta, first, shown, b, kv_heads * group, lq, lk, shift, sequences, mask, terms, dropout,
            M, N, WIDTH, V_WIDTH, D, DV, PLAIN, PRECISION, True,
        )  # fmt: skip
    tiles = (right - middle) // M
    for n in range(tiles * group):
        dk, dv = _add_keys(
            dk, dv, k, v, kv_head * group + n // tiles, middle + n % tiles * M, q_rows, dout_rows, q_tiles, dout_tiles,
            row, q_first, lse, delta, first, shown, b, kv_heads * group, lq, lk, shift, sequences, mask, terms, dropout,
            M, N, WIDTH, V_WIDTH, D, DV, PLAIN, PRECISION, False,
        )  # fmt: skip
    store_rows(rows_of(dk_rows, row, kv_head, k_first), dk_rows, first, inside, dk * terms.scale, N, WIDTH, D)
    store_rows(rows_of(dv_rows, row, kv_head, k_first), dv_rows, first, inside, dv, N, V_WIDTH, DV)


@triton.jit
def bias_gradient_kernel(
    q_rows, k_rows, v_rows, dout_rows, dbias, lse, delta, sequences, mask, terms, dropout, batch, q_heads, group,
    i_tiles, j_tiles, dbias_heads, dbias_queries, dbias_keys,
    BY_BATCH: tl.constexpr, BY_HEAD: tl.constexpr, BY_QUERY: tl.constexpr, BY_KEY: tl.constexpr,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill dbias (float32, contiguous, of the bias's own shape); a program sums all that its tile was broadcast to.

    BY_BATCH, ...: whether the bias has that dimension; tiles of dimensions that it lacks are summed here.
    """
    pid = tl.program_id(0)
    i_first = 0
    i_stop = i_tiles
    j_first = 0
    j_stop = j_tiles
    if BY_KEY:
        j_first = pid % j_tiles
        j_stop = j_first + 1
        pid = pid // j_tiles
    if BY_QUERY:
        i_first = pid % i_tiles
        i_stop = i_first + 1
        pid = pid // i_tiles
    dbias_head = pid % dbias_heads
    dbias_batch = pid // dbias_heads
    h_first = 0
    h_stop = q_heads
    if BY_HEAD:
        h_first = dbias_head
        h_stop = dbias_head + 1
    b_first = 0
    b_stop = batch
    if BY_BATCH:
        b_first = dbias_batch
        b_stop = dbias_batch + 1

    acc = tl.zeros([M, N], tl.float32)
    for b in range(b_first, b_stop):
        row, q_first, lq, k_first, lk, shift = sequence(sequences, mask, b)
        for h in range(h_first, h_stop):
            slope = slope_of(terms, b, h)
            statistics = (tl.cast(b, tl.int64) * q_heads + h) * sequences.nq
            for i_tile in range(i_first, i_stop):
                i = i_tile * M + tl.arange(0, M)
                lo = query_bound(mask.lo, mask, b, i[:, None], lq)
                hi = query_bound(mask.hi, mask, b, i[:, None], lq)
                q_base = rows_of(q_rows, row, h, q_first)
                dout_base = rows_of(dout_rows, row, h, q_first)
                q = load_rows(q_base, q_rows, i_tile * M, i < lq, M, WIDTH, D, True)
                dout = load_rows(dout_base, dout_rows, i_tile * M, i < lq, M, V_WIDTH, DV, True)
                x, d = row_statistics(lse, delta, statistics, i, lq)
                for j_tile in range(j_first, j_stop):
                    start = j_tile * N
                    shown = keys_shown(mask, b, sequences.nk, start + tl.arange(0, N), lk)
                    k_base = rows_of(k_rows, row, h // group, k_first)
                    v_base = rows_of(v_rows, row, h // group, k_first)
                    k = load_rows(k_base, k_rows, start, shown, N, WIDTH, D, True)
                    v = load_rows(v_base, v_rows, start, shown, N, V_WIDTH, DV, True)
                    ds, _ = score_gradient(
                        q, k, v, dout, x, d, i, start, i + shift, lo, hi, b, h, lq, lk, sequences.nk, slope,
                        mask, terms, dropout, N, PLAIN, PRECISION, True,
                    )  # fmt: skip
                    acc += ds

    base = dbias + (tl.cast(dbias_batch, tl.int64) * dbias_heads + dbias_head) * dbias_queries * dbias_keys
    i = i_first * M + tl.arange(0, M)
    j = j_first * N + tl.arange(0, N)
    if BY_QUERY and BY_KEY:
        places = tl.cast(i, tl.int64)[:, None] * dbias_keys + j[None, :]
        tl.store(base + places, acc, mask=(i < dbias_queries)[:, None] & (j < dbias_keys)[None, :])
    elif BY_QUERY:
        tl.store(base + i, tl.sum(acc, 1), mask=i < dbias_queries)
    elif BY_KEY:
        tl.store(base + j, tl.sum(acc, 0), mask=j < dbias_keys)
    else:
        tl.store(base, tl.sum(tl.sum(acc, 1), 0))
