"""Gradients: finite differences for every feature, and the ways in which autograd may ask for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import longattn
from helpers import backend_names, backend_params, random_packed, random_qkv, require, require_packed
from longattn import Rope
from longattn.backends import registry

F64 = torch.float64
INT32 = torch.int32


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=INT32)


# Two sequences of 4 queries and 6 keys, 2 heads over 1; every query sees a key, so that every lse has a derivative.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "causal, start": {"causal": True, "align": "start"},
    "window": {"causal": True, "window": 2},
    "two sides": {"window": (1, 2), "align": 1},
    "sinks": {"causal": True, "window": 2, "sinks": 1},
    "offsets": {"causal": True, "align": ints(0, 3)},
    "key_mask": {"key_mask": torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 0, 0]]).bool()},
    "key_lens": {"key_lens": ints(6, 4), "causal": True},
    "bounds": {"bounds": (ints(0, 0, 3, 3), ints(3, 3, 6, 6))},
    "scale": {"scale": 1.3},
    "rope": {"rope": Rope(4), "causal": True},
    "rope of a part, interleaved": {"rope": Rope(2, interleaved=True)},
    "rope with a factor": {"rope": Rope(4, scaling=longattn.scaling.YaRN(4.0, 2))},
    "rope, positions": {"rope": Rope(4), "positions": ints(9, 1, 4, 4, 0, 7)},
    "softcap": {"softcap": 0.7},
    "dropout": {"dropout_p": 0.3, "seed": 4},
    "sinks, no keys": {"sink_logits": torch.tensor([0.3, -0.2], dtype=F64), "causal": True, "align": -2},
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "sink_logits": {"sink_logits": torch.tensor([0.3, -0.2], dtype=F64)},
    "alibi_slopes": {"alibi_slopes": torch.tensor([0.5, 0.1], dtype=F64), "causal": True},
    "alibi_slopes by sequence": {"alibi_slopes": torch.tensor([[0.5, 0.1], [0.3, 0.0]], dtype=F64)},
    "bias": {"bias": torch.linspace(-1, 1, 24, dtype=F64).view(4, 6)},
    "bias of heads": {"bias": torch.linspace(-1, 1, 12, dtype=F64).view(2, 1, 6)},
    "all": {
        "sink_logits": torch.tensor([0.3, -0.2], dtype=F64),
        "alibi_slopes": torch.tensor([0.5, 0.1], dtype=F64),
        "bias": torch.linspace(-1, 1, 24, dtype=F64).view(4, 6),
        "softcap": 1.5,
        "dropout_p": 0.2,
        "seed": 7,
    },
}


@pytest.mark.parametrize("feature", [*FEATURES, *PARAMETERS])
@pytest.mark.parametrize("backend", backend_names(native=True))
def test_gradcheck(backend: str, feature: str) -> None:
    q, k, v = random_qkv(2, (2, 1), (4, 6), (4, 3), F64)
    keywords = dict(FEATURES.get(feature, PARAMETERS.get(feature, {})))
    require(backend, q, k, v, **keywords)
    differentiable = {"q": q, "k": k, "v": v}
    if feature in PARAMETERS:
        differentiable |= {name: keywords.pop(name) for name in tuple(keywords) if isinstance(keywords[name], Tensor)}
    inputs = tuple(x.clone().requires_grad_() for x in differentiable.values())

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(differentiable, tensors, strict=True))
        return longattn.attention(**named, **keywords, return_lse=True, backend=backend)

    assert gradcheck(call, inputs)


@pytest.mark.parametrize(
    "keywords", [{}, {"causal": True, "rope": Rope(4)}, {"key_lens": ints(2, 1, 1)}], ids=["plain", "rope", "key_lens"]
)
@pytest.mark.parametrize("backend", backend_names(native=True))
def test_gradcheck_varlen(backend: str, keywords: dict[str, Any]) -> None:
    q, k, v, *rest = random_packed((2, 0, 3), (3, 1, 4), widths=(4, 3), dtype=F64)
    require_packed(backend, (q, k, v), **keywords)

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return longattn.attention_varlen(*tensors, *rest, **keywords, return_lse=True, backend=backend)

    assert gradcheck(call, tuple(x.requires_grad_() for x in (q, k, v)))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv", "qv"])
@pytest.mark.parametrize("backend", backend_names(native=True))
def test_only_what_is_asked_for(backend: str, wanted: str) -> None:
    tensors = dict(zip("qkv", random_qkv(2, (4, 2), (19, 23), (16, 9)), strict=True))

    def gradients(names: str) -> dict[str, Tensor]:
        inputs = {name: x.clone().requires_grad_(name in names) for name, x in tensors.items()}
        out = longattn.attention(**inputs, causal=True, backend=backend)
        found = torch.autograd.grad(out.square().sum(), [inputs[name] for name in names])
        return dict(zip(names, found, strict=True))

    everything = gradients("qkv")
    for name, grad in gradients(wanted).items():
        assert torch.equal(grad, everything[name])


@pytest.mark.parametrize("backend", backend_names(native=True))
def test_gradient_of_one_output_only(backend: str) -> None:
    """dout absent is dout zero, and so is dlse."""
    q, k, v = (x.requires_grad_() for x in random_qkv(2, (4, 2), (19, 23), (16, 9)))
    out, lse = longattn.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    for present in ("out", "lse"):
        outputs, grads = ((out,), (dout,)) if present == "out" else ((lse,), (dlse,))
        alone = torch.autograd.grad(outputs, (q, k, v), grads, retain_graph=True, materialize_grads=True)
        zeros = (dout, torch.zeros_like(dlse)) if present == "out" else (torch.zeros_like(dout), dlse)
        together = torch.autograd.grad((out, lse), (q, k, v), zeros, retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(alone, together, strict=True))
        assert present == "out" or not alone[2].any()  # lse does not read v


@pytest.mark.parametrize("backend", backend_names())
def test_backward_twice_gives_the_same_bits(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(2, (4, 2), (70, 90), 16))
    out = longattn.attention(q, k, v, causal=True, backend=backend)
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    second = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", backend_names())
def test_sum_backward(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(2, (4, 2), (19, 23), (16, 9), F64))
    longattn.attention(q, k, v, backend=backend).sum().backward()
    weights = torch.softmax(q.detach() @ k.detach().repeat_interleave(2, 1).mT / 4, -1)
    dv = weights.sum(2).unflatten(1, (2, 2)).sum(2)[..., None].expand_as(v)
    torch.testing.assert_close(v.grad, dv, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", backend_names())
def test_one_tensor_as_query_key_and_value(backend: str) -> None:
    """Its three gradients add up."""
    x = torch.randn(2, 2, 9, 8, dtype=F64)
    parts = [x.clone().requires_grad_() for _ in range(3)]
    longattn.attention(*parts, causal=True, backend=backend).square().sum().backward()
    x.requires_grad_()
    longattn.attention(x, x, x, causal=True, backend=backend).square().sum().backward()
    torch.testing.assert_close(x.grad, sum(part.grad for part in parts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", backend_names())
def test_gradients_reach_a_leaf_of_stride_zero(backend: str) -> None:
    """Keys and values of one head, expanded to all."""
    q, k, v = random_qkv(2, (4, 1), (19, 23), 8, F64)
    grads = []
    for expand in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        inputs = [leaves[0], *(x.expand(-1, 4, -1, -1) for x in leaves[1:])] if expand else leaves
        grads.append(torch.autograd.grad(longattn.attention(*inputs, backend=backend).square().sum(), leaves))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", backend_names())
def test_an_input_changed_in_place_is_noticed(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, (1, 1), (3, 3), 4))
    k = k * 1.0
    out = longattn.attention(q, k, v, backend=backend)
    k.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", backend_names())
def test_no_graph_without_need(backend: str) -> None:
    q, k, v = random_qkv(1, (1, 1), (3, 3), 4)
    assert longattn.attention(q, k, v, backend=backend).grad_fn is None
    q.requires_grad_()
    assert longattn.attention(q, k, v, backend=backend).grad_fn is not None
    with torch.no_grad():
        assert longattn.attention(q, k, v, backend=backend).grad_fn is None
    with torch.inference_mode():
        assert longattn.attention(q, k, v, backend=backend).is_inference()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", backend_names())
def test_checkpointing_recomputes_the_same(backend: str, reentrant: bool) -> None:
    """Dropout too: its seed is drawn from torch's generator, whose state checkpointing keeps."""
    from torch.utils.checkpoint import checkpoint

    tensors = random_qkv(2, (4, 2), (19, 23), (16, 9))

    def gradients(wrapped: bool) -> tuple[Tensor, ...]:
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        torch.manual_seed(7)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return longattn.attention(q, k, v, causal=True, rope=Rope(16), dropout_p=0.3, backend=backend)

        out = checkpoint(call, q, k, v, use_reentrant=reentrant) if wrapped else call(q, k, v)
        torch.rand(3)  # moves the generator on
        out.square().sum().backward()
        return q.grad, k.grad, v.grad

    assert all(torch.equal(x, y) for x, y in zip(gradients(False), gradients(True), strict=True))


