"""Second derivatives: finite differences for every feature, the oracle for narrow dtypes, and what they cost."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import longattn
import oracle
from helpers import backend_names, backend_params, one_thread, random_packed, random_qkv, require, require_packed
from longattn import Rope, Unsupported, arguments
from longattn.backends import eager
from longattn.backends.base import Gradients
from test_gradients import F64, FEATURES, PARAMETERS, ints
from test_ops import DEFAULTS
from tolerances import accumulation_unit, assert_within_budget, rounding_unit


def check_gradgrad(call: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    """Random projections of the finite differences, with respect to the inputs and to what comes in backward."""
    assert gradgradcheck(call, tuple(x.detach().clone().requires_grad_() for x in inputs), fast_mode=True)


def split(keywords: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(differentiable, all other) keywords."""
    parameters = {name: x for name, x in keywords.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return parameters, {name: x for name, x in keywords.items() if name not in parameters}


def check_call(backend: str, tensors: tuple[Tensor, ...], keywords: dict[str, Any], lse: bool = True) -> None:
    require(backend, *tensors, **keywords)
    parameters, rest = split(keywords)
    names = ("q", "k", "v", *parameters)

    def call(*inputs: Tensor) -> Any:
        return longattn.attention(**dict(zip(names, inputs, strict=True)), **rest, return_lse=lse, backend=backend)

    check_gradgrad(call, (*tensors, *parameters.values()))


@pytest.mark.parametrize("feature", [*FEATURES, *PARAMETERS])
@pytest.mark.parametrize("backend", backend_names())
def test_features(backend: str, feature: str) -> None:
    keywords = FEATURES.get(feature, PARAMETERS.get(feature, {}))
    check_call(backend, random_qkv(2, (2, 1), (4, 6), (4, 3), F64), keywords)


@pytest.mark.parametrize(
    "keywords", [{}, {"sink_logits": torch.tensor([0.3, -0.2], dtype=F64)}, {"softcap": 0.7}], ids=str
)
@pytest.mark.parametrize("backend", backend_names())
def test_rows_that_see_nothing(backend: str, keywords: dict[str, Any]) -> None:
    """Their output is 0 and stays so; their lse has a derivative only where a sink gives it a value."""
    bias = torch.zeros(4, 6, dtype=F64)
    bias[1], bias[:, 4] = -torch.inf, -torch.inf
    tensors = random_qkv(2, (2, 1), (4, 6), (4, 3), F64)
    mask = {"causal": True, "align": -2, "window": 2, "key_mask": torch.ones(2, 6).bool(), "key_lens": ints(6, 0)}
    check_call(backend, tensors, mask | keywords, lse="sink_logits" in keywords)
    check_call(backend, tensors, {"bias": bias.bool()} | keywords, lse="sink_logits" in keywords)

    leaves = [x.clone().requires_grad_() for x in tensors]
    out, lse = longattn.attention(*leaves, bias=bias, return_lse=True, backend=backend, **keywords)
    douts = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), leaves, douts, create_graph=True)
    for x in torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves):
        assert x.isfinite().all()


def random_keywords(batch: int, heads: int, nq: int, nk: int, width: int) -> dict[str, Any]:
    """A call with some of everything; every query sees the first key."""
    pick = random.Random(torch.randint(2**31, ()).item())
    some: list[dict[str, Any]] = [
        {"causal": True, "align": pick.choice(("start", 0, 2))},
        {"window": pick.choice(((2, 1), (1, 3))), "align": pick.choice((0, 1)), "sinks": 1},
        {"causal": True, "window": 2, "sinks": 2, "align": ints(*[b % 3 for b in range(batch)])},
        {},
    ]
    keywords = pick.choice(some)
    optional = {
        "key_mask": {"key_mask": torch.rand(batch, nk) < 0.7},
        "key_lens": {"key_lens": torch.randint(1, nk + 1, (batch,))},
        "bounds": {"bounds": (torch.zeros(batch, nq).int(), torch.randint(1, nk + 1, (batch, nq)))},
        "bias": {"bias": torch.randn([pick.choice((1, n)) for n in (batch, heads, nq, nk)], dtype=F64)},
        "alibi": {"alibi_slopes": torch.rand(pick.choice(((heads,), (batch, heads))), dtype=F64)},
        "sink_logits": {"sink_logits": torch.randn(heads, dtype=F64)},
        "softcap": {"softcap": 1.1},
        "scale": {"scale": 0.9},
        "dropout": {"dropout_p": 0.2, "seed": pick.randrange(99)},
        "rope": {"rope": Rope(pick.choice((2, width)), interleaved=pick.random() < 0.5)},
    }
    for chosen in pick.sample(sorted(optional), 4):
        keywords = keywords | optional[chosen]
    if "key_mask" in keywords:
        keywords["key_mask"][:, 0] = True
    return keywords


