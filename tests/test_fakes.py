"""A fake of every operator: its results have the shapes, strides and dtypes of the real ones, in whatever layout the
arguments lie. torch.compile believes the fakes; a wrong stride is an assertion of inductor, or a wrong view."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import longattn
from helpers import random_packed
from longattn import Rope
from longattn.compat import flash_attn, sdpa

ROUNDS = 40


def lies(shape: tuple[int, ...], generator: random.Random, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random tensor of this shape whose dimensions lie in memory in any order, with gaps, or are expanded."""
    order = list(range(len(shape)))
    generator.shuffle(order)
    expanded = {dim for dim in order[:-1] if generator.random() < 0.15}
    step = {dim: generator.choice((1, 1, 1, 2)) for dim in order}
    stored = [1 if dim in expanded else shape[dim] * step[dim] for dim in order]
    x = torch.randn(stored).to(dtype)
    x = x[tuple(slice(None) if dim in expanded else slice(None, None, step[dim]) for dim in order)]
    return x.permute([order.index(dim) for dim in range(len(shape))]).expand(shape)


def sizes(generator: random.Random, rank: int) -> tuple[int, ...]:
    return tuple(generator.choice((1, 1, 2, 3)) for _ in range(rank))


def described(results: Any) -> list[Any]:
    """Shapes, strides (of sizes other than 1, which alone matter), dtypes and devices."""
    found = []
    for x in results:
        if x is not None:
            strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1]
            found.append((tuple(x.shape), strides, x.dtype, x.device))
    return found


def check(call: Callable[..., tuple[Tensor | None, ...]], *tensors: Tensor | None) -> None:
    """The call has results of the same description on fakes of these tensors; with gradients, where they ask for it."""
    real = described(call(*tensors))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # the frequencies of a Rope are real
        fakes = [None if x is None else mode.from_tensor(x) for x in tensors]
        fake = described(call(*fakes))
    assert real == fake, [(None if x is None else (tuple(x.shape), x.stride())) for x in tensors]


def rounds() -> Iterator[random.Random]:
    for seed in range(ROUNDS):
        torch.manual_seed(seed)
        yield random.Random(seed)


@pytest.mark.parametrize("inverse", [False, True])
def test_rope(inverse: bool) -> None:
    rope = Rope(4)
    inv_freq, factor = rope.frequencies(3)
    for generator in rounds():
        x = lies((*sizes(generator, 3), generator.choice((4, 5, 8))), generator)
        dtype = generator.choice((torch.float32, torch.bfloat16))

        def operator(x: Tensor, inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            return (torch.ops.longattn.rope.default(x, inv_freq, positions, factor, False, inverse, "cpu"),)  # noqa: B023

        def rotate(x: Tensor) -> tuple[Tensor, ...]:
            y = longattn.apply_rope(x, rope)
            return y, *torch.autograd.grad(y.float().square().sum(), x)

        check(operator, x.to(dtype), inv_freq, torch.arange(float(x.shape[2])))
        check(rotate, x.to(dtype).requires_grad_())
        check(lambda x: (longattn.apply_rope(x[0], rope), longattn.apply_rope(x[0, 0], rope)), x)


def attention_case(generator: random.Random) -> tuple[Tensor, ...]:
    batch, kv_heads, group = sizes(generator, 3)
    nq, nk = sizes(generator, 2)
    width, v_width = generator.choice((1, 4, 8)), generator.choice((1, 4, 8))
    dtype = generator.choice((torch.float32, torch.float64, torch.bfloat16))
    shapes = (batch, kv_heads * group, nq, width), (batch, kv_heads, nk, width), (batch, kv_heads, nk, v_width)
    return tuple(lies(shape, generator, dtype) for shape in shapes)


def test_attention() -> None:
    """Forward, both gradients, and the second derivatives."""
    for generator in rounds():
        q, k, v = (x.requires_grad_() for x in attention_case(generator))
        bias = lies((1, *sizes(generator, 1), q.shape[2], k.shape[2]), generator) if generator.random() < 0.4 else None
        if bias is not None and q.shape[1] % bias.shape[1]:
            bias = bias[:, :1]
        if bias is not None and bias.shape[1] not in (1, q.shape[1]):
            bias = None
        weight = lies((*q.shape[:3], v.shape[3]), generator, q.dtype)

        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, weight: Tensor) -> tuple[Tensor | None, ...]:
            out, lse = longattn.attention(q, k, v, bias=bias, causal=True, align="start", return_lse=True)
            first = torch.autograd.grad(out, (q, k, v), weight, create_graph=True)
            second = torch.autograd.grad(sum(x.float().square().sum() for x in first), (q, k, v), allow_unused=True)
            return out, lse, *first, *second

        check(attend, q, k, v, bias, weight)


