"""torch.compile takes every public call in one graph, forward and backward, and computes what eager computes."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import longattn
from helpers import backend_names, random_packed, random_qkv, require, require_packed
from longattn import Rope


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(call: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(call, fullgraph=True, backend="aot_eager", **options)


def check(call: Callable[..., Any], other: Callable[..., Any], tensors: tuple[Tensor, ...]) -> None:
    """Both give the same bits, forward and backward."""
    found = []
    for function in (call, other):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, lse = function(*leaves)
        grads = torch.autograd.grad(out.square().sum() + lse.exp().sum(), leaves)
        found.append((out, lse, *grads))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


CALLS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3, "sinks": 1},
    "tensors": {
        "key_mask": torch.arange(23) < torch.tensor([[23], [9]]),
        "key_lens": torch.tensor([23, 11], dtype=torch.int32),
        "align": torch.tensor([4, 0], dtype=torch.int32),
        "bounds": (torch.zeros(19, dtype=torch.int32), torch.full((19,), 20, dtype=torch.int32)),
    },
    "rope": {"causal": True, "rope": Rope(8, scaling=longattn.scaling.YaRN(4.0, 16))},
    "rope, positions": {"rope": Rope(8), "positions": torch.arange(23), "key_lens": torch.tensor([23, 9])},
    "scores": {"softcap": 2.0, "alibi_slopes": torch.rand(4), "sink_logits": torch.rand(4), "bias": torch.rand(19, 23)},
    "dropout": {"dropout_p": 0.3, "seed": 5},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", backend_names())
def test_attention(backend: str, call: str) -> None:
    tensors = random_qkv(2, (4, 2), (19, 23), 8)
    require(backend, *tensors, **CALLS[call])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return longattn.attention(q, k, v, **CALLS[call], return_lse=True, backend=backend)

    check(attend, compiled(attend), tensors)


@pytest.mark.parametrize("rope", [None, Rope(8)], ids=["plain", "rope"])
@pytest.mark.parametrize("backend", backend_names())
def test_varlen(backend: str, rope: Rope | None) -> None:
    q, k, v, cu_q, cu_k, max_q, max_k = random_packed((5, 0, 12), (7, 3, 12), widths=(8, 6))
    require_packed(backend, (q, k, v), rope=rope)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return longattn.attention_varlen(
            q, k, v, cu_q, cu_k, max_q, max_k, causal=True, rope=rope, return_lse=True, backend=backend
        )

    check(attend, compiled(attend), (q, k, v))


def test_bad_sequences_are_refused_in_a_graph() -> None:
    q, k, v, cu_q, cu_k, max_q, max_k = random_packed((5, 12), (7, 12))
    attend = compiled(longattn.attention_varlen)
    with pytest.raises(longattn.InvalidInput, match="cu_seqlens_q"):
        attend(q, k, v, cu_q.flip(0), cu_k, max_q, max_k)


def lengths(batch: int, nk: int) -> Tensor:
    return torch.randint(1, nk + 1, (batch,), dtype=torch.int32)


DYNAMIC: dict[str, Callable[[int, int, int], dict[str, Any]]] = {
    "window, rope": lambda batch, nq, nk: {"causal": True, "window": 9, "sinks": 2, "rope": Rope(8)},
    "key_lens, positions": lambda batch, nq, nk: {
        "key_lens": lengths(batch, nk),
        "rope": Rope(8),
        "positions": (torch.arange(nq), torch.rand(batch, nk)),
    },
    "bounds, bias": lambda batch, nq, nk: {
        "bounds": (torch.zeros(batch, nq).int(), lengths(nq, nk).expand(batch, nq)),
        "bias": torch.randn(nq, nk),
        "key_mask": torch.rand(batch, nk) < 0.8,
    },
}


@pytest.mark.parametrize("call", DYNAMIC)
def test_dynamic_shapes(call: str) -> None:
    """One graph for every batch and length. Sizes that are equal in the first call would be taken for one."""
    keywords: dict[str, Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return longattn.attention(q, k, v, **keywords, return_lse=True)

    graph = compiled(lambda q, k, v, **named: longattn.attention(q, k, v, **named), dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, nq, nk in ((3, 19, 23), (5, 30, 41), (2, 7, 300)):
            keywords = DYNAMIC[call](batch, nq, nk)
            named = keywords | {"return_lse": True}
            check(attend, lambda *tensors: graph(*tensors, **named), random_qkv(batch, (4, 2), (nq, nk), 8))  # noqa: B023
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_dynamic_varlen() -> None:
    """One graph for every number of sequences and tokens, and for every greatest length."""

    def attend(*packed: Any) -> tuple[Tensor, Tensor]:
        return longattn.attention_varlen(*packed, causal=True, window=7, rope=Rope(8), return_lse=True)

    graph = compiled(attend, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths_q, lengths_k in (((5, 2, 12), (7, 3, 14)), ((9, 30), (11, 31)), ((2, 3, 4, 5), (5, 3, 4, 9))):
            q, k, v, *rest = random_packed(lengths_q, lengths_k, widths=(8, 6))
            check(
                lambda *tensors: attend(*tensors, *rest),  # noqa: B023
                lambda *tensors: graph(*tensors, *rest),  # noqa: B023
                (q, k, v),
            )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_marked_dynamic() -> None:
    """Only the length varies, and is said to: torch raises where a graph would fix it."""

    def attend(x: Tensor) -> tuple[Tensor, Tensor]:
        return longattn.attention(x, x, x, causal=True, window=9, rope=Rope(8), return_lse=True)

    graph = compiled(attend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (19, 64, 1000):
            x = torch.randn(1, 2, n, 8)
            torch._dynamo.mark_dynamic(x, 2)
            for got, expected in zip(graph(x), attend(x), strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", backend_names())
def test_strides_are_kept(backend: str) -> None:
    """[B, N, H, D] storage goes through a graph and comes out as such."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(2, (4, 4), (19, 19), 8))
    attend = compiled(lambda q, k, v: longattn.attention(q, k, v, backend=backend).transpose(1, 2).reshape(2, 19, -1))
    assert torch.equal(attend(q, k, v), longattn.attention(q, k, v, backend=backend).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("backend", backend_names())
def test_apply_rope(backend: str) -> None:
    def turn(x: Tensor) -> tuple[Tensor, Tensor]:
        turned = longattn.apply_rope(x, Rope(8), backend=backend)
        return turned, turned.sum(-1)

    check(turn, compiled(turn, dynamic=True), (torch.randn(2, 3, 5, 8),))


def test_merge_attention() -> None:
    outs, lses = [torch.randn(2, 4, 5) for _ in range(2)], [torch.randn(2, 4) for _ in range(2)]

    def merge(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return longattn.merge_attention([a, b], [x, y])

    check(merge, compiled(merge), (*outs, *lses))


@pytest.mark.parametrize("backend", backend_names())
def test_autocast(backend: str) -> None:
    tensors = random_qkv(2, (4, 2), (19, 23), 8)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return longattn.attention(q, k, v, causal=True, backend=backend)

    out = compiled(attend)(*tensors)
    assert out.dtype == torch.bfloat16 and torch.equal(out, attend(*tensors))


def test_falling_back_to_the_reference_breaks_no_graph() -> None:
    q, k, v = random_qkv(1, (1, 1), (4, 4), 513)  # wider than any other backend takes
    assert longattn.explain(q, k, v).backend == "reference"
    assert torch.equal(compiled(longattn.attention)(q, k, v), longattn.attention(q, k, v))


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler")
def test_inductor() -> None:
    """Inside a model: what stands around the call is fused, the call itself is as it was."""
    weight = torch.randn(32, 3 * 16) / 6

    def block(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x @ weight).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return longattn.attention(q, k, v, causal=True).transpose(1, 2).flatten(2).relu()

    x = torch.randn(2, 9, 32)
    grads = []
    for function in (block, torch.compile(block, fullgraph=True)):
        leaf = weight.clone().requires_grad_()
        out = function(x, leaf)
        grads.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", ["key_padding_mask", "attn_mask", "is_causal"])
def test_multihead_of_any_length(mask: str, need_weights: bool) -> None:
    """One graph, as of torch.nn.MultiheadAttention."""
    module = longattn.nn.MultiheadAttention(16, 2, batch_first=True)

    def attend(x: Tensor, **masks: Any) -> Tensor:
        if mask == "is_causal":
            masks = {"is_causal": True}
        return module(x, x, x, need_weights=need_weights, **masks)[0]

    graph = compiled(attend, dynamic=True)
    for n in (10, 13, 21):
        x = torch.randn(2, n, 16)
        masks = {
            "key_padding_mask": torch.arange(n) >= torch.tensor([[n], [n - 2]]),
            "attn_mask": torch.ones(n, n, dtype=torch.bool).triu(1),
        }
        chosen = {mask: masks[mask]} if mask in masks else {}
        torch.testing.assert_close(graph(x, **chosen), attend(x, **chosen))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("read", [lambda longest: longest.item(), lambda longest: longest], ids=["item", "tensor"])
def test_max_seqlen_out_of_a_tensor(read: Any) -> None:
    """One graph for all of them, which refuses a wrong one when it runs."""
    flash = longattn.compat.flash_attn.flash_attn_varlen_func

    def attend(x: Tensor, cu: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        longest = read(lengths.max())
        ours = longattn.attention_varlen(x, x, x, cu, cu, longest, longest, causal=True)
        return ours, flash(x, x, x, cu, cu, longest, longest, causal=True)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        graph = compiled(attend, dynamic=True)
        for lengths in ([5, 9, 30], [17, 1, 2]):
            x, cu = torch.randn(sum(lengths), 2, 8), torch.tensor([0, *lengths]).cumsum(0).int()
            expected = longattn.attention_varlen(x, x, x, cu, cu, max(lengths), max(lengths), causal=True)
            for found in (*graph(x, cu, torch.tensor(lengths)), *attend(x, cu, torch.tensor(lengths))):
                assert torch.equal(found, expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        with pytest.raises(longattn.InvalidInput, match="max_seqlen_q"):
            graph(x, cu, torch.tensor([3, 1, 2]))


def test_refusals_are_caught_in_a_graph() -> None:
    q = torch.randn(1, 2, 8, 16)

    def attend(q: Tensor) -> tuple[Tensor, str, Tensor, Tensor]:
        try:
            longattn.attention(q, q, q, window=-5)
        except longattn.InvalidInput as error:
            argument = error.argument
        try:
            longattn.attention(q, q, q, bias=q[:, :, :, :3])
        except ValueError:
            first = q + 1
        with longattn.compat.use(fallback="torch"):
            second = torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=1.0)
        return first, argument, second, longattn.attention(q, q, q)

    for dynamic in (False, True):
        first, argument, second, third = compiled(attend, dynamic=dynamic)(q)
        assert argument == "window" and torch.equal(first, q + 1) and second.shape == q.shape
        assert torch.equal(third, longattn.attention(q, q, q))


def test_refusals_are_pickled() -> None:
    for error in (longattn.InvalidInput("q", "a tensor", 3), longattn.CacheFull("cache", "room", 4)):
        other = pickle.loads(pickle.dumps(error))
        assert (type(other), str(other), other.argument) == (type(error), str(error), error.argument)
