"""Where a cache keeps key j: problem.Slots on the device."""

import triton
import triton.language as tl


@triton.jit
def place_of(pages, b, j, shown):
    """(page, slot in it) of keys j [N] of sequence b, the page as int64; any place where not `shown`."""
    slot = j
    if pages.ring is not None:
        slot = tl.where(j < pages.sinks, j, pages.sinks + (j - pages.sinks) % pages.ring)
    if pages.table is None:
        page = tl.cast(b, tl.int64)
    elif pages.places is None:  # a sequence is a page
        page = tl.load(pages.table + b).to(tl.int64)
    else:
        at = pages.table + tl.cast(b, tl.int64) * pages.places + slot // pages.size
        page = tl.load(at, mask=shown, other=0).to(tl.int64)
        slot = slot % pages.size
    return page, slot.to(tl.int64)


@triton.jit
def rows_at(rows, page, h, slot):
    """Addresses [N] of head h's rows in slots of `rows`: Rows [P, Hkv, S, D]."""
    return rows.ptr + page * rows.batch + tl.cast(h, tl.int64) * rows.head + slot * rows.token


@triton.jit
def scales_at(scales, pages, page, h, slot, kv_heads):
    """Addresses [N] of their scales, [P, Hkv, S]."""
    return scales + (page * kv_heads + h) * pages.size + slot
