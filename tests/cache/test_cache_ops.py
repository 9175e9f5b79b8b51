"""The operators on caches: schemas and fakes as torch.library wants them, and what torch.compile makes of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import backend_names
from longattn import KVCache, PagedKVCache, Rope, SlidingKVCache, attention_with_cache, ops
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
