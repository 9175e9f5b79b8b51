"""Rotary positions: one launch for queries and keys, any strides, either way round."""

import triton
import triton.language as tl


@triton.jit
def partners(D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """For columns 0..D - 1: (pair, the column it turns with, the sign of that one's sine, whether it turns at all)."""
    column = tl.arange(0, D)
    if INTERLEAVED:
        pair = column // 2
        second = column % 2 == 1
        partner = tl.where(second, column - 1, column + 1)
    else:
        second = column >= PAIRS
        pair = tl.where(second, column - PAIRS, column)
        partner = tl.where(second, column - PAIRS, column + PAIRS)
    turning = column < 2 * PAIRS
    return tl.where(turning, pair, 0), tl.where(turning, partner, column), tl.where(second, 1.0, -1.0), turning


@triton.jit
def turned(x, other, cos, sin, sign, turning):
    """x [N, D] rotated, given its partners, the cosines and sines of its pairs, and what `partners` says."""
    return tl.where(turning[None, :], x * cos + sign[None, :] * other * sin, x)


@triton.jit
def _turn(
    x_rows, out_rows, inv_freq, positions, positions_batch, n, heads, factor, pid,
    PAIRS: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, P: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Turn T tokens of H heads: the cosines of a token serve all of them."""
    tiles = tl.cdiv(n, T)
    head_tiles = tl.cdiv(heads, H)
    t = pid % tiles * T + tl.arange(0, T)
    h = pid // tiles % head_tiles * H + tl.arange(0, H)
    b = (pid // tiles // head_tiles).to(tl.int64)
    pair = tl.arange(0, P)
    position = tl.load(positions + b * positions_batch + t, mask=t < n, other=0.0)
    angle = position[:, None] * tl.load(inv_freq + pair, mask=pair < PAIRS, other=0.0)[None, :]  # [T, P]
    cos = (tl.cos(angle) * factor)[None, :, :]
    sin = (tl.sin(angle) * factor)[None, :, :]
    if INVERSE:
        sin = -sin
    far_t = t.to(tl.int64)[None, :, None]
    far_h = h.to(tl.int64)[:, None, None]
    x_base = x_rows.ptr + b * x_rows.batch + far_h * x_rows.head + far_t * x_rows.token  # [H, T, 1]
    out_base = out_rows.ptr + b * out_rows.batch + far_h * out_rows.head + far_t * out_rows.token
    inside = (h < heads)[:, None, None] & (t < n)[None, :, None]
    dtype = out_rows.ptr.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * P)[None, None, :]
        here = inside & (column < 2 * PAIRS)
        both = tl.load(x_base + column, mask=here, other=0.0).to(tl.float32)
        a, c = tl.split(tl.reshape(both, (H, T, P, 2)))
        both = tl.reshape(tl.join(a * cos - c * sin, c * cos + a * sin), (H, T, 2 * P))
        tl.store(out_base + column, both.to(dtype), mask=here)
    else:
        column = pair[None, None, :]
        here = inside & (column < PAIRS)
        a = tl.load(x_base + column, mask=here, other=0.0).to(tl.float32)
        c = tl.load(x_base + PAIRS + column, mask=here, other=0.0).to(tl.float32)
        tl.store(out_base + column, (a * cos - c * sin).to(dtype), mask=here)
        tl.store(out_base + PAIRS + column, (c * cos + a * sin).to(dtype), mask=here)
    if REST > 0:
        column = 2 * PAIRS + tl.arange(0, REST)[None, None, :]
        here = inside & (column < WIDTH)
        tl.store(out_base + column, tl.load(x_base + column, mask=here), mask=here)


@triton.jit
def rope_kernel(
    x_rows, out_rows, positions, positions_batch, n, heads,
    y_rows, y_out_rows, y_positions, y_positions_batch, y_n, y_heads,
    x_programs, inv_freq, factor,
    PAIRS: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, P: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Fill out [B, heads, n, WIDTH] with x, its first 2 * PAIRS entries turned; and, if there is one, y_out with y.

    Out may be x itself. T tokens, H heads, P pairs (PAIRS padded to a power of two), REST: entries that do not turn,
    padded; 0 where there are none, or where they stand already.
    """
    pid = tl.program_id(0)
    if y_rows.ptr is None:
        _turn(
            x_rows, out_rows, inv_freq, positions, positions_batch, n, heads, factor, pid,
            PAIRS, WIDTH, INTERLEAVED, INVERSE, T, H, P, REST,
        )  # fmt: skip
    else:
        if pid < x_programs:
            _turn(
                x_rows, out_rows, inv_freq, positions, positions_batch, n, heads, factor, pid,
                PAIRS, WIDTH, INTERLEAVED, INVERSE, T, H, P, REST,
            )  # fmt: skip
        else:
            _turn(
                y_rows, y_out_rows, inv_freq, y_positions, y_positions_batch, y_n, y_heads, factor, pid - x_programs,
                PAIRS, WIDTH, INTERLEAVED, INVERSE, T, H, P, REST,
            )  # fmt: skip
