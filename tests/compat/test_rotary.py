"""Rotation by tables, against complex multiplication in float64: values, gradients, what is overwritten."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from compat.flash_oracle import turned
from longattn.compat.flash_attn.layers.rotary import (
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)

BATCH, LENGTH, HEADS, WIDTH, ROWS = 3, 5, 2, 8, 12


def tables(half: int = 3, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    angle = torch.rand(rows, half, dtype=torch.float64) * 6
    return angle.cos(), angle.sin()


def draw_offsets(rng: random.Random) -> tuple[Any, list[int]]:
    """seqlen_offsets, and the same per sequence."""
    kind = rng.choice(["zero", "int", "tensor"])
    each = [0 if kind == "zero" else rng.randint(0, ROWS - LENGTH) for _ in range(BATCH)]
    if kind == "tensor":
        return torch.tensor(each, dtype=rng.choice([torch.int32, torch.int64])), each
    return each[0], each[:1] * BATCH


def turned_batch(x: Tensor, cos: Tensor, sin: Tensor, offsets: list[int], interleaved: bool) -> Tensor:
    rows = [slice(start, start + x.shape[1]) for start in offsets]
    return torch.stack([turned(x[b], cos[at], sin[at], interleaved) for b, at in enumerate(rows)])


def leaf_or_not(x: Tensor, leaf: bool) -> tuple[Tensor, Tensor]:
    """A leaf, and what to hand over: itself or a result of it."""
    x = x.clone().requires_grad_()
    return x, x if leaf else x * 1.0


def check(result: Tensor, handed: Tensor, leaf: Tensor, before: Tensor, exact: Any, inplace: bool) -> None:
    source = before.clone().requires_grad_()
    want = exact(source)
    torch.testing.assert_close(result, want)
    torch.testing.assert_close(handed.detach(), want.detach() if inplace else before)
    dout = torch.randn_like(want)
    sent = dout.clone()
    result.backward(sent)
    assert torch.equal(sent, dout)  # flash-attn overwrites the gradient
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(want, source, dout)[0])


@pytest.mark.parametrize("seed", range(12))
def test_one_tensor(seed: int) -> None:
    rng = random.Random(seed)
    interleaved, inplace, packed = (rng.random() < 0.5 for _ in range(3))
    cos, sin = tables(rng.choice([1, 3, 4]))
    offsets, each = draw_offsets(rng)
    keywords = {"interleaved": interleaved, "inplace": inplace, "seqlen_offsets": offsets}
    if packed:
        lengths = [LENGTH, 0, 3]
        before = torch.randn(10, HEADS, WIDTH, dtype=torch.float64)  # one token before all sequences, one after
        keywords |= {"cu_seqlens": torch.tensor([1, 6, 6, 9], dtype=torch.int32), "max_seqlen": LENGTH}
    else:
        before = torch.randn(BATCH, LENGTH, HEADS, WIDTH, dtype=torch.float64)

    def exact(x: Tensor) -> Tensor:
        if not packed:
            return turned_batch(x, cos, sin, each, interleaved)
        first, *parts, last = x.split([1, *lengths, 1])
        rows = [slice(start, start + n) for start, n in zip(each, lengths, strict=True)]
        done = [turned(part, cos[at], sin[at], interleaved) for part, at in zip(parts, rows, strict=True)]
        return torch.cat([first, *done, last])

    leaf, handed = leaf_or_not(before, rng.random() < 0.5)
    result = apply_rotary_emb(handed, cos, sin, **keywords)
    check(result, handed, leaf, before, exact, inplace)


@pytest.mark.parametrize("seed", range(8))
def test_queries_and_keys_in_place(seed: int) -> None:
    rng = random.Random(seed)
    interleaved, grouped, other = (rng.random() < 0.5 for _ in range(3))
    (cos, sin), for_k = tables(), tables()
    offsets, each = draw_offsets(rng)
    shape = (BATCH, LENGTH, 2 + 2 * 1, WIDTH) if grouped else (BATCH, LENGTH, 3, HEADS, WIDTH)
    before = torch.randn(shape, dtype=torch.float64)
    cos_k, sin_k = for_k if other else (cos, sin)

    def exact(x: Tensor) -> Tensor:
        q, k, v = x.split([2, 1, 1], 2) if grouped else x.unbind(2)
        q = turned_batch(q, cos, sin, each, interleaved)
        k = turned_batch(k, cos_k, sin_k, each, interleaved)
        return torch.cat([q, k, v], 2) if grouped else torch.stack([q, k, v], 2)

    leaf, handed = leaf_or_not(before, rng.random() < 0.5)
    given = for_k if other else (None, None)
    result = apply_rotary_emb_qkv_(handed, cos, sin, *given, interleaved, offsets, 2 if grouped else None)
    check(result, handed, leaf, before, exact, True)


@pytest.mark.parametrize("leaf", [True, False])
def test_keys_in_place(leaf: bool) -> None:
    cos, sin = tables()
    before = torch.randn(BATCH, LENGTH, 2, HEADS, WIDTH, dtype=torch.float64)
    start, handed = leaf_or_not(before, leaf)
    result = apply_rotary_emb_kv_(handed, cos, sin, False, 4)

    def exact(x: Tensor) -> Tensor:
        k, v = x.unbind(2)
        return torch.stack([turned_batch(k, cos, sin, [4] * BATCH, False), v], 2)

    check(result, handed, start, before, exact, True)


def test_the_overwritten_tensor_carries_the_gradient_too() -> None:
    cos, sin = tables(4)
    x = torch.randn(1, LENGTH, 1, WIDTH, dtype=torch.float64, requires_grad=True)
    qkv = x * 1.0
    apply_rotary_emb(qkv, cos, sin, inplace=True)  # the result is not used
    dout = torch.randn_like(x)
    qkv.backward(dout)
    torch.testing.assert_close(x.grad, apply_rotary_emb(dout, cos, -sin))


def test_views_are_written_through() -> None:
    cos, sin = tables()
    base = torch.randn(BATCH, HEADS, LENGTH, 2 * WIDTH)
    x = base.transpose(1, 2)[..., ::2]
    want = apply_rotary_emb(x, cos, sin)
    assert apply_rotary_emb(x, cos, sin, inplace=True) is x
    assert torch.equal(base.transpose(1, 2)[..., ::2], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_round_once(dtype: torch.dtype) -> None:
    cos, sin = (table.to(dtype) for table in tables())
    x = torch.randn(BATCH, LENGTH, HEADS, WIDTH).to(dtype)
    want = turned_batch(x.float(), cos.float(), sin.float(), [0] * BATCH, True).to(dtype)
    got = apply_rotary_emb(x, cos, sin, interleaved=True)
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=0)


def test_second_derivatives() -> None:
    cos, sin = tables()
    x = torch.randn(1, LENGTH, 1, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: apply_rotary_emb(x, cos, sin).sin(), (x,))


def test_plain_formula() -> None:
    cos, sin = (table[:LENGTH] for table in tables())
    x = torch.randn(BATCH, LENGTH, HEADS, WIDTH, dtype=torch.float64)
    per_sequence = (table.expand(BATCH, -1, -1) for table in (cos, sin))
    for given in ((cos, sin), per_sequence):
        torch.testing.assert_close(apply_rotary_emb_torch(x, *given), apply_rotary_emb(x, cos, sin))
