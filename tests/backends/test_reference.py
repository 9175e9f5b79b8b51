"""What is the reference backend's own; that it computes attention, the tests of attention show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import longattn
from helpers import random_packed, random_qkv, run
from longattn.backends import eager


@pytest.mark.parametrize(
    "keywords",
    [{"causal": True}, {"bias": torch.randn(2, 1, 37, 41), "dropout_p": 0.2, "seed": 1}],
    ids=["causal", "bias"],
)
def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch, keywords: dict[str, Tensor]) -> None:
    tensors = random_qkv(2, (4, 2), (37, 41), 8)
    dout = torch.randn(2, 4, 37, 8)
    whole = run(longattn.attention, tensors, dout, backend="reference", **keywords)
    monkeypatch.setattr(eager, "_TILE_BYTES", 8 * 2 * 4 * 41 * 5)  # 5 rows at a time
    blocks = run(longattn.attention, tensors, dout, backend="reference", **keywords)
    for name, expected in whole.items():
        torch.testing.assert_close(blocks[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_rounded_once(dtype: torch.dtype) -> None:
    """The reference in a narrow dtype is the reference in float64, rounded."""
    q, k, v = random_qkv(2, (4, 2), (19, 23), 8, dtype)
    out = longattn.attention(q, k, v, causal=True, backend="reference")
    exact = longattn.attention(q.double(), k.double(), v.double(), causal=True, backend="reference")
    assert torch.equal(out, exact.to(dtype))


def test_memory_is_bounded() -> None:
    """4096 queries and keys of 64 heads: the scores at once would take 8.6 GB."""
    q = torch.zeros(1, 64, 4096, 1)
    rows = eager._TILE_BYTES // (8 * 64 * 4096)
    assert 0 < rows < 4096 and rows * 8 * 64 * 4096 <= eager._TILE_BYTES
    out = longattn.attention(q[:, :, :8], q, torch.ones_like(q), backend="reference")
    assert torch.equal(out, torch.ones_like(out))


def test_packed_slopes_have_their_gradients_by_sequence() -> None:
    q, k, v, *rest = random_packed((3, 4), (3, 4), (2, 2), dtype=torch.float64)
    slopes = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64, requires_grad=True)
    out = longattn.attention_varlen(q, k, v, *rest, alibi_slopes=slopes, backend="reference")
    (first,) = torch.autograd.grad(out[:3].square().sum(), slopes)
    assert first[0].all() and not first[1].any()
