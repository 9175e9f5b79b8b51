"""The operators: their schemas, fakes and autograd as torch.library wants them, and the ways PyTorch may call them."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import longattn
from helpers import backend_names, laid_out, memory_order, random_packed, random_qkv, require
from longattn import InvalidInput, Rope, arguments, ops
from longattn.backends import registry
from longattn.backends.base import Gradients
from longattn.backends.reference import ReferenceBackend
from longattn.problem import Problem, Tensors

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(longattn.attention).parameters.items()
    if parameter.default is not inspect.Parameter.empty and name not in ("return_lse", "backend")
}


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window, sinks": {"causal": True, "window": 3, "sinks": 1, "align": "start"},
    "key_lens, offsets": {"key_lens": ints(7, 4), "align": ints(0, 2)},
    "key_mask, bounds": {"key_mask": torch.ones(2, 7).bool(), "bounds": (ints(0, 0, 0, 1, 1), ints(3, 4, 5, 6, 7))},
    "rope": {"rope": Rope(8), "causal": True},
    "rope, positions": {"rope": Rope(4, interleaved=True), "positions": (torch.arange(5), torch.arange(7))},
    "parameters": {"alibi_slopes": torch.rand(4), "sink_logits": torch.rand(4), "bias": torch.rand(5, 7)},
    "softcap, dropout": {"softcap": 2.0, "dropout_p": 0.2, "seed": 3},
}


def flat(tensors: Tensors, problem: Problem, backend: str) -> tuple[Any, ...]:
    """The arguments of the operator longattn::attention."""
    return (*tensors, *ops._scalars(problem, backend))


def sample(call: str, backend: str, requires_grad: bool = False) -> tuple[Any, ...]:
    q, k, v = (x.requires_grad_(requires_grad) for x in random_qkv(2, (4, 2), (5, 7), (8, 6)))
    require(backend, q, k, v, **CALLS[call])
    keywords = dict(DEFAULTS | CALLS[call])
    for name in ("alibi_slopes", "sink_logits", "bias"):
        if keywords[name] is not None:
            keywords[name] = keywords[name].clone().requires_grad_(requires_grad)
    return flat(*arguments.dense(q, k, v, **keywords), backend)


def packed_sample(backend: str) -> tuple[Any, ...]:
    q, k, v, *rest = random_packed((3, 2), (4, 3), (4, 2), (8, 6))
    tensors = (x.requires_grad_() for x in (q, k, v))
    return flat(*arguments.packed(*tensors, *rest, **(DEFAULTS | {"causal": True})), backend)


@pytest.mark.parametrize("call", CALLS)
def test_opcheck_attention(call: str) -> None:
    torch.library.opcheck(torch.ops.longattn.attention.default, sample(call, "reference", requires_grad=True))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("backend", backend_names())
def test_opcheck_attention_of_backend(backend: str, requires_grad: bool) -> None:
    torch.library.opcheck(torch.ops.longattn.attention.default, sample("rope", backend, requires_grad))


@pytest.mark.parametrize("backend", backend_names())
def test_opcheck_packed(backend: str) -> None:
    torch.library.opcheck(torch.ops.longattn.attention.default, packed_sample(backend))


@pytest.mark.parametrize(
    "call, wanted", [(call, "all") for call in CALLS] + [("causal", x) for x in ("q", "kv", "none")]
)
def test_opcheck_attention_backward(call: str, wanted: str) -> None:
    args = sample(call, "reference")
    out, lse = torch.ops.longattn.attention.default(*args)
    dlse = None if call == "plain" else torch.randn_like(lse)
    parameters = [CALLS[call].get(name) is not None for name in ("bias", "alibi_slopes", "sink_logits")]
    flags = {
        "all": [True] * 3 + parameters,
        "q": [True] + [False] * 5,
        "kv": [False, True, True] + [False] * 3,
        "none": [False] * 6,
    }[wanted]
    torch.library.opcheck(
        torch.ops.longattn.attention_backward.default, (*args, out, lse, torch.randn_like(out), dlse, flags)
    )


@pytest.mark.parametrize("call", ["window, sinks", "key_mask, bounds", "parameters", "softcap, dropout"])
def test_opcheck_attention_double_backward(call: str) -> None:
    args = sample(call, "cpu")
    parameters = [CALLS[call].get(name) is not None for name in ("bias", "alibi_slopes", "sink_logits")]
    out, lse = torch.ops.longattn.attention.default(*args)
    tensors = dict(zip(Tensors._fields, args, strict=False))
    given = dict(zip(Gradients._fields, (True, False, True, *parameters), strict=True))
    tangents = [torch.randn_like(tensors[name]) if flag else None for name, flag in given.items()]
    flags = [True, False, True, *parameters, True, True]
    torch.library.opcheck(
        torch.ops.longattn.attention_double_backward.default,
        (*args, torch.randn_like(out), torch.randn_like(lse), *tangents, flags),
    )


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("backend", backend_names())
def test_opcheck_rope(backend: str, inverse: bool, requires_grad: bool) -> None:
    x = torch.randn(2, 3, 5, 8, requires_grad=requires_grad)
    inv_freq, factor = Rope(6).frequencies(5)
    torch.library.opcheck(
        torch.ops.longattn.rope.default, (x, inv_freq, torch.arange(5.0), factor, False, inverse, backend)
    )


def test_arity_is_fixed() -> None:
    """A result that is not asked for is an empty tensor, so that graphs never depend on the flags."""
    args = sample("plain", "reference")
    out, lse = torch.ops.longattn.attention.default(*args)
    grads = torch.ops.longattn.attention_backward.default(*args, out, lse, out, None, [True] + [False] * 5)
    assert [grad.numel() > 0 for grad in grads] == [True] + [False] * 5
    schema = torch.ops.longattn.attention.default._schema
    assert [str(result.type) for result in schema.returns] == ["Tensor", "Tensor"]
    assert not schema.is_mutable


def test_an_operator_refuses_an_unknown_backend() -> None:
    args = list(sample("plain", "reference"))
    args[args.index("reference")] = "tpu"
    with pytest.raises(longattn.InvalidInput, match="backend"):
        torch.ops.longattn.attention.default(*args)


class Subclass(Tensor):
    pass


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_where_an_operator_is_its_kernel() -> None:
    """The dispatcher is left out exactly where nothing but the kernel waits there."""
    x = torch.randn(2, 3)
    leaf = x.clone().requires_grad_()
    found: list[bool] = []

    def look(x: Tensor) -> Tensor:
        found.append(ops._is_kernel(x, None, 3))
        return x

    for guard in (nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)):
        with guard():
            look(x)
    with torch.no_grad():
        look(leaf)
        look(torch.nn.Parameter(x))
    assert all(found)
    found.clear()
    for guard in (Watching, FakeTensorMode, torch.profiler.profile, forward_ad.dual_level, lambda: torch.device("cpu")):
        with guard():
            look(x)
    for other in (leaf, torch._neg_view(x), x.as_subclass(Subclass), FakeTensorMode().from_tensor(x)):
        look(other)
    torch.func.vmap(look)(x)
    torch.func.grad(lambda x: look(x).sum())(x)
    make_fx(look)(x)
    assert not any(found) and len(found) == 12


def test_lengths_on_a_gpu_are_read_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _, cu_k, nq, nk = random_packed((3, 5), (3, 5))
    wrong = ints(0, 7, 2)
    tensors, problem = arguments.packed(q, k, v, wrong, cu_k, nq, nk, **DEFAULTS)
    monkeypatch.setattr(ReferenceBackend, "forward", lambda self, *arguments: None)
    elsewhere = problem._replace(device="cuda")
    ops.attention(tensors, elsewhere, "reference")
    monkeypatch.setenv("LONGATTN_CHECK", "1")
    with pytest.raises(InvalidInput, match="cu_seqlens_q"):
        ops.attention(tensors, elsewhere, "reference")


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "nbhd", "gaps"])
def test_fakes_have_the_layout_of_what_is_real(layout: str) -> None:
    tensors = [laid_out(x, layout) for x in random_qkv(2, (4, 2), (5, 7), (8, 6))]
    real = longattn.attention(*tensors, return_lse=True)
    with FakeTensorMode() as mode:
        fake = longattn.attention(*(mode.from_tensor(x) for x in tensors), return_lse=True)
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
        assert memory_order(x) == memory_order(y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", backend_names(native=True))
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    """As PyTorch's own attention: inputs take autocast's dtype, whatever theirs, and gradients go back in theirs."""
    tensors = [x.requires_grad_() for x in random_qkv(2, (4, 2), (19, 23), 16)]
    q, k, v = tensors
    narrow = [x.to(dtype) for x in tensors]
    expected = longattn.attention(*narrow, causal=True, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        out = longattn.attention(q, k.to(dtype), v, causal=True, backend=backend)
    assert out.dtype == dtype and torch.equal(out, expected)
    dout = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, tensors, dout), torch.autograd.grad(expected, tensors, dout), strict=True
    ):
        assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize("backend", backend_names())
def test_autocast_leaves_float64(backend: str) -> None:
    tensors = random_qkv(1, (1, 1), (3, 3), 8, torch.float64)
    require(backend, *tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert longattn.attention(*tensors, backend=backend).dtype == torch.float64


@pytest.mark.parametrize("backend", backend_names())
def test_autocast_packed(backend: str) -> None:
    q, k, v, *rest = random_packed((3, 5), (3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = longattn.attention_varlen(q, k, v, *rest, backend=backend)
    expected = longattn.attention_varlen(*(x.bfloat16() for x in (q, k, v)), *rest, backend=backend)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", backend_names())
def test_lazily_negated_tensors_are_read_right(backend: str) -> None:
    """Views that PyTorch negates on reading: an address alone does not tell."""
    q, k, v = random_qkv(1, (2, 2), (5, 7), 8)
    lazy = [torch._neg_view(x) for x in (q, k, v)]
    assert all(x.is_neg() for x in lazy)
    assert torch.equal(longattn.attention(*lazy, backend=backend), longattn.attention(-q, -k, -v, backend=backend))
    turned = longattn.apply_rope(torch._neg_view(q), Rope(8), backend=backend)
    assert torch.equal(turned, longattn.apply_rope(-q, Rope(8), backend=backend))


@pytest.mark.parametrize("backend", backend_names())
def test_a_subclass_of_parameter_kind(backend: str) -> None:
    q, k, v = (torch.nn.Parameter(x) for x in random_qkv(1, (2, 2), (5, 7), 8))
    longattn.attention(q, k, v, backend=backend).sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (q, k, v))


def test_what_is_registered() -> None:
    """One operator per public computation, and no other."""
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("longattn::")}
    attention = {"attention", "attention_backward", "attention_double_backward", "attention_jvp"}
    cache = {"attention_with_cache", "cache_append", "take_pages"}
    assert defined == {f"longattn::{name}" for name in (*attention, *cache, "rope")}
    assert {backend.name for backend in registry.BACKENDS} >= {"reference", "cpu"}