@pytest.mark.parametrize("backend, dtype", backend_params((torch.float64, torch.bfloat16)))
def test_deterministic_is_bitwise(backend: str, dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    """Over repeats and numbers of threads, with every feature whose sums threads share."""
    tensors = random_qkv(2, (4, 2), (150, 170), (24, 17), dtype)
    parameters = {"bias": torch.randn(1, 4, 1, 170), "alibi_slopes": torch.rand(4), "sink_logits": torch.randn(4)}
    keywords: dict[str, Any] = {"causal": True, "rope": Rope(24), "softcap": 2.0, "dropout_p": 0.2, "seed": 3}

    def results(threads: int) -> tuple[Tensor, ...]:
        set_threads(threads)
        leaves = [x.clone().requires_grad_() for x in (*tensors, *parameters.values())]
        named = dict(zip(("q", "k", "v", *parameters), leaves, strict=True))
        out, lse = longattn.attention(**named, **keywords, deterministic=True, return_lse=True, backend=backend)
        return out, lse, *torch.autograd.grad((out.square().sum() + lse.sum()), leaves)

    expected = results(1)
    for threads in (1, 2, 3):
        assert all(torch.equal(x, y) for x, y in zip(results(threads), expected, strict=True))


@pytest.mark.skipif(registry.get("cpu").unavailable() is not None, reason="the C++ kernels are missing")
def test_sums_to_one_number_are_deterministic(set_threads: Callable[[int], None]) -> None:
    """Of one head: a sum that PyTorch splits by the number of threads."""
    tensors = random_qkv(1, (1, 1), (40000, 40000), 4, F64)
    slopes, sink = torch.rand(1, dtype=F64, requires_grad=True), torch.randn(1, dtype=F64, requires_grad=True)
    found = []
    for threads in (1, 2, 3):
        set_threads(threads)
        out = longattn.attention(
            *tensors, causal=True, window=4, alibi_slopes=slopes, sink_logits=sink, deterministic=True, backend="cpu"
        )
        found.append(torch.autograd.grad(out.square().sum(), (slopes, sink)))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))


