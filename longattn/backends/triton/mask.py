"""Which keys a query may see: longattn.mask.Mask on the device, the only description of visibility in the kernels.

A query at position p sees the key at position j exactly if

    (right is None or j <= p + right)  and  (left is None or j >= p - left or j < sinks)

and the tensors beside the mask allow it. `Visibility` and `Sequences` of params.py carry the numbers.
"""

import triton
import triton.language as tl

# Positions and windows stay below 2^29 and 2^30, so that sums of them fit 32 bits.
_FARTHEST = tl.constexpr(1 << 29)


@triton.jit
def position_of_first(mask, b, queries, keys):
    """The position of the first of so many queries, given the number of keys."""
    shift = mask.shift + mask.from_end * (keys - queries)
    if mask.offset is not None:
        shift = tl.minimum(tl.maximum(tl.load(mask.offset + b), -_FARTHEST), _FARTHEST)
    return shift


@triton.jit
def sequence(sequences, mask, b):
    """(batch row, first query row, queries, first key row, keys, shift): query i stands at position i + shift.

    What cu_seqlens and key_lens hold is clamped to the tensors' own rows.
    """
    row = b
    q_first = b * 0
    k_first = b * 0
    lq = b * 0 + sequences.nq  # never a constant: a length of 1 would be compiled in as one
    lk = b * 0 + sequences.nk
    if sequences.cu_q is not None:
        row = b * 0
        q_first = tl.minimum(tl.maximum(tl.load(sequences.cu_q + b), 0), sequences.nq)
        lq = tl.minimum(tl.maximum(tl.load(sequences.cu_q + b + 1), q_first), sequences.nq) - q_first
        k_first = tl.minimum(tl.maximum(tl.load(sequences.cu_k + b), 0), sequences.nk)
        lk = tl.minimum(tl.maximum(tl.load(sequences.cu_k + b + 1), k_first), sequences.nk) - k_first
    keys = lk
    if sequences.key_lens is not None:
        keys = tl.load(sequences.key_lens + b)
        lk = tl.maximum(tl.minimum(lk, keys), 0)
    return row, q_first, lq, k_first, lk, position_of_first(mask, b, lq, keys)


@triton.jit
def query_bound(bound, mask, b, i, lq):
    """`bound`, one of mask.lo and mask.hi, of queries i; each sees keys of [lo, hi) only. None without bounds."""
    found = None
    if bound is not None:
        row = tl.minimum(i, lq - 1)  # past the last query its own bound, which widens no tile's range
        found = tl.load(bound + tl.cast(b, tl.int64) * mask.bounds_batch + row, mask=row >= 0, other=0)
    return found


@triton.jit
def keys_shown(mask, b, nk, j, lk):
    """Whether keys j exist and the key_mask shows them."""
    shown = j < lk
    if mask.key_mask is not None:
        shown = shown & (tl.load(mask.key_mask + tl.cast(b, tl.int64) * nk + j, mask=shown, other=0) != 0)
    return shown


@triton.jit
def near_or_sink(mask, p, j, shown):
    """`shown` where keys j are not too old for queries at positions p."""
    if mask.left is not None:
        near = j >= p - mask.left
        if mask.sinks is not None:
            near = near | (j < mask.sinks)
        shown = shown & near
    return shown


@triton.jit
def visible(mask, p, j, shown, lo, hi):
    """Whether queries at positions p see keys j, given keys_shown and query_bound; all broadcast together."""
    seen = near_or_sink(mask, p, j, shown)
    if mask.right is not None:
        seen = seen & (j <= p + mask.right)
    if lo is not None:
        seen = seen & (lo <= j) & (j < hi)
    return seen


