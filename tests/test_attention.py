"""attention against the oracle: every feature of the contract, on every backend, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import longattn
from helpers import (
    LAYOUTS,
    backend_names,
    backend_params,
    check_attention,
    drawn,
    laid_out,
    memory_order,
    random_qkv,
    require,
    run,
)
from oracle import visible

# Parameters are made when the tests are collected, before any seed is set.
generator = torch.Generator().manual_seed(0)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=dtype)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype)


def randint(low: int, high: int, *shape: int) -> Tensor:
    """int64 in [low, high)."""
    return torch.randint(low, high, shape, generator=generator)


HALF_AND_FULL = (torch.float32, torch.bfloat16)

# The shapes of FlashAttention's tests, (Nq, Nk).
FLASH_SHAPES = (
    (1, 1),
    (1, 3),
    (3, 513),
    (64, 128),
    (239, 1),
    (799, 3),
    (113, 203),
    (128, 217),
    (108, 256),
    (384, 256),
    (640, 128),
    (1023, 1024),
    (1024, 1023),
)
HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (3, 1)}
MASKS: dict[str, dict[str, Any]] = {"full": {}, "causal": {"causal": True}, "local": {"window": (57, 31)}}


@pytest.mark.parametrize("lengths, heads, mask", drawn(FLASH_SHAPES, HEADS, MASKS, rounds=2), ids=str)
@pytest.mark.parametrize("backend, dtype", backend_params(HALF_AND_FULL, slow=False))
def test_flash_attention_shapes(
    backend: str, dtype: torch.dtype, lengths: tuple[int, int], heads: str, mask: str
) -> None:
    q, k, v = random_qkv(1, HEADS[heads], lengths, 64, dtype)
    check_attention(q, k, v, backend=backend, **MASKS[mask])


@pytest.mark.parametrize("lengths, mask", drawn(FLASH_SHAPES, MASKS), ids=str)
def test_flash_attention_shapes_on_the_reference(lengths: tuple[int, int], mask: str) -> None:
    q, k, v = random_qkv(1, (2, 1), lengths, 64)
    check_attention(q, k, v, backend="reference", **MASKS[mask])


@pytest.mark.parametrize(
    "widths",
    [*(1, 2, 3, 8, 31, 33, 64, 80, 96, 111, 128, 192, 256, 512), (1, 512), (512, 1), (64, 48), (40, 129), (192, 128)],
    ids=str,
)
@pytest.mark.parametrize("backend, dtype", backend_params(native=True))
def test_head_widths(backend: str, dtype: torch.dtype, widths: int | tuple[int, int]) -> None:
    q, k, v = random_qkv(1, (2, 1), (37, 70), widths, dtype)
    check_attention(q, k, v, backend=backend, causal=True)


def lengths_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def scattered(batch: int, nk: int) -> Tensor:
    """A key mask with holes; the last sequence sees nothing."""
    keys = rand(batch, nk) < 0.6
    keys[-1] = False
    return keys


def documents(nq: int, nk: int) -> tuple[Tensor, Tensor]:
    """Bounds of documents with ends in odd places, one of them empty."""
    ends = torch.tensor([0, 5, 5, 31, nk])
    document = torch.arange(nq) * 4 // nq
    return ends[document].int(), ends[document + 1].int()


# Nq 33, Nk 47, batch 2.
VISIBILITY: dict[str, dict[str, Any]] = {
    "window 1": {"window": 1},
    "window 9": {"window": 9},
    "causal window 1": {"window": 1, "causal": True},
    "causal window 9": {"window": 9, "causal": True},
    "left only": {"window": (6, -1)},
    "right only": {"window": (-1, 6)},
    "both sides": {"window": (3, 20)},
    "no side": {"window": (0, 0)},
    "left of the causal": {"window": (4, 11), "causal": True},
    "unbounded pair": {"window": (-1, -1)},
    "sinks": {"window": 5, "causal": True, "sinks": 3},
    "sinks beyond the causal": {"window": 5, "causal": True, "sinks": 40},
    "sinks beyond the keys": {"window": (5, 5), "sinks": 100},
    "sinks, full": {"sinks": 4},
    "start": {"causal": True, "align": "start"},
    "offset": {"causal": True, "align": 6},
    "negative offset": {"causal": True, "align": -11, "window": 4, "sinks": 2},
    "past the keys": {"window": 8, "align": 40, "causal": True, "sinks": 1},
    "far past the keys": {"window": 8, "align": 10**9, "causal": True},
    "huge window": {"window": 2**31 - 1, "align": 2**31 - 1},
    "offsets": {"causal": True, "window": 7, "align": lengths_of(3, -9)},
    "int64 offsets": {"window": (2, 1), "align": lengths_of(20, 14).long()},
    "key_mask": {"key_mask": scattered(2, 47)},
    "key_mask, causal": {"key_mask": scattered(2, 47), "causal": True},
    "key_lens": {"key_lens": lengths_of(47, 12)},
    "key_lens, causal": {"key_lens": lengths_of(29, 0), "causal": True},
    "key_lens, causal, start": {"key_lens": lengths_of(29, 1), "causal": True, "align": "start"},
    "key_lens, window, sinks": {"key_lens": lengths_of(35, 20), "window": 6, "sinks": 2, "causal": True},
    "bounds": {"bounds": documents(33, 47)},
    "bounds, causal": {"bounds": documents(33, 47), "causal": True},
    "bounds by sequence": {"bounds": (randint(0, 40, 2, 33).int(), randint(0, 60, 2, 33).int())},
    "bounds outside": {"bounds": (torch.full((33,), -5, dtype=torch.int64), torch.full((33,), 10**9))},
    "tensors of odd strides": {
        "key_mask": rand(47, 4).t()[::2] < 0.7,
        "key_lens": lengths_of(40, 0, 47, 0)[::2],
        "align": lengths_of(14).expand(2),
        "bounds": (randint(0, 9, 33, 2).int().t(), torch.full((1, 1), 40).expand(2, 33)),
    },
    "everything": {
        "causal": True,
        "window": 17,
        "sinks": 2,
        "align": lengths_of(14, 9),
        "key_mask": rand(2, 47) < 0.8,
        "key_lens": lengths_of(44, 30),
        "bounds": (torch.zeros(2, 33, dtype=torch.int32), randint(20, 47, 2, 33).int()),
    },
}


@pytest.mark.parametrize("mask", VISIBILITY)
@pytest.mark.parametrize("backend, dtype", backend_params(native=True))
def test_visibility(backend: str, dtype: torch.dtype, mask: str) -> None:
    q, k, v = random_qkv(2, (4, 2), (33, 47), 16, dtype)
    check_attention(q, k, v, backend=backend, **VISIBILITY[mask])


@pytest.mark.parametrize("mask", VISIBILITY)
@pytest.mark.parametrize("backend, dtype", backend_params())
def test_visible_keys_one_by_one(backend: str, dtype: torch.dtype, mask: str) -> None:
    """Equal scores and one-hot values: the output is the mask, row by row divided by its count."""
    q, k, _ = random_qkv(2, (1, 1), (33, 47), 16, dtype)
    v = torch.eye(47, dtype=dtype).expand(2, 1, 47, 47)
    out = longattn.attention(torch.zeros_like(q), k, v, backend=backend, **VISIBILITY[mask])
    seen = visible(2, 33, 47, **VISIBILITY[mask])
    assert torch.equal(out[:, 0] > 0, seen)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0), (1, 0)], ids=str)
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("backend, dtype", backend_params(native=True))
def test_empty(backend: str, dtype: torch.dtype, batch: int, lengths: tuple[int, int]) -> None:
    q, k, v = random_qkv(batch, (2, 1), lengths, (8, 5), dtype)
    for rope in (None, longattn.Rope(4)):
        got = check_attention(q, k, v, backend=backend, causal=True, rope=rope)
        assert not got["out"].any()
        assert (got["lse"] == -torch.inf).all()


@pytest.mark.parametrize("backend", backend_names(native=True))
def test_no_query_heads(backend: str) -> None:
    q, k, v = random_qkv(1, (0, 1), (3, 5), 8)
    got = check_attention(q, k, v, backend=backend)
    assert got["out"].shape == (1, 0, 3, 8)


HIDDEN = {
    "key_mask": {"key_mask": torch.zeros(2, 20, dtype=torch.bool)},
    "key_lens": {"key_lens": lengths_of(0, 0)},
    "bounds": {"bounds": (lengths_of(*[7] * 12), lengths_of(*[7] * 12))},
    "before the keys": {"causal": True, "align": -12},
    "past the window": {"causal": True, "window": 3, "align": 50},
    "bool bias": {"bias": torch.zeros(1, 1, 1, 1, dtype=torch.bool)},
    "bias": {"bias": torch.full((12, 20), -torch.inf)},
}


@pytest.mark.parametrize("rope", [None, longattn.Rope(8)], ids=["plain", "rope"])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("backend, dtype", backend_params(native=True))
def test_rows_that_see_nothing(backend: str, dtype: torch.dtype, hidden: str, rope: longattn.Rope | None) -> None:
    q, k, v = random_qkv(2, (2, 1), (12, 20), 8, dtype)
    got = check_attention(q, k, v, backend=backend, rope=rope, **HIDDEN[hidden])
    assert (got["lse"] == -torch.inf).all()
    assert not any(got[name].any() for name in ("out", "q", "k", "v"))


@pytest.mark.parametrize("backend", backend_names())
def test_a_query_that_sees_nothing_may_hold_anything(backend: str) -> None:
    q, k, v = random_qkv(1, (2, 2), (6, 6), 8)
    q[:, :, :3] = torch.nan
    out, lse = longattn.attention(q, k, v, causal=True, align=-3, return_lse=True, backend=backend)
    assert not out[:, :, :3].any()
    assert (lse[:, :, :3] == -torch.inf).all()
    assert out[:, :, 3:].isfinite().all()


def shared_storage(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x with stride 0 in `dims`."""
    for dim in dims:
        x = x.narrow(dim, 0, 1).expand(*x.shape[:dim], x.shape[dim], *x.shape[dim + 1 :])
    return x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["q", "k", "v", "dout", "all"])
