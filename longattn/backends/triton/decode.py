"""Attention of few queries: keys are split among programs, and a second kernel merges what they found.

The query heads that read one key/value head are rows of one tile, row r being query r // group of head r % group, so
that every key is read once for all of them. Each split gives its own softmax and log-sum, and

    lse = log sum_s exp(lse_s),   out = sum_s exp(lse_s - lse) out_s

("Flash-Decoding", Dao et al., 2023). Tile vocabulary as in forward.py: M rows, N keys.
"""

import triton
import triton.language as tl

from longattn.backends.triton.mask import key_tiles, near_or_sink, position_of_first, tile_start, visible
from longattn.backends.triton.pages import place_of, rows_at, scales_at
from longattn.backends.triton.rope import partners, turned
from longattn.backends.triton.scores import LN2, LOG2E, scores, unit
from longattn.backends.triton.tiles import narrow, product


@triton.jit
def _load(rows, shown, WIDTH: tl.constexpr, D: tl.constexpr):
    """Rows at these addresses [N], [N, D]; 0 past WIDTH or where not `shown`."""
    column = tl.arange(0, D)
    return tl.load(rows[:, None] + column[None, :], mask=shown[:, None] & (column < WIDTH)[None, :], other=0)


@triton.jit
def _load_keys(
    rows, tables, place, b, shown, WIDTH: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Keys [N, D] without their scales, rotated to `place` [N] where they lie unrotated."""
    k = _load(rows, shown, WIDTH, D)
    if tables.cos is not None:
        pair, partner, sign, turning = partners(D, PAIRS, INTERLEAVED)
        here = shown[:, None] & turning[None, :]
        other = tl.load(rows[:, None] + partner[None, :], mask=here, other=0).to(tl.float32)
        at = tl.cast(b, tl.int64) * tables.batch + tl.abs(place).to(tl.int64)[:, None] * PAIRS + pair[None, :]
        cos = tl.load(tables.cos + at, mask=here, other=0.0)
        sin = tl.load(tables.sin + at, mask=here, other=0.0) * tl.where(place < 0, -1.0, 1.0)[:, None]
        return turned(k.to(tl.float32), other, cos, sin, sign, turning).to(COMPUTE)
    else:
        return k.to(COMPUTE)


@triton.jit
def attend_kernel(
    q_rows, far_rows, pages, out_rows, lse, partial, sink_logits, lengths, mask, terms, tables, kv_heads, group, nq,
    row_tiles, splits,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Fill out and lse [B, Hq, Nq]; or, if there are splits, partial [splits, B, Hq, Nq, DV] and lse [splits, B, ...].

    far_rows: q rotated for the keys below mask.sinks, where positions are those in the cache.
    """
    pid = tl.program_id(0)
    split = pid % splits
    tile = pid // splits % row_tiles
    h = pid // splits // row_tiles % kv_heads
    b = pid // splits // row_tiles // kv_heads
    queries = b * 0 + nq
    if lengths.query_lens is not None:
        queries = tl.load(lengths.query_lens + b)
    keys = b * 0
    if lengths.nk is not None:
        keys += lengths.nk
    if lengths.key_lens is not None:
        keys = tl.load(lengths.key_lens + b)
    shift = position_of_first(mask, b, queries, keys)
    if lengths.nk is not None:
        keys = tl.maximum(tl.minimum(keys, lengths.nk), 0)

    row = tile * M + tl.arange(0, M)
    i = row // group
    head = h * group + row % group
    exists = i < nq
    inside = i < queries
    p = shift + i
    if lengths.depths is not None:
        p = shift + tl.load(lengths.depths + tl.cast(b, tl.int64) * lengths.depths_batch + i, mask=inside, other=0)
    lowest = tl.min(tl.where(inside, p, keys))
    highest = tl.max(tl.where(inside, p, 0))
    sink_start, sink_tiles, start, left_tiles, middle, right, stop = key_tiles(
        mask, lowest, highest, keys, None, None, N
    )
    tiles = tl.where(tile * M < queries * group, sink_tiles + tl.cdiv(stop - start, N), 0)
    share = tl.cdiv(tiles, splits)

    q_base = q_rows.ptr + tl.cast(b, tl.int64) * q_rows.batch
    places = q_base + (head.to(tl.int64) * q_rows.head + i.to(tl.int64) * q_rows.token)[:, None]
    column = tl.arange(0, D)
    q = tl.load(places + column[None, :], mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0).to(COMPUTE)
    far = None
    if far_rows.ptr is not None:
        places = far_rows.ptr + tl.cast(b, tl.int64) * far_rows.batch
        places += (head.to(tl.int64) * far_rows.head + i.to(tl.int64) * far_rows.token)[:, None]
        far = tl.load(places + column[None, :], mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)
        far = far.to(COMPUTE)
    slope = None
    if terms.slopes is not None:
        at = terms.slopes + tl.cast(b, tl.int64) * terms.slopes_batch + head
        slope = tl.load(at, mask=exists, other=0.0)[:, None]

    acc = tl.zeros([M, DV], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    if sink_logits is not None:  # one more key, without a value, of the first split
        sink = tl.load(sink_logits + head, mask=inside & (split == 0), other=float("-inf"))
        top = sink * LOG2E
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    for n in range(split * share, tl.minimum((split + 1) * share, tiles)):
        j = tile_start(n, sink_start, sink_tiles, start, N) + tl.arange(0, N)
        shown = near_or_sink(mask, lowest, j, j < keys)  # by some query: what nobody sees may hold anything
        page, slot = place_of(pages, b, j, shown)
        place = j
        if far_rows.ptr is not None:
            place = j - shift
            if mask.sinks is not None:
                place = tl.where(j < mask.sinks, j, place)
        k = _load_keys(rows_at(pages.k, page, h, slot), tables, place, b, shown, WIDTH, D, PAIRS, INTERLEAVED, COMPUTE)
        products = product(q, tl.trans(k), None, PRECISION)  # [M, D] @ [D, N]
        if far_rows.ptr is not None:
            if mask.sinks is not None:
                products = tl.where((j < mask.sinks)[None, :], product(far, tl.trans(k), None, PRECISION), products)
        if pages.k_scales is not None:
            scale = tl.load(scales_at(pages.k_scales, pages, page, h, slot, kv_heads), mask=shown, other=0.0)
            products *= scale[None, :]
        seen = visible(mask, p[:, None], j[None, :], shown[None, :] & inside[:, None], None, None)
        if lengths.tree is not None:
            new = (j - shift)[None, :]
            at = tl.cast(b, tl.int64) * lengths.tree_batch + i.to(tl.int64)[:, None] * nq + new
            branch = tl.load(lengths.tree + at, mask=seen & (new >= 0), other=1)
            seen = seen & (branch != 0)
        x, _ = scores(products, terms, b, head[:, None], i[:, None], j[None, :], p[:, None], seen, slope, PLAIN)
        x = tl.where(seen, x, float("-inf"))

        factor = unit(terms, PLAIN)
        new_top = tl.maximum(top, tl.max(x, 1) * factor)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing so far
        weights = tl.exp2(x * factor - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        v = _load(rows_at(pages.v, page, h, slot), shown, V_WIDTH, DV)
        if pages.v_scales is not None:
            scale = tl.load(scales_at(pages.v_scales, pages, page, h, slot, kv_heads), mask=shown, other=0.0)
            v = v.to(tl.float32) * scale[:, None]
        v = v.to(COMPUTE)
        acc = product(narrow(weights, v, PRECISION), v, acc * shrink[:, None], PRECISION)  # [M, N] @ [N, DV]
        top = new_top

    found = total > 0
    total = tl.where(found, total, 1.0)
    acc *= (1.0 / total)[:, None]
    log_sum = tl.where(found, (top + tl.log2(total)) * LN2, float("-inf"))
    at = (tl.cast(b, tl.int64) * kv_heads * group + head) * nq + i  # of [B, Hq, Nq]
    v_column = tl.arange(0, DV)[None, :]
    here = exists[:, None] & (v_column < V_WIDTH)
    if partial is not None:
        at += tl.cast(split, tl.int64) * (tl.num_programs(0) // splits // row_tiles) * group * nq
        tl.store(partial + at[:, None] * DV + v_column, acc, mask=here)
    else:
        places = out_rows.ptr + tl.cast(b, tl.int64) * out_rows.batch
        places += (head.to(tl.int64) * out_rows.head + i.to(tl.int64) * out_rows.token)[:, None]
        tl.store(places + v_column, acc.to(out_rows.ptr.dtype.element_ty), mask=here)
    tl.store(lse + at, log_sum, mask=exists)


@triton.jit
def combine_kernel(
    partial, partial_lse, out_rows, lse, heads, nq, splits, V_WIDTH: tl.constexpr, DV: tl.constexpr, S: tl.constexpr
):
    """Merge what `splits` programs found of a query: a program per query and head. S splits at once."""
    at = tl.program_id(0).to(tl.int64)  # of [B, Hq, Nq]
    rows = tl.num_programs(0).to(tl.int64)
    s = tl.arange(0, S)
    top = tl.full([], float("-inf"), tl.float32)
    for first in range(0, splits, S):
        part = tl.load(partial_lse + (first + s) * rows + at, mask=first + s < splits, other=float("-inf"))
        top = tl.maximum(top, tl.max(part))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([DV], tl.float32)
    column = tl.arange(0, DV)
    for first in range(0, splits, S):
        inside = first + s < splits
        weight = tl.exp2(
            (tl.load(partial_lse + (first + s) * rows + at, mask=inside, other=float("-inf")) - base) * LOG2E
        )
        places = ((first + s) * rows + at)[:, None] * DV + column[None, :]
        found = tl.load(partial + places, mask=inside[:, None] & (column < V_WIDTH)[None, :], other=0.0)
        acc += tl.sum(found * weight[:, None], 0)
        total += tl.sum(weight)
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    i = at % nq
    h = at // nq % heads
    b = at // nq // heads
    out = out_rows.ptr + b * out_rows.batch + h * out_rows.head + i * out_rows.token
    tl.store(out + column, (acc / total).to(out_rows.ptr.dtype.element_ty), mask=column < V_WIDTH)
    tl.store(lse + at, tl.where(seen, tl.log2(total) * LN2 + base, float("-inf")))
