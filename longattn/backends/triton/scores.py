"""From products q k^T to scores: scale, softcap, slopes, bias. Scores are in units of log 2, for exp2.

Arguments i, j, p (queries, keys, positions) broadcast to the tile, whichever way round it lies.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def tanh(x):
    """To a few units in the last place: where 1 - 2 / (e^2x + 1) cancels, a polynomial in x^2, fitted on [0, 0.65]."""
    u = x * x
    poly = -0.008269443300517317 + u * 0.002216786138167443
    poly = 0.02174268259592488 + u * poly
    poly = -0.05395528963971964 + u * poly
    poly = 0.13333279797379394 + u * poly
    poly = -0.33333332805893406 + u * poly
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.65, x + x * u * poly, tl.where(x < 0, -far, far))


@triton.jit
def slope_of(terms, b, h):
    """The ALiBi slope of head h, or None."""
    slope = None
    if terms.slopes is not None:
        slope = tl.load(terms.slopes + tl.cast(b, tl.int64) * terms.slopes_batch + h)
    return slope


@triton.jit
def bias_places(terms, b, h, i, j):
    """Offsets of bias entries."""
    head = tl.cast(b, tl.int64) * terms.bias_batch + tl.cast(h, tl.int64) * terms.bias_head
    return head + tl.cast(i, tl.int64) * terms.bias_query + tl.cast(j, tl.int64) * terms.bias_key


@triton.jit
def scores(products, terms, b, h, i, j, p, inside, slope, PLAIN: tl.constexpr):
    """(x, d): scores / ln 2 are x * unit(...), and d is the derivative of softcap, 1 without it.

    PLAIN: nothing but a positive scale, which is left to the exponential, where it is free.
    """
    if PLAIN:
        return products, 1.0
    else:
        x = products * terms.scale
        derivative = 1.0
        if terms.softcap is not None:
            capped = tanh(x / terms.softcap)
            derivative = 1.0 - capped * capped
            x = terms.softcap * capped
        if slope is not None:
            x -= slope * tl.abs(p - j).to(tl.float32)
        x *= LOG2E
        if terms.bias is not None:
            bias = tl.load(terms.bias + bias_places(terms, b, h, i, j), mask=inside, other=0)
            if terms.bias.dtype.element_ty == tl.uint8:
                x = tl.where(bias != 0, x, float("-inf"))
            else:
                bias = bias.to(tl.float32)
                x += tl.where(bias == float("-inf"), bias, tl.maximum(bias * LOG2E, LOWEST))  # finite ones hide nothing
        return x, derivative


@triton.jit
def unit(terms, PLAIN: tl.constexpr):
    """What `scores` left to multiply by."""
    if PLAIN:
        return terms.scale * LOG2E
    else:
        return 1.0