@pytest.mark.parametrize("backend, dtype", backend_params(HALF_AND_FULL, native=True))
def test_strides(backend: str, dtype: torch.dtype, which: str, layout: str) -> None:
    q, k, v = random_qkv(2, (4, 2), (19, 23), (16, 9), dtype)
    tensors = {"q": q, "k": k, "v": v, "dout": torch.randn(2, 4, 19, 9).to(dtype)}
    for name in tensors if which == "all" else (which,):
        tensors[name] = laid_out(tensors[name], layout)
    check_attention(**tensors, backend=backend, causal=True, key_lens=lengths_of(23, 17))


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("backend, dtype", backend_params(HALF_AND_FULL, native=True))
def test_strides_of_zero(backend: str, dtype: torch.dtype, dims: tuple[int, ...]) -> None:
    q, k, v = (shared_storage(x, dims) for x in random_qkv(2, (4, 2), (19, 23), (16, 9), dtype))
    check_attention(q, k, v, backend=backend, window=(4, 3))


@pytest.mark.parametrize("backend, dtype", backend_params(HALF_AND_FULL, native=True))
def test_incoming_gradients_of_stride_zero(backend: str, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(2, (4, 2), (19, 23), (16, 9), dtype)
    ones = torch.ones((), dtype=dtype).expand(2, 4, 19, 9)  # what out.sum().backward() sends
    check_attention(q, k, v, backend=backend, dout=ones, dlse=torch.ones((), dtype=torch.float32).expand(2, 4, 19))
    turned = torch.randn(9, 19, 4, 2).to(dtype).permute(3, 2, 1, 0)
    check_attention(q, k, v, backend=backend, dout=turned, dlse=torch.randn(19, 4, 2).permute(2, 1, 0))


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "nbhd", "hnbd", "gaps"])
@pytest.mark.parametrize("backend", backend_names())
def test_results_are_laid_out_as_their_inputs(backend: str, layout: str) -> None:
    q, k, v = (laid_out(x, layout) for x in random_qkv(2, (4, 2), (19, 23), (16, 9)))
    got = run(longattn.attention, (q, k, v), torch.randn(2, 4, 19, 9), backend=backend)
    assert memory_order(got["out"]) == memory_order(q)
    assert got["lse"].is_contiguous()
    for name, x in (("q", q), ("k", k), ("v", v)):
        assert memory_order(got[name]) == memory_order(x)


