"""Rotary positions: one launch for q or for k, any strides, either way round."""

import triton
import triton.language as tl


@triton.jit
def rope_kernel(
    x_rows, out_rows, inv_freq, positions, positions_batch, n, heads, factor,
    PAIRS: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    T: tl.constexpr, P: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Fill out [B, H, N, WIDTH] with x, its first 2 * PAIRS entries turned. A program turns T tokens of all heads.

    Out may be x itself. T tokens, P pairs (PAIRS padded to a power of two), REST: entries that do not turn, padded; 0
    where there are none, or where they stand already.
    """
    tiles = tl.cdiv(n, T)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles * T + tl.arange(0, T)
    pair = tl.arange(0, P)
    inside = t < n
    position = tl.load(positions + b * positions_batch + t, mask=inside, other=0.0)
    angle = position[:, None] * tl.load(inv_freq + pair, mask=pair < PAIRS, other=0.0)[None, :]  # [T, P]
    cos = tl.cos(angle) * factor
    sin = tl.sin(angle) * factor
    if INVERSE:
        sin = -sin
    x_base = x_rows.ptr + b * x_rows.batch + t.to(tl.int64)[:, None] * x_rows.token
    out_base = out_rows.ptr + b * out_rows.batch + t.to(tl.int64)[:, None] * out_rows.token
    dtype = out_rows.ptr.dtype.element_ty
    for h in range(heads):
        x_head = x_base + tl.cast(h, tl.int64) * x_rows.head
        out_head = out_base + tl.cast(h, tl.int64) * out_rows.head
        if INTERLEAVED:
            column = tl.arange(0, 2 * P)[None, :]
            here = inside[:, None] & (column < 2 * PAIRS)
            both = tl.load(x_head + column, mask=here, other=0.0).to(tl.float32)
            a, c = tl.split(tl.reshape(both, (T, P, 2)))
            turned = tl.reshape(tl.join(a * cos - c * sin, c * cos + a * sin), (T, 2 * P))
            tl.store(out_head + column, turned.to(dtype), mask=here)
        else:
            column = pair[None, :]
            here = inside[:, None] & (column < PAIRS)
            a = tl.load(x_head + column, mask=here, other=0.0).to(tl.float32)
            c = tl.load(x_head + PAIRS + column, mask=here, other=0.0).to(tl.float32)
            tl.store(out_head + column, (a * cos - c * sin).to(dtype), mask=here)
            tl.store(out_head + PAIRS + column, (c * cos + a * sin).to(dtype), mask=here)
        if REST > 0:
            column = 2 * PAIRS + tl.arange(0, REST)[None, :]
            here = inside[:, None] & (column < WIDTH)
            tl.store(out_head + column, tl.load(x_head + column, mask=here), mask=here)
