"""Calls on a cache in Triton's interpreter, against the cache's model; tiles are so small that many share the keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import longattn
from cache_model import KINDS, SINKS, WINDOW, Model, Stream, make_cache
from helpers import drawn, laid_out
from longattn import InvalidInput, KVCache, PagedKVCache, Rope, Unsupported, attention_with_cache, ops
from longattn.backends.triton import config, splits
from longattn.backends.triton.config import Tiles
from longattn.mask import Mask
from longattn.problem import Problem
from longattn.scaling import DynamicNTK, LongRoPE, YaRN


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "decode_tiles", lambda problem, dtype: Tiles(16, 16, 4, 1))
    monkeypatch.setattr(config, "LEAST_TILES", 1)


def stream(
    kind: str, dtype: torch.dtype = torch.float32, storage: torch.dtype | None = None, **keywords: Any
) -> Stream:
    """Two sequences of grouped heads, with widths that fill no tile."""
    options: dict[str, Any] = {"positions": "cache"} if keywords.pop("cache_positions", False) else {}
    options |= {"spare": 3} if kind == "sliding" else {}
    cache = make_cache(kind, 2, 1, (20, 12), storage or dtype, **options)
    window = {"window": WINDOW, "sinks": SINKS} if kind == "sliding" else {}
    return Stream(cache, Model(2, **window, frame="positions" in options), 3, dtype, "triton", **keywords)


@pytest.mark.parametrize(
    ("kind", "dtype", "rope"),
    drawn(KINDS, (torch.float32, torch.float16), (Rope(12), Rope(20, interleaved=True, scaling=YaRN(4.0, 64)))),
)
def test_steps_are_parts_of_one_attention(kind: str, dtype: torch.dtype, rope: Rope) -> None:
    steps = stream(kind, dtype, rope=rope)
    for new in (1, 30, 1):
        steps.step(new)


@pytest.mark.parametrize("kind", KINDS)
def test_score_features(kind: str) -> None:
    steps = stream(kind, softcap=5.0, scale=-0.4, sink_logits=torch.randn(3), alibi_slopes=torch.rand(3))
    steps.step(21)
    steps.step(1)
    steps.step(4, [1, 3])


def test_slopes_of_each_sequence() -> None:
    slopes = torch.rand(2, 3)
    q, k, v = torch.randn(2, 3, 1, 20), torch.randn(2, 1, 1, 20), torch.randn(2, 1, 1, 12)
    both, alone = (make_cache("contiguous", 2, 1, (20, 12), torch.float32) for _ in range(2))
    out = attention_with_cache(q, k, v, both, backend="triton", alibi_slopes=slopes)
    one = attention_with_cache(q[1:], k[1:], v[1:], alone, backend="triton", alibi_slopes=slopes[1:], sequences=[1])
    assert torch.equal(out[1:], one)


def test_unequal_lengths_and_chosen_sequences() -> None:
    for kind in KINDS:
        steps = stream(kind, rope=Rope(20))
        for new, lengths, sequences in ((17, [17, 0], None), (4, [3, 4], [1, 0]), (1, None, [1]), (2, [0, 1], None)):
            steps.step(new, lengths, sequences)


@pytest.mark.parametrize(
    ("kind", "dtypes"),
    drawn(KINDS, ((torch.float32, torch.float16), (torch.float16, torch.float32), (torch.float16, torch.int8))),
)
def test_storage_of_another_dtype(kind: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    if torch.int8 in dtypes:
        return _check_int8(kind, dtypes[0])
    steps = stream(kind, *dtypes, rope=Rope(20))
    for new in (11, 1, 4):
        steps.step(new)


def test_int8() -> None:
    _check_int8("contiguous", torch.float32)


def _check_int8(kind: str, dtype: torch.dtype) -> None:
    """Stored rows are off by half a scale at most, and attended to as they are stored."""
    cache, rope = make_cache(kind, 1, 2, (20, 12), torch.int8), Rope(20)
    q, k, v = (torch.randn(1, heads, 40, width).to(dtype) for heads, width in ((6, 20), (2, 20), (2, 12)))
    k[0, 1, 35], v[0, 0, 36] = 0.0, 1e-7
    for at in (slice(0, 39), slice(39, 40)):
        out = attention_with_cache(q[:, :, at], k[:, :, at], v[:, :, at], cache, rope=rope, backend="triton")
    positions, stored_k, stored_v = cache.read(0)
    turned = longattn.apply_rope(k.float(), rope)
    for exact, stored in ((turned[0, :, positions], stored_k), (v.float()[0, :, positions], stored_v)):
        scale = exact.abs().amax(-1, keepdim=True) / 127
        assert ((stored - exact).abs() <= 0.5 * scale * 1.001).all()
    turned = longattn.apply_rope(q[:, :, 39:].float(), rope, torch.tensor([39]))
    expected = longattn.attention(turned, stored_k[None], stored_v[None], backend="reference")
    limit = 2e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(out.float(), expected, atol=limit, rtol=limit)


def test_int8_shows_what_is_not_finite() -> None:
    cache = KVCache(1, 2, 4, dtype=torch.int8)
    k = torch.ones(1, 2, 2, 4)
    k[0, 0, 1, 2], k[0, 1, 1, 2] = torch.inf, torch.nan
    cache.append(k, torch.ones(1, 2, 2, 4), backend="triton")
    _, stored, _ = cache.read(0)
    assert stored[:, 0].isfinite().all() and stored[:, 1].isnan().all()


@pytest.mark.parametrize("rope", [Rope(20), Rope(12, interleaved=True, scaling=YaRN(4.0, 64))])
def test_positions_in_the_cache(rope: Rope) -> None:
    steps = stream("sliding", rope=rope, cache_positions=True)
    for new, lengths in ((1, None), (25, None), (1, None), (5, [2, 5])):
        steps.step(new, lengths)


@pytest.mark.parametrize(
    ("kind", "scaling"),
    drawn(KINDS, (DynamicNTK(2.0, 16), LongRoPE(4.0, 16, [1.0 + i for i in range(10)], [2.0 + i for i in range(10)]))),
)
def test_frequencies_that_change_with_the_length(kind: str, scaling: Any) -> None:
    steps = stream(kind, rope=Rope(20, scaling=scaling))
    for new, lengths in ((13, [13, 7]), (9, None), (1, None)):
        steps.step(new, lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_draft_trees(kind: str) -> None:
    steps = stream(kind, rope=Rope(20))
    steps.step(14)
    steps.step(4, [4, 2], None, [-1, 0, 0, 1])


def test_queries_alone_and_positions() -> None:
    for kind in KINDS:
        cache = make_cache(kind, 1, 1, (20, 12), torch.float32)
        k, v, q = torch.randn(1, 1, 19, 20), torch.randn(1, 1, 19, 12), torch.randn(1, 2, 4, 20)
        cache.append(k, v, backend="triton")
        if kind == "sliding":
            with pytest.raises(InvalidInput, match="keys that the ring still holds, got keys from 7 on"):
                attention_with_cache(q, None, None, cache, backend="triton")
            q = q[:, :, :1]
        found = [
            attention_with_cache(q, None, None, cache, return_lse=True, backend=name) for name in ("triton", "cpu")
        ]
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected)
    q = torch.randn(1, 2, 3, 20)
    rope, places = Rope(20), torch.tensor([[7, 3, 99]])
    caches = [KVCache(1, 1, 20, v_head_dim=12) for _ in range(2)]
    found = [
        attention_with_cache(q, k[:, :, :3], v[:, :, :3], cache, rope=rope, positions=places, backend=name)
        for cache, name in zip(caches, ("triton", "cpu"), strict=True)
    ]
    torch.testing.assert_close(*found)


def test_unwritten_memory_and_layouts() -> None:
    """Slots that hold no key may hold anything; q, k and v may lie anyhow."""
    for cache in (KVCache(2, 1, 20, v_head_dim=12), PagedKVCache(2, 1, 20, v_head_dim=12, num_pages=30, page_size=4)):
        for part in cache._storage[:2]:
            part.fill_(torch.nan)
        steps = Stream(cache, Model(2), 3, torch.float32, "triton", rope=Rope(8))
        for new in (18, 1):
            steps.step(new, layout=lambda x: laid_out(x, "bnhd"))


@pytest.mark.parametrize("kind", ["contiguous", "sliding"])
def test_a_call_serves_the_steps_after_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph replays: a step changes tensors alone, and nk is but the most that their lengths may say."""
    options = {"capacity": 64} if kind == "contiguous" else {}
    caches = [make_cache(kind, 2, 1, (20, 12), torch.float32, **options) for _ in range(2)]
    calls: list[Any] = []
    run = ops.attention_with_cache
    monkeypatch.setattr(ops, "attention_with_cache", lambda *call: calls.append(call) or run(*call))
    for new in (17, 1):
        q, k, v = torch.randn(2, 3, new, 20), torch.randn(2, 1, new, 20), torch.randn(2, 1, new, 12)
        for cache in caches:
            attention_with_cache(q, k, v, cache, rope=Rope(20), backend="triton")
    tensors, slots, problem, backend = calls[-2]
    for _ in range(3):
        step = [torch.randn_like(x) for x in tensors[:3]]
        for x, new in zip(tensors[:3], step, strict=True):
            x.copy_(new)
        tensors.key_lens.add_(1)
        out, _ = run(tensors, slots, problem._replace(nk=64), backend)
        torch.testing.assert_close(out, attention_with_cache(*step, caches[1], rope=Rope(20), backend="triton"))


def test_splits_fill_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(1, 3, 1, 20), torch.randn(1, 1, 300, 20), torch.randn(1, 1, 300, 12)
    cache = KVCache(1, 1, 20, v_head_dim=12)
    cache.append(k, v)
    found = []
    assert splits.split_count(Problem(1, 3, 1, 1, 300, 20, 12, q.dtype, "cpu", Mask(), 1.0), 1, 16, 132) == 18
    for most in (128, 7, 1):
        monkeypatch.setattr(config, "MOST_SPLITS", most)
        found.append(attention_with_cache(q, None, None, cache, backend="triton"))
        found.append(longattn.attention(q, k, v, backend="triton"))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)


def test_what_it_refuses() -> None:
    cache = KVCache(1, 1, 8, dtype=torch.float64)
    with pytest.raises(Unsupported, match="caches of float32, bfloat16, float16 and int8, not float64"):
        attention_with_cache(*torch.randn(3, 1, 1, 1, 8), cache, backend="triton")