@pytest.mark.parametrize("backend, dtype", backend_params(native=True))
def test_scale(backend: str, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(1, (2, 2), (20, 20), 16, dtype)
    for scale in (0.0, 1.0, -0.7, 3.0, 1e-46):
        check_attention(q, k, v, backend=backend, scale=scale, causal=True)


@pytest.mark.parametrize("backend, dtype", backend_params((torch.float32, torch.float64)))
def test_large_scores(backend: str, dtype: torch.dtype) -> None:
    """Scores of thousands: exp must never see them as they are."""
    q, k, v = random_qkv(1, (2, 2), (40, 70), 16, dtype)
    check_attention(60.0 * q, 60.0 * k, v, backend=backend, causal=True)
    far = torch.full_like(k, 100.0)
    check_attention(torch.full_like(q, 100.0), far, v, backend=backend)
    check_attention(torch.full_like(q, 100.0), -far, v, backend=backend)


@pytest.mark.parametrize("nq", [2, 33])
@pytest.mark.parametrize("backend, dtype", backend_params((torch.float32, torch.float64, torch.bfloat16), native=True))
def test_masks_of_huge_numbers(backend: str, dtype: torch.dtype, nq: int) -> None:
    """Instead of -inf, on the left of one sequence and all over another, which then has the mean of its values."""
    tolerance = {"rtol": 1e-2, "atol": 1e-2}
    q, k, v = (x.requires_grad_() for x in random_qkv(2, (2, 1), (nq, 300), 16, dtype))
    dout = torch.randn(2, 2, nq, 16, dtype=dtype)
    dout[1] = 0.0
    for huge in (torch.finfo(dtype).min, -1e30):
        bias = torch.zeros(2, 1, 1, 300, dtype=dtype)
        bias[0, ..., :200] = bias[1] = huge
        out, lse = longattn.attention(q, k, v, bias=bias, return_lse=True, backend=backend)
        assert lse.isfinite().all()
        expected = longattn.attention(q[:1], k[:1, :, 200:], v[:1, :, 200:], backend=backend)
        torch.testing.assert_close(out[:1], expected, **tolerance)
        torch.testing.assert_close(out[1], v[1].mean(1, keepdim=True).expand_as(out[1]), **tolerance)
        grads = torch.autograd.grad(out, (q, k, v), dout)
        for grad, x in zip(grads, torch.autograd.grad(expected, (q, k, v), dout[:1]), strict=True):
            torch.testing.assert_close(grad, x, **tolerance)


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("backend, dtype", backend_params(HALF_AND_FULL))
def test_the_running_maximum_moves(backend: str, dtype: torch.dtype, order: str) -> None:
    """The largest score comes last, or first: the online softmax must rescale, or must not."""
    q, k, v = random_qkv(1, (1, 1), (5, 700), 8, dtype)
    slope = torch.linspace(-3.0, 3.0, 700)[:, None] * (1 if order == "rising" else -1)
    check_attention(torch.ones_like(q), (0.1 * k + slope).to(dtype), v, backend=backend)


ROPES = {
    "full width": longattn.Rope(16),
    "part of the width": longattn.Rope(6, base=100.0),
    "interleaved": longattn.Rope(16, interleaved=True),
    "interleaved part": longattn.Rope(10, interleaved=True),
    "with a factor": longattn.Rope(16, scaling=longattn.scaling.YaRN(4.0, 16)),
    "by length": longattn.Rope(16, scaling=longattn.scaling.DynamicNTK(2.0, 16)),
}


ROPE_MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 7, "sinks": 2},
}


