"""attention_with_cache against the oracle, over caches of every kind."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import longattn
from cache_model import KINDS, SINKS, WINDOW, Model, Stream, make_cache
from helpers import DTYPES, backend_names, backend_params, laid_out, poisoned_memory
from longattn import InvalidInput, KVCache, PagedKVCache, Rope, SlidingKVCache, attention_with_cache
from longattn.backends import registry
from longattn.scaling import DynamicNTK, LongRoPE, YaRN


def stream(kind: str, backend: str, dtype: torch.dtype, storage: torch.dtype | None = None, **keywords: Any) -> Stream:
    """Two sequences of grouped heads, with widths that fill no vector."""
    options: dict[str, Any] = {"positions": "cache"} if keywords.pop("cache_positions", False) else {}
    spare = keywords.pop("spare", 0)
    options |= {"spare": spare} if kind == "sliding" else {}
    cache = make_cache(kind, 2, 2, (20, 12), storage or dtype, **options)
    window = {"window": WINDOW, "sinks": SINKS} if kind == "sliding" else {}
    return Stream(cache, Model(2, **window, frame="positions" in options), 6, dtype, backend, **keywords)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "dtype"), backend_params(native=True))
def test_steps_are_parts_of_one_attention(kind: str, backend: str, dtype: torch.dtype) -> None:
    for rope in (Rope(12), Rope(20, interleaved=True, scaling=YaRN(4.0, 64))):
        steps = stream(kind, backend, dtype, rope=rope)
        for new in (1, 13, 1, 30, 3):
            steps.step(new)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", backend_names())
def test_score_features(kind: str, backend: str) -> None:
    features: dict[str, Any] = {
        "softcap": 5.0,
        "scale": -0.4,
        "sink_logits": torch.randn(6),
        "alibi_slopes": torch.rand(2, 6),
    }
    steps = stream(kind, backend, torch.float32, rope=Rope(20))
    for name, value in features.items():
        steps.keywords[name] = value
        for new in (7, 1):
            keywords = dict(steps.keywords)
            if name == "alibi_slopes":  # the model looks at one sequence at a time
                steps.keywords[name] = value[0].clone()
            steps.step(new)
            steps.keywords = keywords
    q = torch.randn(2, 6, 1, 20)
    k, v = torch.randn(2, 2, 1, 20), torch.randn(2, 2, 1, 12)
    both, alone = (make_cache(kind, 2, 2, (20, 12), torch.float32) for _ in range(2))
    out = attention_with_cache(q, k, v, both, backend=backend, alibi_slopes=features["alibi_slopes"])
    one = attention_with_cache(
        q[1:], k[1:], v[1:], alone, backend=backend, alibi_slopes=features["alibi_slopes"][1:], sequences=[1]
    )
    assert torch.equal(out[1:], one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", backend_names(native=True))
def test_unequal_lengths_and_chosen_sequences(kind: str, backend: str) -> None:
    steps = stream(kind, backend, torch.float32, rope=Rope(20), spare=random.choice((0, 4)))
    for _ in range(8):
        sequences = random.choice((None, [0], [1], [1, 0]))
        new = random.choice((1, 1, 4, 17))
        lengths = [random.randint(0, new) for _ in sequences or (0, 1)] if random.random() < 0.7 else None
        steps.step(new, lengths, sequences)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", DTYPES)
def test_storage_of_another_dtype(kind: str, storage: torch.dtype) -> None:
    for backend, dtype in (
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        ("cpu", torch.float64),
        ("reference", torch.float32),
    ):
        if longattn.backends.registry.get(backend).unavailable():
            continue
        steps = stream(kind, backend, dtype, storage, rope=Rope(20))
        for new in (11, 1, 4):
            steps.step(new)


@pytest.mark.parametrize("backend", backend_names(native=True))
@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_off_by_half_a_scale(kind: str, backend: str) -> None:
    cache = make_cache(kind, 1, 2, (20, 12), torch.int8)
    rope = Rope(20)
    k, v, q = torch.randn(1, 2, 40, 20), torch.randn(1, 2, 40, 12), torch.randn(1, 6, 40, 20)
    k[0, 1, 35], v[0, 0, 36] = 0.0, 1e-30
    for at in (slice(0, 30), slice(30, 39)):
        attention_with_cache(q[:, :, at], k[:, :, at], v[:, :, at], cache, rope=rope, backend=backend)
    last = slice(39, 40)
    out = attention_with_cache(q[:, :, last], k[:, :, last], v[:, :, last], cache, rope=rope, backend=backend)
    positions, stored_k, stored_v = cache.read(0)
    for exact, stored in ((longattn.apply_rope(k, rope)[0, :, positions], stored_k), (v[0, :, positions], stored_v)):
        scale = exact.abs().amax(-1, keepdim=True) / 127
        assert ((stored - exact).abs() <= 0.5 * scale * 1.001).all()
    turned = longattn.apply_rope(q[:, :, last], rope, torch.tensor([39]))
    expected = longattn.attention(turned, stored_k[None], stored_v[None], backend="reference")
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("backend", backend_names())
def test_int8_shows_what_is_not_finite(backend: str) -> None:
    cache = KVCache(1, 2, 4, dtype=torch.int8)
    k = torch.ones(1, 2, 2, 4)
    k[0, 0, 1, 2], k[0, 1, 1, 2] = torch.inf, torch.nan
    cache.append(k, torch.ones(1, 2, 2, 4), backend=backend)
    _, stored, _ = cache.read(0)
    assert stored[:, 0].isfinite().all() and stored[:, 1].isnan().all()


@pytest.mark.parametrize("backend", backend_names(native=True))
@pytest.mark.parametrize("spare", [0, 6])
def test_positions_in_the_cache(backend: str, spare: int) -> None:
    for rope in (Rope(20), Rope(12, interleaved=True, scaling=YaRN(4.0, 64))):
        steps = stream("sliding", backend, torch.float32, rope=rope, cache_positions=True, spare=spare)
        for new in (1, 1, 7, 1, 25, 1, 5, 1):
            steps.step(new)
        steps.step(5, [2, 5])
        steps.step(1, [0, 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", backend_names())
@pytest.mark.parametrize(
    "scaling", [DynamicNTK(2.0, 16), LongRoPE(4.0, 16, [1.0 + i for i in range(10)], [2.0 + i for i in range(10)])]
)
def test_frequencies_that_change_with_the_length(kind: str, backend: str, scaling: Any) -> None:
    steps = stream(kind, backend, torch.float32, rope=Rope(20, scaling=scaling))
    for new, lengths in ((5, None), (8, [8, 2]), (9, None), (1, None), (2, [0, 2])):
        steps.step(new, lengths)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", backend_names(native=True))
def test_draft_trees(kind: str, backend: str) -> None:
    steps = stream(kind, backend, torch.float32, rope=Rope(20), spare=12 if random.random() < 0.5 else 0)
    steps.step(14)
    for parents in ([-1, -1, 0, 0, 1, 2, 2, 5], [-1], [-1, 0, 1, 2], [-1, -1, -1]):
        before = steps.cache.lengths
        steps.step(len(parents), None, None, parents)
        for row in range(2):  # back to where it was
            if kind == "sliding" and len(parents) > steps.cache.spare:
                continue
            steps.cache.truncate(row, before[row])
            del steps.model.tokens[row][before[row] :]
    steps.step(4, [4, 2], None, [-1, 0, 0, 1])
    stream(kind, backend, torch.float32).step(3, None, None, [-1, -1, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_an_accepted_branch_is_as_if_it_had_come_alone(kind: str) -> None:
    branched, alone = (
        make_cache(kind, 1, 2, (20, 12), torch.float32, **({"spare": 8} if kind == "sliding" else {})) for _ in range(2)
    )
    q, k, v = torch.randn(1, 6, 30, 20), torch.randn(1, 2, 30, 20), torch.randn(1, 2, 30, 12)
    rope, first, branch = Rope(20), slice(0, 20), [1, 3, 4]
    for cache in (branched, alone):
        attention_with_cache(q[:, :, first], k[:, :, first], v[:, :, first], cache, rope=rope)
    drafts, line = slice(20, 26), [21, 23, 24]
    tree = attention_with_cache(
        q[:, :, drafts], k[:, :, drafts], v[:, :, drafts], branched, rope=rope, tree=torch.tensor([-1, -1, 0, 1, 3, 3])
    )
    plain = attention_with_cache(q[:, :, line], k[:, :, line], v[:, :, line], alone, rope=rope)
    torch.testing.assert_close(tree[:, :, branch], plain, atol=1e-6, rtol=1e-6)
    branched.accept(0, 20, branch)
    assert branched.lengths == alone.lengths
    for got, expected in zip(branched.read(0), alone.read(0), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", backend_names())
def test_queries_alone(kind: str, backend: str) -> None:
    cache = make_cache(kind, 2, 2, (20, 12), torch.float32)
    k, v, q = torch.randn(2, 2, 8, 20), torch.randn(2, 2, 8, 12), torch.randn(2, 6, 3, 20)
    cache.append(k, v, lengths=[8, 5])
    for causal in (False, True):
        out = attention_with_cache(q, None, None, cache, causal=causal, backend=backend)
        lens = torch.tensor([8, 5], dtype=torch.int32)
        expected = longattn.attention(q, k, v, causal=causal, key_lens=lens, backend="reference")
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    assert cache.lengths == (8, 5)
    empty = make_cache(kind, 2, 2, (20, 12), torch.float32)
    out, lse = attention_with_cache(q, None, None, empty, return_lse=True, backend=backend)
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", backend_names())
def test_positions_of_the_new_tokens(backend: str) -> None:
    q, k, v = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    rope, positions = Rope(8), torch.tensor([3, 4, 5, 11, 12, 13])
    cache = KVCache(1, 2, 8)
    for at in (slice(0, 3), slice(3, 6)):
        out = attention_with_cache(
            q[:, :, at], k[:, :, at], v[:, :, at], cache, rope=rope, positions=positions[at], backend=backend
        )
    expected = longattn.attention(q, k, v, causal=True, rope=rope, positions=positions, backend="reference")
    torch.testing.assert_close(out, expected[:, :, 3:], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layout", ["bnhd", "gaps", "bhdn"])
def test_layouts_and_unwritten_memory(layout: str) -> None:
    with poisoned_memory():
        for kind in KINDS:
            steps = stream(kind, "auto", torch.float32, rope=Rope(20))
            for new in (5, 1, 22):
                steps.step(new, layout=lambda x: laid_out(x, layout))


def test_many_keys_few_queries() -> None:
    """Decoding splits over keys: long sequences, pages and rings of sizes that no block of keys divides."""
    q, k, v = torch.randn(1, 4, 3, 16), torch.randn(1, 1, 3000, 16), torch.randn(1, 1, 3000, 16)
    caches = (
        (KVCache(1, 1, 16), None),
        (PagedKVCache(1, 1, 16, num_pages=200, page_size=17), None),
        (SlidingKVCache(1, 1, 16, window=1100, sinks=5, spare=3), 1100),
    )
    for cache, window in caches:
        cache.append(k[:, :, :2997], v[:, :, :2997], rope=Rope(16))
        out = attention_with_cache(q, k[:, :, 2997:], v[:, :, 2997:], cache, rope=Rope(16))
        expected = longattn.attention(
            q, k, v, causal=True, rope=Rope(16), window=window, sinks=cache.sinks, backend="reference"
        )
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def test_results_do_not_depend_on_threads(set_threads: Any) -> None:
    results: list[Tensor] = []
    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 2000, 16), torch.randn(1, 2, 2000, 16)
    for threads in (1, 2):
        set_threads(threads)
        cache = PagedKVCache(1, 2, 16, num_pages=200, page_size=16)
        cache.append(k, v, rope=Rope(16))
        results.append(attention_with_cache(q, None, None, cache, rope=Rope(16)))
    assert torch.equal(*results)


def test_autocast_takes_its_dtype() -> None:
    cache = KVCache(1, 2, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_with_cache(*(torch.randn(1, 2, 3, 8) for _ in range(3)), cache)
    assert out.dtype == torch.bfloat16


def bad_calls() -> list[Any]:
    x, cache = torch.randn(2, 2, 3, 8), KVCache(2, 2, 8)
    sliding = SlidingKVCache(2, 2, 8, window=4, sinks=1, positions="cache")
    wide = torch.randn(2, 2, 3, 9)
    return [
        pytest.param((x, x, x, "cache"), {}, "cache", id="no cache"),
        pytest.param((x, x, None, cache), {}, "v", id="k alone"),
        pytest.param((wide, wide, wide, cache), {}, "q", id="another head_dim"),
        pytest.param((x, x[:, :1], x[:, :1], cache), {}, "k", id="other heads"),
        pytest.param((x[:, :1], x, x, cache), {}, "q", id="heads that are no multiple"),
        pytest.param((x[:1], x[:1], x[:1], cache), {}, "q", id="too few sequences"),
        pytest.param((x, x.double(), x, cache), {}, "k", id="mixed dtypes"),
        pytest.param((x.to("meta"), x, x, cache), {}, "q", id="another device"),
        pytest.param((x, x.clone().requires_grad_(), x, cache), {}, "k", id="requires grad"),
        pytest.param(
            (x, x, x, cache), {"sink_logits": torch.zeros(2, requires_grad=True)}, "sink_logits", id="parameter"
        ),
        pytest.param((x, x, x, cache), {"lengths": [4, 0]}, "lengths", id="lengths past the tokens"),
        pytest.param((x, x, x, cache), {"lengths": [1]}, "lengths", id="too few lengths"),
        pytest.param((x, x, x, cache), {"sequences": [0, 0]}, "sequences", id="a sequence twice"),
        pytest.param((x, x, x, cache), {"sequences": [0, 2]}, "sequences", id="no such sequence"),
        pytest.param((x, x, x, cache), {"tree": [-1, 1, 0]}, "tree", id="a parent that comes later"),
        pytest.param((x, x, x, cache), {"tree": [-1, 0]}, "tree", id="a short tree"),
        pytest.param((x, x, x, cache), {"tree": [-1, 0, 0], "alibi_slopes": torch.ones(2)}, "alibi_slopes", id="alibi"),
        pytest.param((x, x, x, cache), {"positions": torch.arange(3)}, "positions", id="positions without rope"),
        pytest.param((x, x, x, cache), {"rope": Rope(10)}, "rope", id="a wide rope"),
        pytest.param((x, x, x, cache), {"rope": 8}, "rope", id="no rope"),
        pytest.param((x, x, x, cache), {"alibi_slopes": 0.5}, "alibi_slopes", id="a number for slopes"),
        pytest.param((x, x, x, cache), {"lengths": 3}, "lengths", id="a number for lengths"),
        pytest.param((x, x, x, cache), {"sequences": 0}, "sequences", id="a number for sequences"),
        pytest.param((x, x, x, cache), {"window": 0}, "window", id="an empty window"),
        pytest.param((x, x, x, cache), {"backend": "none"}, "backend", id="no such backend"),
        pytest.param((x, x, x, sliding), {"window": 5}, "window", id="more than the ring holds"),
        pytest.param((x, x, x, sliding), {"sinks": 2}, "sinks", id="more sinks than the ring holds"),
        pytest.param((x, x, x, sliding), {"rope": Rope(8), "tree": [-1, 0, 0]}, "tree", id="a tree of places"),
    ]


@pytest.mark.parametrize(("arguments", "keywords", "name"), bad_calls())
def test_bad_calls_name_their_argument(arguments: tuple[Any, ...], keywords: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidInput) as error:
        attention_with_cache(*arguments, **keywords)
    assert error.value.argument == name
    if not isinstance(arguments[3], str):
        assert arguments[3].lengths == (0, 0)


def test_one_rope_for_all_keys() -> None:
    x, cache = torch.randn(1, 2, 3, 8), KVCache(1, 2, 8)
    attention_with_cache(x, x, x, cache, rope=Rope(8))
    with pytest.raises(InvalidInput, match="rope"):
        attention_with_cache(x, x, x, cache, rope=Rope(8, base=500.0))
    attention_with_cache(x, x, x, cache, rope=Rope(8))
    cache.reset()
    attention_with_cache(x, x, x, cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "window"), [((8, 2), None), ((2, 2), None), ((8, 2), 300)])
def test_a_prompt_in_chunks_is_bitwise_the_prompt(
    dtype: torch.dtype, heads: tuple[int, int], window: int | None
) -> None:
    if missing := registry.get("cpu").unavailable():
        pytest.skip(missing)
    tokens = 1100
    q, k, v = (torch.randn(1, count, tokens, 48).to(dtype) for count in (heads[0], heads[1], heads[1]))

    def in_chunks(size: int, cache: KVCache | PagedKVCache) -> Tensor:
        call: dict[str, Any] = {"rope": Rope(48), "backend": "cpu"} | ({} if window is None else {"window": window})
        chunks = zip(q.split(size, 2), k.split(size, 2), v.split(size, 2), strict=True)
        return torch.cat([attention_with_cache(*chunk, cache, **call) for chunk in chunks], 2)

    at_once = in_chunks(tokens, KVCache(1, heads[1], 48, dtype=dtype, device="cpu"))
    for size in (256, 512):
        cache = PagedKVCache(1, heads[1], 48, dtype=dtype, device="cpu", num_pages=40, page_size=32)
        assert torch.equal(in_chunks(size, cache), at_once)