def test_the_operators_themselves() -> None:
    """Gradients of bias, slopes and logits, and results for incoming gradients of any layout."""
    for generator in rounds():
        q, k, v = (longattn.arguments._unit_stride(x) for x in attention_case(generator))
        scalars = ("cpu", -1, 0, 0, 0, False, 0.5, 0.0, 1.0, False, 0.0, (0, 0, 0, 0), False, 0, 0)
        bias = lies((q.shape[0], 1, q.shape[2], k.shape[2]), generator)
        slopes, logits = lies((q.shape[1],), generator), lies((q.shape[1],), generator)
        dout = lies((*q.shape[:3], v.shape[3]), generator, q.dtype)

        def operators(
            q: Tensor, k: Tensor, v: Tensor, bias: Tensor, slopes: Tensor, logits: Tensor, dout: Tensor
        ) -> tuple[Tensor, ...]:
            call = (q, k, v, *(None,) * 7, bias, slopes, logits, *(None,) * 4, *scalars)  # noqa: B023
            out, lse = torch.ops.longattn.attention.default(*call)
            first = torch.ops.longattn.attention_backward.default(*call, out, lse, dout, lse, [True] * 6)
            some = torch.ops.longattn.attention_backward.default(
                *call, out, lse, dout, None, [True, False, True, False, True, False]
            )
            second = torch.ops.longattn.attention_double_backward.default(*call, dout, lse, *first, [True] * 8)
            return out, lse, *first, *some, *second

        check(operators, q, k, v, bias, slopes, logits, dout)


def test_packed() -> None:
    for generator in rounds():
        lengths = [generator.choice((0, 1, 3)) for _ in range(3)]
        *_, cu, _, longest, _ = random_packed(lengths, lengths)
        tokens, (kv_heads, group) = sum(lengths), sizes(generator, 2)
        q, k, v = (
            lies((tokens, heads, width), generator)
            for heads, width in ((kv_heads * group, 4), (kv_heads, 4), (kv_heads, 2))
        )

        def attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> tuple[Tensor, ...]:
            ours = longattn.attention_varlen(q, k, v, cu, cu, longest, longest, return_lse=True)  # noqa: B023
            return *ours, flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest)  # noqa: B023

        check(attend, q, k, v, cu)


def test_other_faces() -> None:
    for generator in rounds():
        q, k, v = attention_case(generator)
        flash = [x.transpose(1, 2) for x in (q, k, v)]
        check(lambda q, k, v: (sdpa.scaled_dot_product_attention(q, k, v, enable_gqa=True),), q, k, v)
        check(lambda q, k, v: (flash_attn.flash_attn_func(q, k, v),), *flash)


@pytest.mark.parametrize("new", [longattn.KVCache, longattn.SlidingKVCache, longattn.PagedKVCache])
def test_caches(new: Any) -> None:
    rope = Rope(4)
    own = {"SlidingKVCache": {"window": 4}, "PagedKVCache": {"num_pages": 9, "page_size": 2}}.get(new.__name__, {})
    for generator in rounds():
        batch, kv_heads, group = sizes(generator, 3)
        n = generator.choice((1, 2, 3))
        shapes = (batch, kv_heads * group, n, 4), (batch, kv_heads, n, 4), (batch, kv_heads, n, 2)
        q, k, v = (lies(shape, generator) for shape in shapes)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            cache = new(batch, kv_heads, 4, v_head_dim=2, dtype=torch.float32, **own)  # noqa: B023
            return longattn.attention_with_cache(q, k, v, cache, rope=rope, return_lse=True)

        check(attend, q, k, v)
