"""Which weights dropout keeps: Philox4x32-10 on (seed, b, h, i, j), bit by bit as longattn.backends.philox."""

import triton
import triton.language as tl


@triton.jit
def kept(dropout, b, h, i, start, BLOCK: tl.constexpr):
    """Whether queries i [M] of head h keep keys start..start + BLOCK: [M, BLOCK]; start is a multiple of 4.

    The counter is (j // 4, i, h, b), all counted from the call's origin, and entry j reads word j % 4.
    """
    first = start
    rows = i[:, None]
    if dropout.key is not None:
        first += dropout.key
        rows += dropout.query
        h += dropout.head
        b += dropout.sequence
    if dropout.uneven is not None:  # the four keys of a counter lie in two tiles: each entry computes its own
        j = first + tl.arange(0, BLOCK)[None, :]
        w0, w1, w2, w3 = _words(dropout, b, h, rows, j // 4)
        words = tl.where(j % 4 < 2, tl.where(j % 4 == 0, w0, w1), tl.where(j % 4 == 2, w2, w3))
    else:
        w0, w1, w2, w3 = _words(dropout, b, h, rows, first // 4 + tl.arange(0, BLOCK // 4)[None, :])
        even = tl.join(w0, w2)  # words 0, 2 and 1, 3, so that the last two dimensions read 0, 1, 2, 3
        odd = tl.join(w1, w3)
        words = tl.reshape(tl.join(even, odd), (i.shape[0], BLOCK))
    return words.to(tl.uint32, bitcast=True) >= tl.full([], dropout.threshold, tl.uint32)


@triton.jit
def _words(dropout, b, h, rows, quads):
    """The four words of each of the counters."""
    head = tl.full([1, 1], 0, tl.int32) + h
    batch = tl.full([1, 1], 0, tl.int32) + b
    quads, rows = tl.broadcast(quads.to(tl.int32), rows.to(tl.int32))
    return tl.philox(tl.load(dropout.seed), quads, rows, head.to(tl.int32), batch.to(tl.int32))