@pytest.mark.parametrize("draw", range(12))
@pytest.mark.parametrize("backend", backend_names())
def test_mixed_at_random(backend: str, draw: int) -> None:
    torch.manual_seed(draw)
    nq, nk = (int(n) for n in torch.randint(3, 7, (2,)))
    keywords = random_keywords(2, 4, nq, nk, 4)
    check_call(backend, random_qkv(2, (4, 2), (nq, nk), (4, 3), F64), keywords)


@pytest.mark.parametrize(
    "keywords",
    [
        {"causal": True, "rope": Rope(4), "alibi_slopes": torch.rand(3, 2, dtype=F64), "align": ints(0, 1, 2)},
        {"key_lens": ints(2, 1, 1), "sink_logits": torch.tensor([0.1, 0.2], dtype=F64), "softcap": 0.9},
        {"window": (1, 1), "sinks": 1, "align": "start", "dropout_p": 0.3, "seed": 5},
    ],
    ids=["rope, slopes, offsets", "key_lens, sinks, softcap", "window, dropout"],
)
@pytest.mark.parametrize("backend", backend_names())
def test_varlen(backend: str, keywords: dict[str, Any]) -> None:
    q, k, v, *rest = random_packed((2, 0, 3), (3, 1, 4), widths=(4, 3), dtype=F64)
    require_packed(backend, (q, k, v), **keywords)
    parameters, others = split(keywords)

    def call(q: Tensor, k: Tensor, v: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(parameters, values, strict=True))
        return longattn.attention_varlen(q, k, v, *rest, **others, **named, return_lse=True, backend=backend)

    check_gradgrad(call, (q, k, v, *parameters.values()))


@pytest.mark.parametrize("draw", range(2))
@pytest.mark.parametrize("backend, dtype", backend_params())
def test_narrow_dtypes(backend: str, dtype: torch.dtype, draw: int) -> None:
    """Sums are in float32 (float64), and each result is rounded once."""
    torch.manual_seed(draw)
    nq, nk = 19, 23
    tensors = random_qkv(2, (4, 2), (nq, nk), (16, 9), dtype)
    keywords = random_keywords(2, 4, nq, nk, 16)
    require(backend, *tensors, **keywords)
    parameters, rest = split(keywords)
    inputs = dict(zip("qkv", tensors, strict=True)) | {name: x.to(dtype) for name, x in parameters.items()}
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out, lse = longattn.attention(**leaves, **rest, return_lse=True, backend=backend)
    leaves |= {"dout": torch.randn_like(out).requires_grad_(), "dlse": torch.randn_like(lse).requires_grad_()}
    differentiable = [leaves[name] for name in inputs]
    grads = torch.autograd.grad((out, lse), differentiable, (leaves["dout"], leaves["dlse"]), create_graph=True)
    tangents = {name: torch.randn_like(x) for name, x in inputs.items()}
    found = torch.autograd.grad(grads, tuple(leaves.values()), tuple(tangents.values()))

    call = (inputs, leaves["dout"], leaves["dlse"], tangents)
    with one_thread():
        exact = oracle.second_derivatives(*call, **rest)
        narrow = torch.promote_types(dtype, torch.float32)
        eager_results = oracle.second_derivatives(*call, dtype=narrow, **rest)
    size = max(float(x.abs().max()) for x in exact.values())  # of terms before they cancel
    for got, name in zip(found, leaves, strict=True):
        assert got.dtype == leaves[name].dtype and got.shape == leaves[name].shape
        terms = rounding_unit(got.dtype) * exact[name].abs() + 8 * accumulation_unit(dtype) * size
        assert_within_budget(got, exact[name], eager_results[name], terms, name)


