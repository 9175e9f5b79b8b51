"""torch.func over the public calls: the same numbers as a loop, for any argument mapped along any dimension."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vjp, vmap

import longattn
from helpers import backend_names, random_packed, random_qkv
from longattn import Rope
from test_double_backward import F64, ints

Call = Callable[..., Any]
SAMPLES = 3


def leaves_of(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def check_vmap(call: Call, dims: Sequence[int | None], args: Sequence[Tensor], **options: Any) -> None:
    """vmap(call) is what a loop over the samples gives."""
    got = leaves_of(vmap(call, tuple(dims), **options)(*args))
    loop = [
        leaves_of(call(*(x if dim is None else x.select(dim, at) for x, dim in zip(args, dims, strict=True))))
        for at in range(SAMPLES)
    ]
    for x, parts in zip(got, zip(*loop, strict=True), strict=True):
        torch.testing.assert_close(x, torch.stack(parts), rtol=1e-9, atol=1e-9)


def loss_of(call: Call) -> Call:
    """A number that depends on everything that the call gives."""

    def loss(*args: Tensor) -> Tensor:
        return sum(((x - 0.3) ** 2).sum() for x in leaves_of(call(*args)))

    return loss


def mapped(shape: Sequence[int], pick: random.Random, make: Call) -> tuple[Tensor, int | None]:
    """A tensor of this shape for all samples, or one with samples along a random dimension."""
    if pick.random() < 0.4:
        return make(tuple(shape)), None
    dim = pick.randrange(len(shape) + 1)
    return make((*shape[:dim], SAMPLES, *shape[dim:])), pick.choice((dim, dim - len(shape) - 1))


def random_call(pick: random.Random, backend: str) -> tuple[Call, list[int | None], list[Tensor], int]:
    """(a call, its dims, its arguments, how many of them are differentiable)."""
    batch, nq, nk = pick.choice((1, 2)), 4, 5
    normal = lambda shape: torch.randn(shape, dtype=F64)  # noqa: E731
    everything: dict[str, tuple[Tensor, int | None]] = {
        "q": mapped((batch, 4, nq, 4), pick, normal),
        "k": mapped((batch, 2, nk, 4), pick, normal),
        "v": mapped((batch, 2, nk, 3), pick, normal),
    }
    optional: dict[str, tuple[Sequence[int], Call]] = {
        "bias": ([pick.choice((1, n)) for n in (batch, 4, nq, nk)], normal),
        "alibi_slopes": (pick.choice(((4,), (batch, 4))), normal),
        "sink_logits": ((4,), normal),
        "key_mask": ((batch, nk), lambda shape: torch.rand(shape) < 0.8),
        "key_lens": ((batch,), lambda shape: torch.randint(1, nk + 1, shape)),
        "align": ((batch,), lambda shape: torch.randint(0, 3, shape)),
        "hi": (pick.choice(((nq,), (batch, nq))), lambda shape: torch.randint(1, nk + 1, shape)),
        "positions": (pick.choice(((nk,), (batch, nk))), lambda shape: torch.randint(0, 9, shape)),
    }
    chosen = sorted(pick.sample(sorted(optional), 4), key=list(optional).index)  # the differentiable ones first
    for name in chosen:
        everything[name] = mapped(optional[name][0], pick, optional[name][1])
    if all(dim is None for _, dim in everything.values()):
        everything["q"] = normal((SAMPLES, batch, 4, nq, 4)), 0
    rest: dict[str, Any] = {"window": (3, 1), "sinks": 1, "softcap": 1.3, "rope": Rope(4), "backend": backend}
    names = list(everything)

    def call(*args: Tensor) -> Any:
        keywords = dict(zip(names, args, strict=True)) | rest
        if "hi" in keywords:
            hi = keywords.pop("hi")
            keywords["bounds"] = (torch.zeros(hi.shape, dtype=torch.int32), hi)
        return longattn.attention(**keywords, return_lse=False)

    differentiable = 3 + len({"bias", "alibi_slopes", "sink_logits"} & set(chosen))
    return call, [dim for _, dim in everything.values()], [x for x, _ in everything.values()], differentiable


@pytest.mark.parametrize("draw", range(16))
def test_vmap_at_random(draw: int) -> None:
    torch.manual_seed(draw)
    pick = random.Random(draw)
    call, dims, args, differentiable = random_call(pick, "reference" if draw % 8 == 0 else "cpu")
    places = tuple(range(differentiable))
    check_vmap(call, dims, args)
    check_vmap(grad(loss_of(call), argnums=places), dims, args)

    def over_samples(*inputs: Tensor) -> Tensor:
        return loss_of(vmap(call, tuple(dims)))(*inputs)

    def one_by_one(*inputs: Tensor) -> Tensor:
        samples = range(SAMPLES)
        chosen = [
            [x if dim is None else x.select(dim, at) for x, dim in zip(inputs, dims, strict=True)] for at in samples
        ]
        return sum(loss_of(call)(*sample) for sample in chosen)

    for got, expected in zip(grad(over_samples, places)(*args), grad(one_by_one, places)(*args), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("draw", range(4))
def test_vmap_of_second_derivatives(draw: int) -> None:
    torch.manual_seed(draw)
    call, dims, args, differentiable = random_call(random.Random(draw), "cpu")
    places = tuple(range(differentiable))

    def penalty(*inputs: Tensor) -> Tensor:
        return sum(x.square().sum() for x in grad(loss_of(call), places)(*inputs))

    check_vmap(grad(penalty, places), dims, args)


@pytest.mark.parametrize("backend", backend_names())
def test_grad_of_grad_is_double_backward(backend: str) -> None:
    tensors = random_qkv(2, (4, 2), (5, 6), (4, 3), F64)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return longattn.attention(q, k, v, causal=True, rope=Rope(4), backend=backend).square().sum()

    def penalty(*inputs: Tensor) -> Tensor:
        return sum(x.square().sum() for x in grad(loss, (0, 1, 2))(*inputs))

    leaves = [x.clone().requires_grad_() for x in tensors]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    expected = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
    for got, want in zip(grad(penalty, (0, 1, 2))(*tensors), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", backend_names())
def test_per_sample_gradients_of_a_module(backend: str) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(8, 3 * 8, dtype=F64)
            self.sinks = torch.nn.Parameter(torch.randn(2, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            return longattn.attention(q, k, v, causal=True, sink_logits=self.sinks, backend=backend).flatten()

    module = Block()
    parameters = {name: x.detach() for name, x in module.named_parameters()}
    x = torch.randn(SAMPLES, 5, 8, dtype=F64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x[None],)).square().sum()

    got = vmap(grad(loss), (None, 0))(parameters, x)
    for at in range(SAMPLES):
        module.zero_grad()
        module(x[at : at + 1]).square().sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(got[name][at], parameter.grad, rtol=1e-9, atol=1e-9)


def test_jacobian() -> None:
    q, k, v = random_qkv(1, (2, 1), (3, 4), 4, F64)

    def call(q: Tensor) -> Tensor:
        return longattn.attention(q, k, v, causal=True)

    expected = torch.autograd.functional.jacobian(call, q)
    torch.testing.assert_close(jacrev(call)(q), expected, rtol=1e-12, atol=1e-12)
    _, pull = vjp(call, q)
    torch.testing.assert_close(pull(torch.ones(1, 2, 3, 4, dtype=F64))[0], expected.sum((0, 1, 2, 3)))


def test_vmap_over_vmap() -> None:
    q, k, v = random_qkv(1, (2, 1), (3, 4), 4, F64)
    q = torch.randn(2, SAMPLES, *q.shape, dtype=F64)
    got = vmap(vmap(lambda q, k: longattn.attention(q, k, v), (0, None)), (0, None))(q, k)
    expected = torch.stack([torch.stack([longattn.attention(x, k, v) for x in row]) for row in q])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", backend_names())
def test_dropout_under_vmap(backend: str) -> None:
    """A seed drops the same in every sample, seeds of samples their own; whether to draw one is for torch to say."""
    q, k, v = random_qkv(2, (2, 1), (6, 7), 4, F64)
    q = torch.randn(SAMPLES, *q.shape, dtype=F64)

    def call(q: Tensor, seed: Any = 3) -> Tensor:
        return longattn.attention(q, k, v, dropout_p=0.4, seed=seed, backend=backend)

    check_vmap(call, (0,), (q,))
    check_vmap(grad(loss_of(call)), (0,), (q,))
    check_vmap(call, (0, 0), (q, torch.arange(SAMPLES)))
    x = q[:1].expand(SAMPLES, -1, -1, -1, -1)
    same, different = (vmap(lambda q: call(q, None), randomness=how)(x) for how in ("same", "different"))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda q: call(q, None))(q)


def test_packed_sequences_under_vmap() -> None:
    q, k, v, *rest = random_packed((2, 0, 3), (3, 1, 4), widths=(4, 3), dtype=F64)
    q = torch.randn(*q.shape, SAMPLES, dtype=F64)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return longattn.attention_varlen(q, k, v, *rest, causal=True, return_lse=False)

    check_vmap(call, (-1, None, None), (q, k, v))
    check_vmap(grad(loss_of(call), (0, 1, 2)), (-1, None, None), (q, k, v))


@pytest.mark.parametrize("draw", range(4))
@pytest.mark.parametrize("backend", backend_names())
def test_apply_rope(backend: str, draw: int) -> None:
    pick = random.Random(draw)
    x, x_dim = mapped((2, 3, 5, 8), pick, lambda shape: torch.randn(shape, dtype=F64))
    places = pick.choice(((5,), (2, 5)))
    positions, positions_dim = mapped(places, pick, lambda shape: torch.randint(0, 99, shape))
    if x_dim is None and positions_dim is None:
        positions, positions_dim = positions.expand(SAMPLES, *places), 0

    def call(x: Tensor, positions: Tensor) -> Tensor:
        return longattn.apply_rope(x, Rope(6), positions, backend=backend)

    dims, args = (x_dim, positions_dim), (x, positions)
    check_vmap(call, dims, args)
    check_vmap(grad(loss_of(call)), dims, args)
    check_vmap(grad(loss_of(grad(loss_of(call)))), dims, args)


def test_batched_gradients() -> None:
    """torch.autograd.grad(is_grads_batched=True) is a vmap over the backward alone."""
    tensors = [x.requires_grad_() for x in random_qkv(2, (2, 1), (4, 5), 4, F64)]
    out = longattn.attention(*tensors, key_lens=ints(5, 3), rope=Rope(4))
    douts = torch.randn(SAMPLES, *out.shape, dtype=F64)
    together = torch.autograd.grad(out, tensors, douts, is_grads_batched=True, retain_graph=True)
    loop = [torch.autograd.grad(out, tensors, dout, retain_graph=True) for dout in douts]
    for got, parts in zip(together, zip(*loop, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(parts), rtol=1e-12, atol=1e-12)
