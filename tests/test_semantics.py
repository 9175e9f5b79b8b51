"""docs/semantics.md holds: its pictures are what the library shows, and what others say is what it maps them to."""

from __future__ import annotations

import doctest
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.bias
from torch import Tensor

import longattn

PAGE = Path(__file__).resolve().parent.parent / "docs" / "semantics.md"
LENGTHS = ((5, 5), (3, 8), (8, 3))
WINDOWS = (1, 2, 4)


def ours(nq: int, nk: int, **mask: Any) -> Tensor:
    q, k = torch.zeros(1, 1, nq, 8), torch.zeros(1, 1, nk, 8)
    return longattn.attention_rows(q, k, range(nq), **mask)[0, 0] > 0


def where(nq: int, nk: int, formula: Any) -> Tensor:
    """A formula over query i and key j, as they count from 0."""
    return formula(torch.arange(nq)[:, None], torch.arange(nk)).expand(nq, nk)


def test_the_pictures() -> None:
    outcome = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.FAIL_FAST)
    assert outcome.attempted > 10 and outcome.failed == 0


@pytest.mark.parametrize(("nq", "nk"), LENGTHS)
def test_flash_attn_and_xformers(nq: int, nk: int) -> None:
    shift = nk - nq
    assert torch.equal(ours(nq, nk, causal=True), where(nq, nk, lambda i, j: j <= i + shift))
    for left, right in itertools.product((-1, 0, 2), repeat=2):

        def sees(i: Tensor, j: Tensor, left: int = left, right: int = right) -> Tensor:
            return ((left < 0) | (i + shift - left <= j)) & ((right < 0) | (j <= i + shift + right))

        assert torch.equal(ours(nq, nk, window=(left, right)), where(nq, nk, sees))
        causal = where(nq, nk, lambda i, j, sees=sees: sees(i, j) & (j <= i + shift))
        assert torch.equal(ours(nq, nk, causal=True, window=(left, right)), causal)
    for w in WINDOWS:  # xFormers' make_local_attention
        expected = torch.ones(nq, nk).tril(shift).triu(shift - w + 1).bool()
        assert torch.equal(ours(nq, nk, causal=True, window=w), expected)


@pytest.mark.parametrize(("nq", "nk"), LENGTHS)
def test_sdpa(nq: int, nk: int) -> None:
    q, k, v = torch.randn(1, 2, nq, 8), torch.randn(1, 2, nk, 8), torch.randn(1, 2, nk, 8)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    mask = torch.rand(nq, nk) < 0.6
    mask[:, 0] = True
    same = [
        ({"is_causal": True}, {"causal": True, "align": "start"}),
        ({"attn_mask": mask}, {"bias": mask}),
        ({"attn_mask": torch.where(mask, 0.5, -torch.inf)}, {"bias": torch.where(mask, 0.5, -torch.inf)}),
        ({"scale": 0.3}, {"scale": 0.3}),
    ]
    if nq <= nk:
        same.append(({"attn_mask": torch.nn.attention.bias.causal_lower_right(nq, nk)}, {"causal": True}))
    for theirs, keywords in same:
        torch.testing.assert_close(longattn.attention(q, k, v, **keywords), sdpa(q, k, v, **theirs))


@pytest.mark.parametrize(("nq", "nk"), LENGTHS)
def test_flex_attention(nq: int, nk: int) -> None:
    from torch.nn.attention.flex_attention import create_mask

    def theirs(mod: Any) -> Tensor:
        return create_mask(mod, 1, 1, nq, nk, device="cpu")[0, 0]

    assert torch.equal(ours(nq, nk, causal=True, align="start"), theirs(lambda b, h, q, k: k <= q))
    for w in WINDOWS:
        window = theirs(lambda b, h, q, k, w=w: (k <= q) & (q - k <= w))
        assert torch.equal(ours(nq, nk, causal=True, window=w + 1, align="start"), window)


def test_hugging_face() -> None:
    masking = pytest.importorskip("transformers.masking_utils")
    n = 9

    def theirs(function: Any) -> Tensor:
        b = h = torch.tensor(0)
        seen = [[bool(function(b, h, torch.tensor(i), torch.tensor(j))) for j in range(n)] for i in range(n)]
        return torch.tensor(seen)

    for w in WINDOWS:
        causal = masking.sliding_window_causal_mask_function(w)
        assert torch.equal(ours(n, n, causal=True, window=w), theirs(causal))
        both = masking.sliding_window_bidirectional_mask_function(w)
        assert torch.equal(ours(n, n, window=(w, w)), theirs(both))
        chunked = masking.chunked_causal_mask_function(w, torch.zeros(1).long())
        starts = torch.arange(n, dtype=torch.int32) // w * w
        bounds = (starts, torch.full_like(starts, n))
        assert torch.equal(ours(n, n, causal=True, bounds=bounds), theirs(chunked))
