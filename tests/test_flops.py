"""Floating-point operations: what torch.utils.flop_counter counts, against pairs counted one by one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import longattn
from helpers import random_packed, random_qkv
from longattn.mask import Mask


def count(call: Callable[[], Any], **options: Any) -> int:
    """The operations of a call and, where its result has one, of its backward."""
    with FlopCounterMode(display=False, **options) as counter:
        out = call()
        if out.requires_grad:
            out.sum().backward()
    return counter.get_total_flops()


def pairs(nq: int, nk: int, **keywords: Any) -> int:
    return int(Mask.from_window(**keywords).materialize(nq, nk).sum())


MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": True, "align": "start"},
    {"causal": True, "window": 5, "sinks": 2},
    {"window": (3, 1), "align": -2},
]


@pytest.mark.parametrize("keywords", MASKS, ids=str)
def test_visible_pairs(keywords: dict[str, Any]) -> None:
    """4 D a pair, as 2 D + 2 Dv; 2.5 times that backward; what tensors hide counts as visible."""
    q, k, v = random_qkv(2, (4, 2), (19, 23), (16, 8))
    seen = 2 * 4 * pairs(19, 23, **keywords)
    assert count(lambda: longattn.attention(q, k, v, **keywords)) == seen * 2 * (16 + 8)
    hidden = {"key_mask": torch.rand(2, 23) < 0.5, "bias": torch.rand(19, 23) < 0.5}
    assert count(lambda: longattn.attention(q, k, v, **keywords, **hidden)) == seen * 2 * (16 + 8)
    leaf = q.clone().requires_grad_()
    assert count(lambda: longattn.attention(leaf, k, v, **keywords)) == seen * 2 * (4 * 16 + 3 * 8)
    with torch.inference_mode():
        assert count(lambda: longattn.attention(q, k, v, **keywords)) == seen * 2 * (16 + 8)
    explained = longattn.explain(q, k, v, **keywords)
    assert explained.forward_flops == seen * 2 * (16 + 8)


def test_as_pytorch() -> None:
    """Twice the forward and twice the backward of a causal call make those of PyTorch's formula, which has no mask."""
    q, k, v = (x.requires_grad_() for x in random_qkv(2, (4, 4), (32, 32), 16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(q, k, v)
    assert count(lambda: longattn.attention(q, k, v)) == 3.5 * counter.get_total_flops()
    with longattn.compat.use():
        assert count(lambda: F.scaled_dot_product_attention(q, k, v)) == 3.5 * counter.get_total_flops()


def test_packed_sequences() -> None:
    q, k, v, *rest = random_packed((3, 5, 2), (4, 5, 7), (4, 2), (8, 8))
    call = lambda *x: longattn.attention_varlen(*x, *rest[2:], causal=True)  # noqa: E731
    seen = pairs(3, 4, causal=True) + pairs(5, 5, causal=True) + pairs(2, 7, causal=True)
    assert count(lambda: call(q, k, v, *rest[:2])) == 4 * seen * 4 * 8
    longest = pairs(5, 7, causal=True)
    with FakeTensorMode() as mode:  # lengths that cannot be read: the longest for all
        fakes = [mode.from_tensor(x) for x in (q, k, v, *rest[:2])]
        assert count(lambda: call(*fakes)) == 4 * 3 * longest * 4 * 8


@pytest.mark.parametrize("device", ["fake", "meta"])
def test_without_data(device: str) -> None:
    q, k, v = random_qkv(2, (4, 2), (19, 23), 16)
    mode = FakeTensorMode()
    q, k, v = (mode.from_tensor(x) if device == "fake" else x.to("meta") for x in (q, k, v))
    expected = 2 * 4 * pairs(19, 23, causal=True, window=5) * 4 * 16
    assert count(lambda: longattn.attention(q, k, v, causal=True, window=5)) == expected
    q.requires_grad_()
    assert count(lambda: longattn.attention(q, k, v, causal=True, window=5)) == 3.5 * expected


def test_recomputation_and_derivatives() -> None:
    q, k, v = random_qkv(1, (2, 1), (9, 9), 8)
    once = 2 * 81 * 4 * 8
    leaf = q.clone().requires_grad_()
    again = lambda: checkpoint(longattn.attention, leaf, k, v, use_reentrant=False)  # noqa: E731
    assert count(again) == 4.5 * once

    def second() -> Tensor:
        out = longattn.attention(leaf, k, v)
        return torch.autograd.grad(out.square().sum(), leaf, create_graph=True)[0]

    assert count(second) == (1 + 2.5 + 2.5 + 6) * once  # dq is a function of dout, too
    assert count(lambda: jvp(lambda q: longattn.attention(q, k, v), (q,), (q,))[1]) == (1 + 2.5) * once


def test_caches() -> None:
    cache = longattn.KVCache(2, 2, 8, dtype=torch.float32, device="cpu")
    q, k, v = random_qkv(2, (4, 2), (6, 6), 8)
    assert count(lambda: longattn.attention_with_cache(q, k, v, cache)) == 2 * 4 * pairs(6, 6, causal=True) * 4 * 8
    row = [x[:, :, :1] for x in (q, k, v)]
    assert count(lambda: longattn.attention_with_cache(*row, cache, window=3)) == 2 * 4 * 3 * 4 * 8


def test_by_module_and_with_formulas_of_others() -> None:
    layer = longattn.nn.Attention(32, 4, window=3)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, 7, 32)).sum().backward()
    counts = counter.get_flop_counts()["Attention"]
    assert counts[torch.ops.longattn.attention] == 4 * pairs(7, 7, causal=True, window=3) * 4 * 8
    assert counts[torch.ops.longattn.attention_backward] == 2.5 * counts[torch.ops.longattn.attention]
    mapping = {torch.ops.longattn.attention: lambda *shapes, out_shape: 1}
    q, k, v = random_qkv(1, (2, 1), (9, 9), 8)
    assert count(lambda: longattn.attention(q, k, v), custom_mapping=mapping) == 1


def test_a_counter_that_is_older_than_the_operators() -> None:
    """`import longattn` loads neither the operators nor PyTorch's counter, which loads triton."""
    program = """
import torch, longattn
from torch.utils.flop_counter import FlopCounterMode
q = torch.randn(1, 2, 4, 8)
with FlopCounterMode(display=False) as counter:
    longattn.attention(q, q, q)
assert counter.get_total_flops() == 2 * 16 * 4 * 8, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