@pytest.mark.parametrize("mask", ROPE_MASKS)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("backend, dtype", backend_params(native=True))
def test_rope(backend: str, dtype: torch.dtype, rope: str, mask: str) -> None:
    q, k, v = random_qkv(2, (4, 2), (25, 39), (16, 9), dtype)
    check_attention(q, k, v, backend=backend, rope=ROPES[rope], **ROPE_MASKS[mask])


ROPE_POSITIONS: dict[str, dict[str, Any]] = {
    "shared": {"positions": randint(0, 999, 39)},
    "by sequence": {"positions": randint(0, 999, 2, 39)},
    "float": {"positions": 100 * rand(2, 39)},
    "pair": {"positions": (randint(0, 999, 25), randint(0, 999, 39))},
    "pair by sequence": {"positions": (randint(0, 99, 2, 25), randint(0, 99, 2, 39))},
    "mixed pair": {"positions": (randint(0, 99, 2, 25), randint(0, 99, 39).int())},
    "start": {"align": "start", "causal": True},
    "offset": {"align": 5, "causal": True},
    "negative offset": {"align": -5, "causal": True},
    "past the keys": {"align": 30, "causal": True},
    "offsets": {"align": lengths_of(14, -3), "causal": True},
    "key_lens": {"key_lens": lengths_of(39, 27), "causal": True},
    "offset, positions": {"align": 5, "positions": randint(0, 99, 39)},
    "negative offset, positions": {"align": -5, "causal": True, "positions": randint(0, 99, 39)},
    "offsets, positions": {"align": lengths_of(14, 3), "positions": randint(0, 99, 39)},
    "key_lens, positions": {"key_lens": lengths_of(39, 27), "causal": True, "positions": randint(0, 99, 2, 39)},
}


