"""Calls on contiguous and paged caches against the cache's model, and rope, on the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import longattn
import oracle
from cache_model import Model, Stream, make_cache
from emulator.engine import LATE, RANDOM, Engine
from helpers import check_attention, check_varlen, random_packed, random_qkv
from longattn import KVCache, PagedKVCache, Rope, Unsupported
from longattn.cache import Cache
from longattn.scaling import YaRN
from tolerances import assert_within_budget

CACHES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("contiguous", {}),
    ("paged", {"page_size": 8, "num_pages": 300}),  # pieces of pages fit boxes
    ("paged", {"page_size": 48, "num_pages": 64}),  # of 16 rows
    ("paged", {"page_size": 5, "num_pages": 400}),  # rows are copied one by one
)


def stream(kind: str, options: dict[str, Any], widths: tuple[int, int], dtype: torch.dtype, **keywords: Any) -> Stream:
    cache = make_cache(kind, 2, 2, widths, dtype, **options)
    return Stream(cache, Model(2), 6, dtype, "cuda", **keywords)


@pytest.mark.parametrize("at", range(len(CACHES)))
@pytest.mark.parametrize("widths", [(64, 64), (128, 72), (256, 256)])
def test_steps_are_parts_of_one_attention(engine: Engine, at: int, widths: tuple[int, int]) -> None:
    torch.manual_seed(at)
    kind, options = CACHES[at]
    dtype = (torch.bfloat16, torch.float16)[at % 2]
    rope = (Rope(widths[0]), Rope(48, interleaved=True, scaling=YaRN(4.0, 64)))[at % 2]
    steps = stream(kind, options, widths, dtype, rope=rope)
    for seed, (new, lengths) in enumerate(((130, [130, 61]), (1, None), (7, [0, 7]), (1, None))):
        engine.configure(LATE if seed % 2 else RANDOM, 7 * at + seed, 2, processors=1 + 12 * (seed % 2))
        steps.step(new, lengths)


@pytest.mark.parametrize("at", range(len(CACHES)))
def test_score_features(engine: Engine, at: int) -> None:
    kind, options = CACHES[at]
    keywords = {"softcap": 5.0, "scale": -0.4, "sink_logits": torch.randn(6), "window": 70, "sinks": 3}
    steps = stream(kind, options, (64, 64), torch.bfloat16, **keywords)
    engine.configure(LATE, 3 + at, processors=16)
    steps.step(150, [150, 3])
    steps.step(1)
    steps.step(4, [1, 3])


@pytest.mark.parametrize(("nk", "processors", "page_size"), [(1500, 40, 16), (1030, 9, None), (300, 64, 64)])
def test_split_keys(engine: Engine, nk: int, processors: int, page_size: int | None) -> None:
    """One query each, whose keys many blocks share; slots that were never written hold NaN."""
    torch.manual_seed(0)
    engine.configure(LATE, 5, resident=3, processors=processors)
    q, k, v = random_qkv(2, (8, 2), (1, nk), 128, torch.bfloat16)
    common: dict[str, Any] = {"dtype": torch.bfloat16}
    cache: Cache
    if page_size is None:
        cache = KVCache(2, 2, 128, capacity=nk + 77, **common)
    else:
        cache = PagedKVCache(2, 2, 128, num_pages=2 * nk // page_size + 9, page_size=page_size, **common)
    for slots in (cache.slots.k, cache.slots.v) if hasattr(cache, "slots") else ():
        slots.fill_(torch.nan)
    cache.append(k[:, :, :-1], v[:, :, :-1], backend="cuda")
    out, lse = longattn.attention_with_cache(q, k[:, :, -1:], v[:, :, -1:], cache, backend="cuda", return_lse=True)
    exact = oracle.results(q, k, v, causal=True)
    terms = oracle.rounding_terms(q, k, v, dtype=q.dtype, causal=True)
    eager = oracle.results(q, k, v, dtype=q.dtype, causal=True)
    for name, x in (("out", out), ("lse", lse)):
        assert_within_budget(x, exact[name], eager[name], terms[name], name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(engine: Engine, dtype: torch.dtype, interleaved: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 17, 40).to(dtype)
    rope, positions = Rope(24, interleaved=interleaved, scaling=YaRN(4.0, 64)), torch.randint(0, 100_000, (2, 17))
    got = longattn.apply_rope(x, rope, positions, backend="cuda")
    exact = longattn.apply_rope(x.double(), rope, positions, backend="reference")
    assert (got.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_attention_with_rope(engine: Engine) -> None:
    torch.manual_seed(1)
    q, k, v = random_qkv(1, (2, 1), (70, 130), 64, torch.bfloat16)
    check_attention(q, k, v, backend="cuda", causal=True, rope=Rope(48), positions=torch.randint(0, 500, (1, 130)))
    call = random_packed((60, 9), (60, 33), (2, 1), (64, 64), torch.float16)
    check_varlen(call, backend="cuda", causal=True, rope=Rope(64, interleaved=True))


def test_what_it_refuses(engine: Engine) -> None:
    bounded = [x.requires_grad_() for x in random_qkv(1, (2, 1), (5, 5), 64, torch.bfloat16)]
    with pytest.raises(Unsupported, match="bounds with softcap"):
        bounds = (torch.zeros(5, dtype=torch.int32), torch.full((5,), 3, dtype=torch.int32))
        longattn.attention(*bounded, backend="cuda", bounds=bounds, softcap=2.0)
    q, k, v = random_qkv(1, (2, 1), (5, 5), 64, torch.bfloat16)
    for keywords in ({"alibi_slopes": torch.rand(2)}, {"dropout_p": 0.1}, {"bias": torch.randn(5, 5)}):
        with pytest.raises(Unsupported, match=next(iter(keywords)).removesuffix("_p")):
            longattn.attention(q, k, v, backend="cuda", **keywords)
    with pytest.raises(Unsupported, match="float32"):
        longattn.attention(q.float(), k.float(), v.float(), backend="cuda")
    with pytest.raises(Unsupported, match="at most 256"):
        longattn.attention(*random_qkv(1, (1, 1), (3, 3), 264, torch.float16), backend="cuda")
    with pytest.raises(Unsupported, match="int8"):
        cache = KVCache(1, 1, 64, dtype=torch.int8)
        longattn.attention_with_cache(q[:, :1], k, v, cache, backend="cuda")


def test_auto_leaves_it_alone(engine: Engine) -> None:
    q, k, v = random_qkv(1, (1, 1), (3, 3), 64, torch.bfloat16)
    assert longattn.explain(q, k, v).backend != "cuda"
