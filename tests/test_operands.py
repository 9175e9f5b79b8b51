"""Operands that reach an operator without the checks of `longattn.arguments`, and numbers at the ends of types."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import longattn
from helpers import backend_names, random_qkv
from longattn import InvalidInput, Rope, Unsupported, ops
from longattn.cache import call as cache_call
from longattn.scaling import DynamicNTK

pytestmark = pytest.mark.native

Call = tuple[Any, tuple[Any, ...]]


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "longattn":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded(backend: str) -> list[Call]:
    """Calls of every operator, with every operand."""
    q, k, v = (x.requires_grad_() for x in random_qkv(2, (4, 2), (5, 7), (8, 6)))
    rope, starts = Rope(8), torch.tensor([0, 4, 9], dtype=torch.int32)
    bounds = torch.zeros(5).int(), torch.full((5,), 7).int()
    features: list[dict[str, Any]] = [
        {"key_mask": torch.ones(2, 7).bool(), "bounds": bounds},
        {"rope": rope, "positions": (torch.arange(5), torch.arange(7))},
        {"bias": torch.randn(1, 4, 5, 7), "alibi_slopes": torch.rand(4), "sink_logits": torch.rand(4)},
        {"key_lens": torch.tensor([3, 7]), "align": torch.tensor([0, 2]), "dropout_p": 0.2, "seed": 3},
    ]
    with Recorder() as recorder:
        for keywords in features:
            out = longattn.attention(q, k, v, backend=backend, **keywords)
            grads = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
            torch.autograd.grad(grads[0].square().sum(), (q, k, v))
        packed = torch.randn(9, 2, 8)
        longattn.attention_varlen(packed, packed, packed, starts, starts, 5, 5, backend=backend)
        longattn.apply_rope(q, rope, torch.arange(5), backend=backend)
        new = [x[:, :, :3].detach() for x in (q, k, v)]
        for cache in (
            longattn.KVCache(2, 2, 8, v_head_dim=6),
            longattn.PagedKVCache(2, 2, 8, v_head_dim=6, num_pages=8, page_size=4, dtype=torch.int8),
            longattn.SlidingKVCache(2, 2, 8, v_head_dim=6, window=6, sinks=2, positions="cache"),
        ):
            cache.append(*new[1:], rope=rope, backend=backend)
            longattn.attention_with_cache(*new, cache, rope=rope, backend=backend)
        tree = [-1, 0, 0]
        longattn.attention_with_cache(*new, longattn.KVCache(2, 2, 8, v_head_dim=6), tree=tree, backend=backend)
    return recorder.calls


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def another(x: Any, rng: random.Random) -> Any:
    """Something else in place of an argument."""
    if isinstance(x, Tensor):
        at = rng.randrange(max(1, x.dim()))
        changes: list[Callable[[Tensor], Tensor | None]] = [
            lambda x: None,
            lambda x: torch.cat([x, x], at) if x.dim() else x[None],
            lambda x: x.narrow(at, 0, x.shape[at] - 1) if x.dim() and x.shape[at] else x[None],
            lambda x: x.to(torch.float64 if x.dtype != torch.float64 else torch.int32),
            lambda x: x[None],
            lambda x: x.flatten(),
            freed,
        ]
        return rng.choice(changes)(x)
    if isinstance(x, bool):
        return not x
    if isinstance(x, int):
        return rng.choice([-(2**62), -1, 3, 2**31, 2**62])
    if isinstance(x, float):
        return rng.choice([-1.0, 1e39, float("nan"), float("inf")])
    if isinstance(x, str):
        return rng.choice(["cuda", "nobody", ""])
    return list(x)[:-1] if isinstance(x, (list, tuple)) else torch.zeros(rng.choice([(1,), (5,), (2, 9)]))


@pytest.mark.parametrize("backend", backend_names(native=True))
def test_direct_calls_with_other_operands(backend: str) -> None:
    """Each is refused or computed; none reads what is not there."""
    if backend not in ("cpu", "reference"):
        pytest.skip("one compiled and one eager backend tell it all")
    calls, rng = recorded(backend), random.Random(0)
    assert {func for func, _ in calls} >= {
        torch.ops.longattn.attention.default,
        torch.ops.longattn.attention_backward.default,
        torch.ops.longattn.attention_double_backward.default,
        torch.ops.longattn.rope.default,
        torch.ops.longattn.cache_append.default,
        torch.ops.longattn.attention_with_cache.default,
    }
    refused = 0
    for _ in range(600):
        func, given = rng.choice(calls)
        args = [x.detach().clone() if isinstance(x, Tensor) else x for x in given]
        at = rng.randrange(len(args))
        args[at] = another(args[at], rng)
        try:
            func(*args)
        except (InvalidInput, Unsupported, RuntimeError):
            refused += 1
    assert refused > 200


def test_a_direct_call_names_the_operand() -> None:
    (func, args), *_ = recorded("cpu")
    names = [argument.name for argument in func._schema.arguments]
    for name, value in (("k", torch.zeros(2, 3, 7, 8)), ("key_mask", torch.ones(2, 6).bool()), ("hi", None)):
        with pytest.raises(InvalidInput, match="^(v|lo|key_mask): "):
            func(*(value if at == names.index(name) else x for at, x in enumerate(args)))


FREED: dict[str, Any] = {
    "key_mask": torch.zeros(2, 7).bool(),
    "key_lens": torch.zeros(2).int(),
    "bias": torch.zeros(1, 4, 5, 7),
    "alibi_slopes": torch.zeros(4),
    "sink_logits": torch.zeros(4),
    "align": torch.zeros(2).long(),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", [*FREED, "q", "k", "v", "half of v", "v across"])
def test_tensors_whose_storage_was_freed(name: str, backend: str) -> None:
    q, k, v = random_qkv(2, (4, 2), (5, 7), 8)
    tensors, keywords = {"q": q, "k": k, "v": v}, {}
    if name in FREED:
        keywords[name] = freed(FREED[name])
    elif name == "half of v":
        pair = torch.randn(2, *v.shape)
        tensors["v"] = pair[1]
        pair.untyped_storage().resize_(0)
    elif name == "v across":
        across = v.mT.contiguous()
        tensors["v"] = across.mT
        across.untyped_storage().resize_(0)
    else:
        tensors[name] = freed(tensors[name])
    with pytest.raises(InvalidInput, match="whose storage was freed"):
        longattn.attention(**tensors, **keywords, backend=backend)


def test_storage_freed_before_the_backward() -> None:
    q, k, v = random_qkv(2, (4, 2), (5, 7), 8)
    mask = torch.ones(2, 7).bool()
    out = longattn.attention(q.requires_grad_(), k, v, key_mask=mask)
    mask.untyped_storage().resize_(0)
    with pytest.raises(InvalidInput, match="^key_mask: .*freed"):
        torch.autograd.grad(out.sum(), q)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["align", "key_lens"])
def test_places_past_32_bits(name: str, compiled: bool, backend: str) -> None:
    """They are refused as an int is, in graphs, too; a bound as large means what the largest one means."""
    q, k, v = random_qkv(2, (2, 2), (4, 4), 8)
    attend: Any = torch.compile(longattn.attention, backend="eager") if compiled else longattn.attention
    for value in (2**31, 2**40, -(2**31)):
        with pytest.raises(InvalidInput, match=f"^{name}: "):
            attend(q, k, v, causal=True, backend=backend, **{name: torch.tensor([3, value])})
    if not compiled:
        with pytest.raises(InvalidInput, match=f"^{name}: "):
            longattn.attention_stats(q, k, **{name: torch.tensor([3, 2**31])})
    far = torch.full((4,), 2**40)
    assert torch.equal(longattn.attention(q, k, v, bounds=(-far, far)), longattn.attention(q, k, v))


@pytest.mark.parametrize(
    "name, value",
    [
        ("scale", 1e39),
        ("scale", -3e38),
        ("scale", 2**2000),
        ("softcap", 1e39),
        ("softcap", 1e-39),
        ("softcap", 2**2000),
        ("sinks", 2**70),
        ("align", 2**70),
    ],
)
def test_numbers_that_overflow(name: str, value: float) -> None:
    q, k, v = random_qkv(1, (1, 1), (4, 4), 8)
    with pytest.raises(InvalidInput, match=f"^{name}: "):
        longattn.attention(q, k, v, **{name: value})
    if name in ("scale", "softcap"):
        with pytest.raises(InvalidInput, match=f"^{name}: "):
            longattn.attention_with_cache(q, k, v, longattn.KVCache(1, 1, 8), **{name: value})


def test_the_largest_scales() -> None:
    q, k, v = (x.abs() for x in random_qkv(1, (1, 1), (4, 4), 8))
    for dtype, scale in ((torch.float32, 1.7e38), (torch.float64, 1e300)):
        call = [x.to(dtype) for x in (q, k, v)]
        best = (call[0] @ call[1].mT).argmax(-1)[0, 0]
        assert torch.equal(longattn.attention(*call, scale=scale)[0, 0], call[2][0, 0, best])


@pytest.mark.parametrize("position", [float("nan"), float("inf"), 3e38])
def test_positions_that_no_length_holds(position: float) -> None:
    q, k, v = random_qkv(1, (1, 1), (4, 4), 8)
    rope, positions = Rope(8, scaling=DynamicNTK(2.0, 16)), torch.full((4,), position)
    for turn in (
        lambda: longattn.attention(q, k, v, rope=rope, positions=positions),
        lambda: longattn.apply_rope(q, rope, positions),
        lambda: rope.rotate(q, positions),
    ):
        with pytest.raises(InvalidInput, match="^positions: "):
            turn()


@pytest.mark.parametrize("dim", [2**70, 10**400])
def test_a_width_that_no_head_has(dim: int) -> None:
    with pytest.raises(InvalidInput, match="^dim: "):
        Rope(dim)


@pytest.mark.parametrize("tree", [[[-1, 0, 0, 1]] * 3, [[-1, 0, 0, 1], 3], [[-1, 0, 0, 1], [-1, 0]]])
@pytest.mark.parametrize("batch", [1, 2])
def test_trees_of_another_number_of_sequences(batch: int, tree: Any) -> None:
    q, k, v = random_qkv(batch, (2, 2), (4, 4), 8)
    with pytest.raises(InvalidInput, match="^tree: "):
        longattn.attention_with_cache(q, k, v, longattn.KVCache(batch, 2, 8), tree=tree)


@pytest.mark.parametrize("shape", [(1, 2**40, 0, 8), (2**40, 1, 0, 8), (2**20, 2**20, 0, 8)])
def test_nothing_to_do_for_many_heads(shape: tuple[int, ...]) -> None:
    """Loops go over what there is to compute."""
    x = torch.empty(shape)
    assert longattn.attention(x, x, x).shape == shape
    assert longattn.apply_rope(x, Rope(8)).shape == shape


def test_a_cache_serves_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_qkv(1, (2, 2), (3, 3), 8)
    cache = longattn.KVCache(1, 2, 8)
    inside, leave = threading.Event(), threading.Event()

    attend, original = longattn.attention_with_cache, ops.attention_with_cache

    class Waiting:
        def __getattr__(self, name: str) -> Any:
            return getattr(ops, name)

        @staticmethod
        def attention_with_cache(*call: Any) -> tuple[Tensor, Tensor]:
            inside.set()
            assert leave.wait(60)
            return original(*call)

    monkeypatch.setattr(cache_call, "ops", Waiting())
    thread = threading.Thread(target=attend, args=(q, k, v, cache))
    thread.start()
    assert inside.wait(60)
    for call in (lambda: attend(q, k, v, cache), lambda: cache.append(k, v), lambda: cache.truncate(0, 0), cache.reset):
        with pytest.raises(InvalidInput, match="^cache: expected one call at a time"):
            call()
    leave.set()
    thread.join()
    assert cache.lengths == (3,)
    cache.append(k, v)
    assert cache.lengths == (6,)