@triton.jit
def key_range(mask, first, last, lk):
    """Mask.kv_range for queries at positions first..last: (sinks, start, full_start, full_stop, stop)."""
    stop = lk
    full_stop = lk
    start = lk * 0
    full_start = start
    sinks = start
    if mask.right is not None:
        stop = tl.maximum(tl.minimum(lk, last + mask.right + 1), 0)
        full_stop = tl.maximum(tl.minimum(lk, first + mask.right + 1), 0)
    if mask.left is not None:
        start = tl.maximum(tl.minimum(stop, first - mask.left), 0)
        full_start = tl.maximum(last - mask.left, 0)
        if mask.sinks is not None:
            sinks = tl.minimum(mask.sinks, start)
    return sinks, start, tl.minimum(tl.maximum(full_start, start), stop), full_stop, stop


@triton.jit
def key_tiles(mask, first, last, lk, lo, hi, BLOCK: tl.constexpr):
    """The tiles of keys that queries at positions first..last meet, as three loops over first keys:

        left boundary: tile_start(n, ...) for n in [0, left tiles), the sinks' tiles among them
        middle: [middle, right), all visible, untested
        right boundary: [right, stop)

    Returns (sink_start, sink_tiles, start, left_tiles, middle, right, stop).
    """
    sinks, start, full_start, full_stop, stop = key_range(mask, first, last, lk)
    lowest = start * 0
    if lo is not None:
        lowest = tl.maximum(tl.min(lo), 0)
        stop = tl.minimum(stop, tl.maximum(tl.max(hi), 0))
        start = tl.minimum(tl.maximum(start, lowest), stop)
        sinks = tl.minimum(sinks, stop)
    start = start // BLOCK * BLOCK
    sink_start = lowest // BLOCK * BLOCK
    sink_tiles = tl.maximum(tl.minimum((sinks + BLOCK - 1) // BLOCK * BLOCK, start) - sink_start, 0) // BLOCK
    if (mask.key_mask is not None) or (lo is not None):
        right = start  # any key may be hidden: test them all
        middle = start
    else:
        middle = tl.maximum((full_start + BLOCK - 1) // BLOCK * BLOCK, start)
        right = tl.maximum(full_stop // BLOCK * BLOCK, middle)
        # Where nothing is fully visible, what lies before `middle` is the left loop's, all else the right loop's.
        stop = tl.maximum(stop, start)
        middle = tl.minimum(middle, (stop + BLOCK - 1) // BLOCK * BLOCK)
        right = tl.minimum(right, tl.maximum(stop // BLOCK * BLOCK, middle))
    left_tiles = sink_tiles + (middle - start) // BLOCK
    return sink_start, sink_tiles, start, left_tiles, middle, right, stop


@triton.jit
def tile_start(n, sink_start, sink_tiles, start, BLOCK: tl.constexpr):
    """The first key of tile n of the left boundary: the sinks' tiles come before the window's."""
    return tl.where(n < sink_tiles, sink_start + n * BLOCK, start + (n - sink_tiles) * BLOCK)


@triton.jit
def query_tiles(mask, first, last, lq, shift, BLOCK: tl.constexpr):
    """The tiles of queries that keys first..last meet, as three loops over first queries:
    [start, middle) with a test, [middle, right) all visible, [right, stop) with a test.
    """
    start = lq * 0
    full_start = start
    stop = lq
    full_stop = lq
    if mask.right is not None:
        start = tl.maximum(first - mask.right - shift, 0)
        full_start = tl.maximum(last - mask.right - shift, 0)
    if mask.left is not None:
        stop = tl.minimum(lq, last + mask.left - shift + 1)
        full_stop = tl.minimum(lq, first + mask.left - shift + 1)
        if mask.sinks is not None:
            stop = tl.where(first < mask.sinks, lq, stop)
            full_stop = tl.where(last < mask.sinks, lq, full_stop)
    start = start // BLOCK * BLOCK
    stop = tl.maximum(stop, start)
    if (mask.key_mask is not None) or (mask.lo is not None):
        middle = start
        right = start
    else:
        middle = tl.minimum(
            tl.maximum((full_start + BLOCK - 1) // BLOCK * BLOCK, start), (stop + BLOCK - 1) // BLOCK * BLOCK
        )
        right = tl.maximum(tl.maximum(full_stop, 0) // BLOCK * BLOCK, middle)
    return start, middle, right, stop