@pytest.mark.parametrize("backend", backend_names())
def test_gradients_of_lse_stop_at_rows_that_see_nothing(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, (2, 2), (6, 6), 8))
    out, lse = longattn.attention(q, k, v, causal=True, align=-3, return_lse=True, backend=backend)
    dlse = torch.full_like(lse, 2.0)
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), dlse))
    assert not dq[:, :, :3].any()
    assert dq[:, :, 3:].isfinite().all() and dk.isfinite().all() and dv.isfinite().all()


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e30])
@pytest.mark.parametrize("queries", [3, 70])
@pytest.mark.parametrize("backend", [name for name in ("cpu", "reference") if name in registry._BY_NAME])
def test_a_row_hidden_by_a_finite_bias(backend: str, queries: int, low: float) -> None:
    """Its weights are 1 / n, and so are those of the gradients, though lse has no digits left for n."""
    q, k, v = random_qkv(2, (4, 2), (queries, 140), 16)
    bias = torch.zeros(2, 1, queries, 140)
    bias[:, :, 1] = low
    require(backend, q, k, v, bias=bias)
    dout = torch.randn(2, 4, queries, 16)

    def gradients(dtype: torch.dtype, attend: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, bias)]
        out = attend(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout.to(dtype))]

    def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return torch.softmax(q @ k.mT / 4.0 + bias, -1) @ v

    got = gradients(torch.float32, lambda *x: longattn.attention(*x[:3], bias=x[3], backend=backend))
    for name, found, exact in zip(("out", "q", "k", "v", "bias"), got, gradients(F64, dense), strict=True):
        assert (found - exact).abs().max() < 1e-5, name
