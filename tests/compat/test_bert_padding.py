"""Padding and unpadding."""

from __future__ import annotations

import pytest
import torch

from longattn.compat.flash_attn.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_there_and_back(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).to(dtype)
    x = torch.randn(3, 4, 2, 5, dtype=torch.float64, requires_grad=True)
    tokens, indices, cu_seqlens, longest, used = unpad_input(x, mask)
    assert indices.tolist() == [0, 1, 3, 8, 9, 10, 11]
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 3, 7], 4, [3, 0, 4])
    assert cu_seqlens.dtype == used.dtype == torch.int32
    assert torch.equal(tokens, x[mask.bool()])
    back = pad_input(tokens, indices, 3, 4)
    assert torch.equal(back, x * mask[..., None, None])
    (grad,) = torch.autograd.grad(back.sin().sum(), x)
    torch.testing.assert_close(grad, x.detach().cos() * mask[..., None, None])


def test_unused_tokens_are_kept_and_not_counted() -> None:
    mask, unused = torch.tensor([[1, 1, 0, 0]]), torch.tensor([[0, 0, 1, 0]])
    _, indices, cu_seqlens, longest, used = unpad_input(torch.randn(1, 4, 2), mask, unused)
    assert (indices.tolist(), cu_seqlens.tolist(), longest, used.tolist()) == ([0, 1, 2], [0, 3], 3, [2])


def test_several_sequences_in_a_row() -> None:
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 2)
    tokens, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert (cu_seqlens.tolist(), longest) == ([0, 2, 5, 8, 10, 16], 6)
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert torch.equal(tokens, x.flatten(0, 1)[indices])


def test_rows() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([4, 0, 4])
    assert torch.equal(index_first_axis(x, rows), x[rows])
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x, rows), (x,))
    rows = torch.tensor([4, 0])
    put = index_put_first_axis(x[:2], rows, 6)
    assert torch.equal(put[rows], x[:2]) and int(put.abs().sum(1).count_nonzero()) == 2
    assert torch.autograd.gradcheck(lambda x: index_put_first_axis(x[:2], rows, 6), (x,))
