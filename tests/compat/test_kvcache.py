"""flash_attn_with_kvcache against its documentation, in float64: what it returns, and what it leaves in the cache."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from compat.flash_oracle import sequence, turned
from longattn.compat.flash_attn import flash_attn_with_kvcache

BATCH, CAPACITY, WIDTH, PAGE = 3, 24, 8, 4


@pytest.mark.parametrize("seed", range(24))
def test_against_the_documentation(seed: int) -> None:
    rng = random.Random(seed)
    heads_k = rng.choice([1, 2])
    heads = heads_k * rng.choice([1, 2])
    nq = rng.choice([1, 1, 3, 5])
    added = rng.choice([0, nq, rng.randint(1, 4)])
    paged = rng.random() < 0.4
    keywords: dict[str, Any] = {"causal": rng.random() < 0.5, "num_splits": rng.choice([0, 1, 4])}
    if rng.random() < 0.4:
        keywords["window_size"] = rng.choice([(4, 2), (3, -1), (-1, 0)])
    if rng.random() < 0.3:
        keywords["softcap"] = 2.0
    if rng.random() < 0.3:
        keywords["alibi_slopes"] = torch.rand(heads)

    lengths = torch.tensor([rng.randint(0, CAPACITY - max(added, nq)) for _ in range(BATCH)], dtype=torch.int32)
    if rng.random() < 0.2:
        lengths = lengths[:1].expand(BATCH)
    filled = not added and rng.random() < 0.2  # no cache_seqlens: all of the cache counts
    if filled:
        lengths = torch.full((BATCH,), CAPACITY, dtype=torch.int32)

    # Rows in the cache hold NaN wherever no token was written; sequence b's tokens stand in places[b].
    rows, table, leftpad = None, None, torch.zeros(BATCH, dtype=torch.int32)
    if paged:
        pages = 2 * BATCH * CAPACITY // PAGE
        caches = [torch.full((pages, PAGE, heads_k, WIDTH), torch.nan, dtype=torch.float64) for _ in range(2)]
        table = torch.randperm(pages)[: BATCH * CAPACITY // PAGE].view(BATCH, -1).int()
        place = torch.arange(CAPACITY)
        places = [(table[b][place // PAGE], place % PAGE) for b in range(BATCH)]
    else:
        caches = [torch.full((2 * BATCH, CAPACITY, heads_k, WIDTH), torch.nan, dtype=torch.float64) for _ in range(2)]
        if rng.random() < 0.5:
            rows = torch.randperm(2 * BATCH)[:BATCH].int()
        if rng.random() < 0.4:
            leftpad = torch.tensor([rng.randint(0, int(n)) for n in lengths], dtype=torch.int32)
            keywords["cache_leftpad"] = leftpad
        at = range(BATCH) if rows is None else rows.tolist()
        places = [(torch.full((CAPACITY,), row), torch.arange(CAPACITY)) for row in at]
    for b, n in enumerate(lengths.tolist()):
        inside = tuple(index[leftpad[b] : n] for index in places[b])
        for cache in caches:
            cache[inside] = torch.randn(n - int(leftpad[b]), heads_k, WIDTH, dtype=torch.float64)

    q = torch.randn(BATCH, nq, heads, WIDTH, dtype=torch.float64)
    new = [torch.randn(BATCH, added, heads_k, WIDTH, dtype=torch.float64) for _ in range(2)] if added else [None, None]
    interleaved = rng.random() < 0.5
    tables: list[Any] = [None, None]
    if added and rng.random() < 0.6:
        angle = torch.rand(CAPACITY + 8, rng.choice([1, 2, 4]), dtype=torch.float64) * 6
        tables = [angle.cos(), angle.sin()]
    expected = [cache.clone() for cache in caches]

    out, lse = flash_attn_with_kvcache(
        q,
        *caches,
        *new,
        *tables,
        cache_seqlens=None if filled else int(lengths[0]) if len(set(lengths.tolist())) == 1 else lengths,
        cache_batch_idx=rows,
        block_table=table,
        rotary_interleaved=interleaved,
        return_softmax_lse=True,
        **keywords,
    )

    in_order = keywords["causal"] or keywords.get("window_size", (-1, -1)) != (-1, -1)
    for b, n in enumerate(lengths.tolist()):
        query = q[b]
        if added:
            fresh_k, fresh_v = (x[b] for x in new)
            if tables[0] is not None:
                at = n + torch.arange(nq) * in_order
                query = turned(query, tables[0][at], tables[1][at], interleaved)
                fresh_k = turned(fresh_k, *(table[n : n + added] for table in tables), interleaved)
            target = tuple(index[n : n + added] for index in places[b])
            expected[0][target], expected[1][target] = fresh_k, fresh_v
        seen = tuple(index[leftpad[b] : n + added] for index in places[b])
        mask = {name: keywords[name] for name in ("causal", "window_size", "softcap") if name in keywords}
        want, want_lse, _ = sequence(query, expected[0][seen], expected[1][seen], keywords.get("alibi_slopes"), **mask)
        torch.testing.assert_close(out[b], want)
        torch.testing.assert_close(lse[b], want_lse)
    for got, want in zip(caches, expected, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_entries_past_the_last_page_may_hold_anything() -> None:
    pages = torch.randn(6, PAGE, 2, WIDTH)
    q = torch.randn(2, 1, 2, WIDTH)
    lengths = torch.tensor([3, 8], dtype=torch.int32)
    tables = [torch.tensor([[5, last, last], [1, 0, last]], dtype=torch.int32) for last in (0, -1, 10**6)]
    first, *others = (flash_attn_with_kvcache(q, pages, pages, cache_seqlens=lengths, block_table=t) for t in tables)
    assert all(torch.equal(first, other) for other in others)


def test_decoding_step_by_step_gives_the_whole() -> None:
    q, k, v = (torch.randn(2, 9, 2, WIDTH) for _ in range(3))
    caches: list[Tensor] = [torch.full((2, 12, 2, WIDTH), torch.nan) for _ in range(2)]
    steps = [
        flash_attn_with_kvcache(q[:, i : i + 1], *caches, k[:, i : i + 1], v[:, i : i + 1], cache_seqlens=i)
        for i in range(9)
    ]
    whole = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(torch.cat(steps, 1), whole.transpose(1, 2))