@pytest.mark.parametrize("backend", backend_names())
def test_only_what_is_asked_for(backend: str) -> None:
    tensors = random_qkv(2, (4, 2), (9, 11), (8, 5), F64)

    def second(first: str, then: str) -> list[Tensor]:
        leaves = {name: x.clone().requires_grad_(name in first + then) for name, x in zip("qkv", tensors, strict=True)}
        out = longattn.attention(*leaves.values(), causal=True, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), [leaves[name] for name in first], create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        return list(torch.autograd.grad(penalty, [leaves[name] for name in then]))

    for first in ("q", "kv"):
        everything = dict(zip("qkv", second(first, "qkv"), strict=True))
        for then in ("q", "v", "qk"):
            for name, got in zip(then, second(first, then), strict=True):
                assert torch.equal(got, everything[name])


@pytest.mark.parametrize("backend", backend_names())
def test_a_third_derivative_is_refused(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, (1, 1), (3, 3), 4))
    out = longattn.attention(q, k, v, backend=backend)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    (ddq,) = torch.autograd.grad(dq.square().sum(), q, create_graph=True)
    with pytest.raises(Unsupported, match="third derivative"):
        ddq.sum().backward()


@pytest.mark.parametrize("backend", backend_names())
def test_autocast_does_not_reach_into_it(backend: str) -> None:
    tensors = [x.bfloat16().float().requires_grad_() for x in random_qkv(2, (4, 2), (19, 23), 16)]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            out = longattn.attention(*tensors, causal=True, backend=backend)
        (dq,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(dq.square().sum(), tensors))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


def run_eager(n: int, **keywords: Any) -> None:
    """The double backward alone, on n queries and keys."""
    tensors, problem = arguments.dense(*random_qkv(1, (2, 1), (n, n), 8), **(DEFAULTS | keywords))
    tangents = Gradients(*(torch.ones_like(x) for x in tensors[:3]))
    grads = Gradients(*(torch.empty_like(x) for x in tensors[:3]))
    dout, dlse = torch.ones_like(tensors.q), torch.ones(1, 2, n)
    ddout, ddlse = torch.empty_like(dout), torch.empty_like(dlse)
    eager.double_backward(problem, tensors, dout, dlse, tangents, grads, ddout, ddlse, torch.float32)


@pytest.mark.parametrize("keywords", [{"causal": True}, {"dropout_p": 0.1, "seed": 1}], ids=["causal", "dropout"])
def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch, keywords: dict[str, Any]) -> None:
    """No tensor has more entries than a tile and a few rows of the inputs, whatever the length."""
    monkeypatch.setattr(eager, "_TILE_BYTES", 1 << 14)
    for n in (128, 512):
        with Largest() as largest:
            run_eager(n, **keywords)
        assert largest.numel <= 2 * max(1 << 12, 2 * n) + 2 * n * 8


def test_time_follows_the_window() -> None:
    flops = {}
    for n in (512, 1024, 2048):
        with FlopCounterMode(display=False) as counter:
            run_eager(n, causal=True, window=32, sinks=4)
        flops[n] = counter.get_total_flops()
    assert flops[2048] - flops[1024] == 2 * (flops[1024] - flops[512])
    products = 13  # of rows by keys by width, in one tile
    assert flops[2048] <= products * 2 * 2 * 2048 * (128 + 32 + 4) * 8


@pytest.mark.parametrize(
    "keywords", [{"causal": True}, {"window": (5, 3), "sinks": 2, "dropout_p": 0.2, "seed": 1}], ids=str
)
def test_tiles_make_no_difference(monkeypatch: pytest.MonkeyPatch, keywords: dict[str, Any]) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(2, (4, 2), (37, 41), 8, F64))
    bias = torch.randn(4, 37, 41, dtype=F64, requires_grad=True)

    def second() -> tuple[Tensor, ...]:
        out = longattn.attention(q, k, v, bias=bias, rope=Rope(8), **keywords)
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        return torch.autograd.grad(dq.square().sum(), (q, k, v, bias))

    whole = second()
    monkeypatch.setattr(eager, "_TILE_BYTES", 8 * 2 * 4 * 41 * 5)  # 5 rows at a time
    for got, expected in zip(second(), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