@pytest.mark.parametrize("backend", backend_names(native=True))
def test_frequencies_follow_the_largest_position_not_the_number_of_keys(backend: str) -> None:
    q, k, v = random_qkv(2, (4, 2), (25, 39), (16, 9))
    rope = longattn.Rope(16, scaling=longattn.scaling.DynamicNTK(2.0, 16))
    far, near = torch.arange(39) * 5, torch.arange(39) // 4
    for positions in (far, near, far[None].repeat(2, 1), (far[:25], near), (near[:25], near)):
        check_attention(q, k, v, backend=backend, rope=rope, positions=positions)
    within = longattn.attention(q, k, v, rope=rope, positions=near, backend=backend)
    torch.testing.assert_close(within, longattn.attention(q, k, v, rope=longattn.Rope(16), positions=near))


@pytest.mark.parametrize("case", ROPE_POSITIONS)
@pytest.mark.parametrize("backend, dtype", backend_params((torch.float64, torch.bfloat16), native=True))
def test_rope_positions(backend: str, dtype: torch.dtype, case: str) -> None:
    q, k, v = random_qkv(2, (2, 1), (25, 39), 16, dtype)
    check_attention(q, k, v, backend=backend, rope=longattn.Rope(12), **ROPE_POSITIONS[case])


@pytest.mark.parametrize("backend", backend_names())
def test_rope_inside_is_rope_outside(backend: str) -> None:
    q, k, v = random_qkv(2, (4, 2), (25, 39), 16, torch.float64)
    rope = longattn.Rope(16)
    turned_q, turned_k = longattn.apply_rope(q, rope, torch.arange(14, 39)), longattn.apply_rope(k, rope)
    outside = longattn.attention(turned_q, turned_k, v, causal=True, backend=backend)
    inside = longattn.attention(q, k, v, causal=True, rope=rope, backend=backend)
    torch.testing.assert_close(inside, outside, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", backend_names())
def test_rope_far_away(backend: str) -> None:
    """A million tokens in, the angle is still a product of float32 numbers."""
    q, k, v = random_qkv(1, (1, 1), (8, 8), 16, torch.bfloat16)
    positions = torch.arange(10**6, 10**6 + 8)
    check_attention(q, k, v, backend=backend, causal=True, rope=longattn.Rope(16), positions=positions)


SCORES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0])},
    "alibi by sequence": {"alibi_slopes": rand(2, 4)},
    "alibi, two sides": {"alibi_slopes": rand(4), "window": (5, 9), "align": "start"},
    "sinks": {"sink_logits": randn(4)},
    "sinks, nothing to see": {"sink_logits": randn(4), "align": -12, "causal": True},
    "float64 sinks": {"sink_logits": randn(4, dtype=torch.float64), "window": 3, "causal": True},
    "bias": {"bias": randn(2, 4, 33, 47)},
    "bias of keys": {"bias": randn(47), "causal": True},
    "bias of rows": {"bias": randn(4, 33, 1)},
    "bias of sequences": {"bias": randn(2, 1, 1, 47)},
    "bias that blocks": {"bias": randn(33, 47).masked_fill(rand(33, 47) < 0.5, -torch.inf)},
    "bool bias": {"bias": rand(2, 1, 33, 47) < 0.5},
    "bool bias of rows": {"bias": rand(33, 1) < 0.5},
    "narrow bias": {"bias": randn(33, 47).bfloat16()},
    "wide bias": {"bias": randn(2, 1, 33, 47, dtype=torch.float64), "causal": True},
    "bias of odd strides": {"bias": randn(47, 66, 4).permute(2, 1, 0)[:, ::2], "window": 20},
    "expanded bias": {"bias": randn(33, 1).expand(2, 4, 33, 47)},
    "bias, empty rows": {"bias": randn(47), "causal": True, "align": -12},
    "slopes of odd strides": {"alibi_slopes": rand(4, 2).t(), "sink_logits": randn(8)[::2]},
    "narrow slopes and sinks": {"alibi_slopes": rand(4).half(), "sink_logits": randn(4).bfloat16()},
    "softcap, peaked": {"softcap": 30.0, "scale": 3.0, "causal": True},
    "large slopes": {"alibi_slopes": torch.tensor([8.0, 4.0, 2.0, 1.0]), "align": 10**6},
    "everything": {
        "softcap": 3.0,
        "alibi_slopes": rand(4),
        "sink_logits": randn(4),
        "bias": randn(1, 4, 33, 47),
        "rope": longattn.Rope(16),
        "causal": True,
        "window": 11,
        "sinks": 2,
        "scale": 0.4,
    },
}


