"""compat.sdpa against PyTorch's own scaled_dot_product_attention, in float64: any shapes, masks, gradients."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from longattn import InvalidInput, Unsupported
from longattn.compat.sdpa import scaled_dot_product_attention


def torchs(*args: Any, **keywords: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel for the CPU accepts less
        return F.scaled_dot_product_attention(*args, **keywords)


def laid_out(x: Tensor, rng: random.Random) -> Tensor:
    """The same numbers, but other strides."""
    if x.dim() > 2 and rng.random() < 0.5:
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    return x.mT.contiguous().mT if rng.random() < 0.3 else x


@pytest.mark.parametrize("seed", range(24))
def test_against_pytorch(seed: int) -> None:
    rng = random.Random(seed)
    dims = rng.choice([2, 3, 4, 4, 5])
    length, keys, width, width_v = rng.randint(1, 7), rng.randint(1, 9), 6, rng.choice([6, 4])
    heads = 3
    leading = (2, 2, heads)[5 - dims :] if dims > 2 else ()
    gqa = dims > 2 and rng.random() < 0.4
    keywords: dict[str, Any] = {"enable_gqa": gqa}
    q = torch.randn(*leading[:-1], heads * 2 if gqa else heads, length, width)[(0,) if dims == 2 else ...]
    k, v = (torch.randn(*leading, keys, w) for w in (width, width_v))
    if dims >= 4 and rng.random() < 0.3:
        k = k[:1]  # broadcast
    if rng.random() < 0.4:
        keywords["scale"] = rng.choice([0.3, -1.0])
    mask = rng.choice(["none", "causal", "bool", "float"])
    q, k, v = (laid_out(x.double(), rng).requires_grad_() for x in (q, k, v))
    inputs = [q, k, v]
    if mask == "causal":
        keywords["is_causal"] = True
    elif mask != "none":
        shape = [size if rng.random() < 0.6 else 1 for size in (*q.shape[:-2], length, keys)]
        shape = shape[rng.randint(0, dims - 2) :]
        visible = torch.rand(shape) < 0.7
        if mask == "bool":
            keywords["attn_mask"] = visible
        else:
            added = torch.randn(shape, dtype=torch.float64).masked_fill(~visible, -torch.inf).requires_grad_()
            keywords["attn_mask"] = added
            inputs.append(added)
    got, want = scaled_dot_product_attention(q, k, v, **keywords), torchs(q, k, v, **keywords)
    torch.testing.assert_close(got, want)
    dout = torch.randn_like(want)
    grads = [torch.autograd.grad(out, inputs, dout) for out in (got, want)]
    for name, ours, theirs in zip(("query", "key", "value", "attn_mask"), *grads, strict=False):
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.mark.parametrize("length, keys", [(5, 5), (3, 7), (7, 3)])
def test_causal_biases_are_never_made_dense(length: int, keys: int) -> None:
    q, k, v = (torch.randn(2, 3, n, 8) for n in (length, keys, keys))
    position = torch.arange(length)[:, None]
    for make, offset in ((causal_upper_left, 0), (causal_lower_right, keys - length)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rows that see nothing: here they give 0
            bias = make(length, keys)
        visible = torch.arange(keys) <= position + offset
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v, bias), torchs(q, k, v, visible))


def test_rows_that_see_nothing_give_zero_as_in_pytorch() -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (3, 5, 5))
    visible = torch.ones(3, 5, dtype=torch.bool)
    visible[1] = False
    for mask in (visible, torch.zeros(3, 5).masked_fill(~visible, -torch.inf)):
        out = scaled_dot_product_attention(q, k, v, mask)
        assert not out[:, :, 1].any()
        torch.testing.assert_close(out, torchs(q, k, v, mask))


def test_empty_and_long() -> None:
    q, k, v = (torch.randn(2, 3, n, 8) for n in (4, 0, 0))
    assert not scaled_dot_product_attention(q, k, v).any()
    assert scaled_dot_product_attention(q[:0], k[:0], v[:0]).shape == (0, 3, 4, 8)
    assert scaled_dot_product_attention(q[:, :, :0], q, q).shape == (2, 3, 0, 8)


def test_dropout_follows_the_default_generator() -> None:
    q = torch.randn(2, 3, 40, 8)
    torch.manual_seed(1)
    first = scaled_dot_product_attention(q, q, q, dropout_p=0.3)
    assert not torch.equal(first, scaled_dot_product_attention(q, q, q, dropout_p=0.3))
    torch.manual_seed(1)
    assert torch.equal(first, scaled_dot_product_attention(q, q, q, dropout_p=0.3))
    ones = torch.ones(2, 3, 40, 8)
    kept = scaled_dot_product_attention(q * 0, q, ones, dropout_p=0.3)[..., 0] * 40 * 0.7
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-4)
    assert abs(float(kept.sum()) / (2 * 3 * 40 * 40) - 0.7) < 0.03


def test_narrow_dtypes_and_autocast() -> None:
    q = torch.randn(2, 3, 20, 16)
    mask = torch.randn(20, 20)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = q.to(dtype)
        got = scaled_dot_product_attention(narrow, narrow, narrow, mask)
        assert got.dtype == dtype
        torch.testing.assert_close(got, torchs(narrow, narrow, narrow, mask), rtol=0.02, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        got = scaled_dot_product_attention(q, q.bfloat16(), q, mask.bfloat16())
        torch.testing.assert_close(got, torchs(q, q.bfloat16(), q, mask.bfloat16()), rtol=0.02, atol=0.02)


Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 7, 6)
BAD: list[tuple[str, dict[str, Any]]] = [
    ("query", {"query": 3.0}),
    ("query", {"query": Q[0, 0, 0]}),
    ("query", {"query": Q.to_sparse()}),
    ("query", {"query": Q.int(), "key": K.int(), "value": V.int()}),
    ("key", {"key": None}),
    ("key", {"key": K.double()}),
    ("key", {"key": K[..., :7]}),
    ("key", {"key": K[:, :2], "value": V[:, :2]}),  # grouped, but without enable_gqa
    ("key", {"key": K.to("meta")}),
    ("value", {"value": V[:, :, :6]}),
    ("value", {"value": V[:, :2], "enable_gqa": True}),
    ("query", {"query": Q[:, :3], "enable_gqa": True, "key": K[:, :2], "value": V[:, :2]}),
    ("query", {"query": Q[0, 0], "key": K[0, 0], "value": V[0, 0], "enable_gqa": True}),
    ("attn_mask", {"attn_mask": 1.0}),
    ("attn_mask", {"attn_mask": torch.zeros(5, 7).int()}),
    ("attn_mask", {"attn_mask": torch.zeros(5, 7).double()}),
    ("attn_mask", {"attn_mask": torch.zeros(5, 6)}),
    ("attn_mask", {"attn_mask": torch.zeros(3, 1, 5, 7)}),
    ("attn_mask", {"attn_mask": torch.zeros(1, 2, 4, 5, 7)}),
    ("attn_mask", {"attn_mask": torch.zeros(5, 7), "is_causal": True}),
    ("attn_mask", {"attn_mask": torch.zeros(5, 7, device="meta")}),
    ("attn_mask", {"attn_mask": causal_upper_left(5, 6)}),
    ("dropout_p", {"dropout_p": 1.5}),
    ("dropout_p", {"dropout_p": -0.1}),
    ("dropout_p", {"dropout_p": "0"}),
    ("is_causal", {"is_causal": 1}),
    ("enable_gqa", {"enable_gqa": None}),
    ("scale", {"scale": float("nan")}),
    ("scale", {"scale": "1"}),
]


@pytest.mark.parametrize(("argument", "changes"), BAD)
def test_bad_input(argument: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        scaled_dot_product_attention(**{"query": Q, "key": K, "value": V, **changes})
    assert caught.value.argument == argument


def test_what_we_do_not_have() -> None:
    nested = torch.nested.nested_tensor([Q[0], Q[1, :, :3]], layout=torch.jagged)
    for args, keywords in (((nested, nested, nested), {}), ((Q, K, V), {"dropout_p": 1.0})):
        with pytest.raises(Unsupported, match="nested|dropout_p"):
            scaled_dot_product_attention(*args, **keywords)
