"""The operators on caches: schemas and fakes as torch.library wants them, and what torch.compile makes of a step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from helpers import backend_names
from longattn import CacheFull, KVCache, PagedKVCache, Rope, SlidingKVCache, attention_with_cache, ops
from longattn.cache import Cache
from longattn.scaling import DynamicNTK

CACHES: dict[str, Any] = {
    "contiguous": lambda: KVCache(2, 2, 8),
    "paged, int8": lambda: PagedKVCache(2, 2, 8, num_pages=8, page_size=3, dtype=torch.int8),
    "ring": lambda: SlidingKVCache(2, 2, 8, window=4, sinks=1, spare=4, positions="cache"),
}


def arguments_of(name: str, call: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What a call hands to the operator of this name."""
    taken: list[tuple[Any, ...]] = []
    original = getattr(torch.ops.longattn, name)

    class Recorder:
        @staticmethod
        def default(*args: Any) -> Any:
            taken.append(args)
            return original.default(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.longattn, name, Recorder, raising=False)
        patch.setattr(ops, "_is_kernel", lambda *arguments: False)
        call()
    return taken[0]


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("backend", backend_names())
def test_opcheck(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache: Cache = CACHES[kind]()
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    rope = Rope(8, scaling=DynamicNTK(2.0, 4)) if kind == "contiguous" else Rope(8)
    calls = {
        "cache_append": lambda: cache.append(k, k, rope=rope, lengths=[3, 2], backend=backend),
        "attention_with_cache": lambda: attention_with_cache(q, k, k, cache, rope=rope, backend=backend),
    }
    for name, call in calls.items():
        args = arguments_of(name, call, monkeypatch)
        torch.library.opcheck(getattr(torch.ops.longattn, name).default, args)


def test_a_compiled_step_is_the_step() -> None:
    """The graph breaks at a cache, whose lengths are Python's; the rest of the step compiles."""
    torch._dynamo.reset()
    weight = torch.randn(16, 16)

    def step(x: torch.Tensor, cache: Cache) -> torch.Tensor:
        q, k, v = (torch.tanh(x @ weight).unflatten(-1, (2, 8)).transpose(1, 2) * scale for scale in (1, 2, 3))
        out = attention_with_cache(q, k, v, cache, rope=Rope(8))
        assert isinstance(out, torch.Tensor)
        return torch.tanh(out.transpose(1, 2).flatten(-2) @ weight)

    compiled = torch.compile(step, backend="eager", dynamic=False)
    caches = [KVCache(1, 2, 8, capacity=16) for _ in range(2)]
    with torch.no_grad():
        for count in (5, 1, 1):
            x = torch.randn(1, count, 16)
            assert torch.equal(compiled(x, caches[0]), step(x, caches[1]))
    assert caches[0].lengths == caches[1].lengths == (7,)


GRAPHS: dict[str, Any] = {
    "contiguous": (lambda: KVCache(2, 2, 8, capacity=128), {}),
    "ring": (lambda: SlidingKVCache(2, 2, 8, window=4, sinks=1), {"window": 4, "sinks": 1}),
    "paged": (lambda: PagedKVCache(2, 2, 8, num_pages=40, page_size=2), {}),
}


@pytest.mark.parametrize("kind, dynamic", [*((kind, None) for kind in GRAPHS), ("contiguous", True), ("paged", True)])
def test_few_graphs(kind: str, dynamic: bool | None) -> None:
    """However many pages a cache fills, a step is one of few graphs, and computes what it computes without them."""
    new, keywords = GRAPHS[kind]
    keywords = keywords | {"causal": True, "rope": Rope(2)}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(
        lambda q, k, v, cache: attention_with_cache(q, k, v, cache, **keywords),
        backend="aot_eager",
        dynamic=dynamic,
        fullgraph=True,
    )
    compiled, eager = new(), new()
    for count in (5,) + (1,) * 8:
        q, k, v = (torch.randn(2, eager.kv_heads, count, eager.head_dim) for _ in range(3))
        expected = attention_with_cache(q, k, v, eager, **keywords)
        torch.testing.assert_close(step(q, k, v, compiled), expected)
    assert compiled.lengths == eager.lengths
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    if isinstance(eager, PagedKVCache):
        assert (compiled._pages, compiled._free) == (eager._pages, eager._free)
    torch._dynamo.reset()


def test_pages_in_a_graph() -> None:
    """Forked pages are copied before they are written, a full pool is refused, a copied cache has its own pages."""
    torch._dynamo.reset()
    step = torch.compile(attention_with_cache, backend="aot_eager", fullgraph=True, dynamic=True)
    caches = [PagedKVCache(2, 1, 4, num_pages=6, page_size=2) for _ in range(2)]
    for cache, call in zip(caches, (attention_with_cache, step), strict=True):
        torch.manual_seed(0)
        x = torch.randn(1, 1, 3, 4)
        call(x, x, x, cache, sequences=[0])
        cache.fork(0, 1)
        x = torch.randn(2, 1, 2, 4)
        call(x, x, x, cache)
        assert cache.free_pages == 1
        other = copy.deepcopy(cache)
        x = torch.randn(1, 1, 1, 4)
        call(x, x, x, other, sequences=[1])
        call(x, x, x, other, sequences=[1])
        assert (other.free_pages, cache.free_pages) == (0, 1)
        with pytest.raises(CacheFull):
            x = torch.randn(1, 1, 9, 4)
            call(x, x, x, cache, sequences=[0])
        assert (cache.lengths, cache.free_pages) == ((5, 5), 1)
    for sequence in range(2):
        for ours, theirs in zip(caches[0].read(sequence), caches[1].read(sequence), strict=True):
            assert torch.equal(ours, theirs)
    torch._dynamo.reset()