@pytest.mark.parametrize("case", SCORES)
@pytest.mark.parametrize("backend, dtype", backend_params(native=True))
def test_scores(backend: str, dtype: torch.dtype, case: str) -> None:
    q, k, v = random_qkv(2, (4, 2), (33, 47), 16, dtype)
    got = check_attention(q, k, v, backend=backend, **SCORES[case])
    for name in ("alibi_slopes", "sink_logits", "bias"):
        if name in got:
            assert got[name].dtype == SCORES[case][name].dtype


DROPOUT: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope": {"causal": True, "rope": longattn.Rope(8)},
    "sinks": {"sink_logits": randn(2)},
}


@pytest.mark.parametrize("case", DROPOUT)
@pytest.mark.parametrize("backend, dtype", backend_params(HALF_AND_FULL))
def test_dropout_drops_the_entries_of_the_seed(backend: str, dtype: torch.dtype, case: str) -> None:
    q, k, v = random_qkv(2, (2, 1), (9, 13), 8, dtype)
    for seed in (0, 12345678901234567, -5):
        check_attention(q, k, v, backend=backend, dropout_p=0.3, seed=seed, **DROPOUT[case])


@pytest.mark.parametrize("backend", backend_names())
def test_dropout_without_a_seed_draws_from_the_default_generator(backend: str) -> None:
    q, k, v = random_qkv(2, (2, 1), (9, 13), 8)
    require(backend, q, k, v, dropout_p=0.5)
    torch.manual_seed(5)
    first = longattn.attention(q, k, v, dropout_p=0.5, backend=backend)
    second = longattn.attention(q, k, v, dropout_p=0.5, backend=backend)
    torch.manual_seed(5)
    assert torch.equal(longattn.attention(q, k, v, dropout_p=0.5, backend=backend), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", backend_names())
def test_dropout_keeps_the_mean(backend: str) -> None:
    q, k, v = random_qkv(1, (2, 2), (64, 512), 8)
    require(backend, q, k, v, dropout_p=0.25)
    ones = torch.ones_like(v)
    out = longattn.attention(torch.zeros_like(q), k, ones, dropout_p=0.25, seed=1, backend=backend)
    kept = 0.75 * out[..., 0]  # of each row, the share that was kept
    assert abs(kept.mean().item() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / (2 * 64 * 512))


HIDES: dict[str, dict[str, Any]] = {
    "key_mask": {"key_mask": torch.arange(24) < torch.tensor([[13], [24]])},
    "key_lens": {"key_lens": lengths_of(13, 24)},
    "both": {"key_lens": lengths_of(20, 24), "key_mask": torch.arange(24) < torch.tensor([[13], [24]])},
}


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rope", [None, longattn.Rope(8)], ids=["plain", "rope"])
@pytest.mark.parametrize("hides", HIDES)
@pytest.mark.parametrize("backend, dtype", backend_params(native=True))
def test_hidden_keys_may_hold_anything(
    backend: str, dtype: torch.dtype, hides: str, rope: longattn.Rope | None, junk: float
) -> None:
    """Keys 13.. of the first sequence are hidden from all of its queries."""
    q, k, v = random_qkv(2, (4, 2), (17, 24), 8, dtype)
    dout, dlse = torch.randn_like(q), torch.randn(2, 4, 17).to(torch.promote_types(dtype, torch.float32))
    clean = run(longattn.attention, (q, k, v), dout, dlse, backend=backend, rope=rope, align="start", **HIDES[hides])
    k[0, :, 13:], v[0, :, 13:] = junk, junk
    got = run(longattn.attention, (q, k, v), dout, dlse, backend=backend, rope=rope, align="start", **HIDES[hides])
    for name, expected in clean.items():
        assert torch.equal(got[name], expected), name
    assert not got["k"][0, :, 13:].any() and not got["v"][0, :, 13:].any()


@pytest.mark.parametrize("junk", [math.nan, math.inf])
@pytest.mark.parametrize("backend, dtype", backend_params(native=True))
def test_a_bad_query_spoils_its_row_only(backend: str, dtype: torch.dtype, junk: float) -> None:
    q, k, v = random_qkv(2, (4, 2), (70, 90), 8, dtype)
    clean, clean_lse = longattn.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    q[1, 2, 33, 5] = junk
    out, lse = longattn.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    harmed = torch.zeros(2, 4, 70, dtype=torch.bool)
    harmed[1, 2, 33] = True
    assert out[harmed].isnan().all() and not lse[harmed].isfinite().any()
    assert torch.equal(out[~harmed], clean[~harmed]) and torch.equal(lse[~harmed], clean_lse[~harmed])


@pytest.mark.parametrize("backend", backend_names())
def test_a_bad_key_or_value_reaches_who_sees_it(backend: str) -> None:
    """As in PyTorch: NaN in, NaN out; and never for a sequence or a head that has nothing to do with it."""
    for name in ("k", "v"):
        q, k, v = random_qkv(2, (4, 2), (70, 90), 8)
        (k if name == "k" else v)[1, 1, 30, 3] = torch.nan
        out = longattn.attention(q, k, v, causal=True, backend=backend)
        spoiled = out.isnan().any(-1)
        assert spoiled[1, 2:, 10:].all()
        assert not spoiled[0].any() and not spoiled[1, :2].any()


@pytest.mark.parametrize("backend, dtype", backend_params())
def test_without_lse_and_with_it_are_one(backend: str, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(2, (4, 2), (33, 47), 16, dtype)
    out, _ = longattn.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    assert torch.equal(longattn.attention(q, k, v, causal=True, backend=backend), out)


@pytest.mark.parametrize("backend", backend_names())
def test_the_inputs_stay_as_they_are(backend: str) -> None:
    tensors = random_qkv(2, (4, 2), (33, 47), 16)
    before = [x.clone() for x in tensors]
    run(longattn.attention, tensors, torch.randn(2, 4, 33, 16), backend=backend, rope=longattn.Rope(16), causal=True)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
