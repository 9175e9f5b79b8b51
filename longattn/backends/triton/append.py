"""The new tokens of a call on a cache, in one launch: queries and keys rotate, keys and values go to their slots."""

import triton
import triton.language as tl

from longattn.backends.triton.pages import place_of, rows_at, scales_at
from longattn.backends.triton.rope import partners, turned
from longattn.backends.triton.tiles import rows_of


@triton.jit
def _load_turned(
    base, rows, t, inside, angle, factor,
    WIDTH: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Rows t of the head at `base`, rotated by `angle` [T, D] if TURN: float32 [T, D]."""
    places = base + t.to(tl.int64)[:, None] * rows.token
    column = tl.arange(0, D)
    here = inside[:, None] & (column < WIDTH)[None, :]
    x = tl.load(places + column[None, :], mask=here, other=0.0).to(tl.float32)
    if TURN:
        _, partner, sign, turning = partners(D, PAIRS, INTERLEAVED)
        other = tl.load(places + partner[None, :], mask=inside[:, None] & turning[None, :], other=0.0).to(tl.float32)
        x = turned(x, other, tl.cos(angle) * factor, tl.sin(angle) * factor, sign, turning)
    return x


@triton.jit
def _store(x, rows, scales, inside, WIDTH: tl.constexpr, D: tl.constexpr):
    """Write x [T, D] to rows at these addresses; where they are int8, in steps of max|x| / 127."""
    column = tl.arange(0, D)[None, :]
    here = inside[:, None] & (column < WIDTH)
    if scales is not None:
        scale = tl.max(tl.abs(x), 1) / 127.0
        broken = tl.sum(tl.where(tl.abs(x) < float("inf"), 0, 1), 1) > 0  # NaN is not less either
        tl.store(scales, tl.where(broken, float("nan"), scale), mask=inside)
        steps = tl.floor(x / tl.where(broken | (scale == 0), float("inf"), scale)[:, None] + 0.5)
        steps = tl.where(broken[:, None], 0.0, tl.minimum(tl.maximum(steps, -127.0), 127.0))
        tl.store(rows[:, None] + column, steps.to(tl.int8), mask=here)
    else:
        tl.store(rows[:, None] + column, x.to(rows.dtype.element_ty), mask=here)


@triton.jit
def append_kernel(
    q_rows, near_rows, far_rows, k_rows, v_rows, pages, lengths, rotation, q_heads, kv_heads, n, tiles,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, TURN_KEYS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Fill near_rows (and far_rows) with q rotated, and the slots of new keys and values. T tokens of a head a program.

    The first q_heads heads are queries', 0 if there are none to rotate. far_rows: as in `attend_kernel`.
    """
    pid = tl.program_id(0)
    first = pid % tiles * T
    head = pid // tiles % (q_heads + kv_heads)
    b = pid // tiles // (q_heads + kv_heads)
    queries = tl.load(lengths.query_lens + b)
    shift = tl.load(lengths.key_lens + b) - queries
    t = first + tl.arange(0, T)
    inside = t < queries
    angle = tl.zeros([T, D], tl.float32)
    frequency = tl.zeros([D], tl.float32)
    position = (shift + t).to(tl.float32)
    if rotation.inv_freq is not None:
        pair, _, _, turning = partners(D, PAIRS, INTERLEAVED)
        frequency = tl.load(rotation.inv_freq + b * rotation.inv_freq_batch + pair, mask=turning, other=0.0)
        if rotation.positions is not None:
            at = rotation.positions + tl.cast(b, tl.int64) * rotation.positions_batch + t
            position = tl.load(at, mask=inside, other=0.0)
        angle = position[:, None] * frequency[None, :]

    if head < q_heads:
        if near_rows.ptr is not None:
            base = rows_of(q_rows, b, head, 0)
            column = tl.arange(0, D)[None, :]
            here = inside[:, None] & (column < WIDTH)
            if far_rows.ptr is not None:
                angle = t.to(tl.float32)[:, None] * frequency[None, :]
                last = tl.minimum(shift + t, rotation.last).to(tl.float32)
                far = last[:, None] * frequency[None, :]
                x = _load_turned(base, q_rows, t, inside, far, rotation.factor, WIDTH, D, PAIRS, INTERLEAVED, True)
                places = rows_of(far_rows, b, head, 0) + t.to(tl.int64)[:, None] * far_rows.token + column
                tl.store(places, x.to(far_rows.ptr.dtype.element_ty), mask=here)
            x = _load_turned(base, q_rows, t, inside, angle, rotation.factor, WIDTH, D, PAIRS, INTERLEAVED, True)
            places = rows_of(near_rows, b, head, 0) + t.to(tl.int64)[:, None] * near_rows.token + column
            tl.store(places, x.to(near_rows.ptr.dtype.element_ty), mask=here)
    else:
        if k_rows.ptr is not None:
            h = head - q_heads
            page, slot = place_of(pages, b, shift + t, inside)
            k_scales = None
            v_scales = None
            if pages.k_scales is not None:
                k_scales = scales_at(pages.k_scales, pages, page, h, slot, kv_heads)
                v_scales = scales_at(pages.v_scales, pages, page, h, slot, kv_heads)
            x = _load_turned(
                rows_of(k_rows, b, h, 0), k_rows, t, inside, angle, rotation.factor, WIDTH, D, PAIRS, INTERLEAVED,
                TURN_KEYS,
            )  # fmt: skip
            _store(x, rows_at(pages.k, page, h, slot), k_scales, inside, WIDTH, D)
            x = _load_turned(rows_of(v_rows, b, h, 0), v_rows, t, inside, 0.0, 1.0, V_WIDTH, DV, 0, False, False)
            _store(x, rows_at(pages.v, page, h, slot), v_scales, inside, V_WIDTH, DV)
