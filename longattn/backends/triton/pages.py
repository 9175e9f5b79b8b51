"""Where a cache keeps key j: problem.Slots on the device."""

import triton
import triton.language as tl


@triton.jit
def rows_in_pages(pages, b, h, kv_heads, j, shown):
    """Row of each key j [N] of head h among all rows [P, Hkv, S] of the slots, int64; any row where not `shown`."""
    slot = j
    if pages.ring is not None:
        slot = tl.where(j < pages.sinks, j, pages.sinks + (j - pages.sinks) % pages.ring)
    if pages.places is None:  # a sequence is a page
        page = tl.load(pages.table + b).to(tl.int64)
        row = (page * kv_heads + h) * pages.size + slot
    else:
        at = pages.table + tl.cast(b, tl.int64) * pages.places + slot // pages.size
        page = tl.load(at, mask=shown, other=0).to(tl.int64)
        row = (page * kv_heads + h) * pages.size + slot % pages.size
    return row
