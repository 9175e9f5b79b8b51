"""The loss in chunks is the plain loss, and so are its gradients; no [N, vocab] logits outlive their chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from longattn import InvalidInput
from longattn.models import Decoder, TransformerConfig, chunked_cross_entropy


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk", [1, 5, 22, 100])
def test_equals_the_plain_loss(chunk: int, reduction: str) -> None:
    hidden = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 30, (2, 11))
    targets[0, 3] = -100
    upstream = torch.randn(2, 11, dtype=torch.float64) if reduction == "none" else torch.tensor(1.7).double()

    ours = chunked_cross_entropy(hidden, weight, targets, reduction=reduction, chunk=chunk)
    grads = torch.autograd.grad(ours, (hidden, weight), upstream)
    plain = F.cross_entropy((hidden @ weight.T).transpose(1, 2), targets, reduction=reduction)
    expected = torch.autograd.grad(plain, (hidden, weight), upstream)
    torch.testing.assert_close(ours, plain, rtol=1e-13, atol=1e-13)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-13)


def test_decoder_loss_is_that_of_its_logits() -> None:
    model = Decoder(TransformerConfig(vocab_size=50, dim=32, layers=2, heads=2, max_length=16)).double()
    tokens = torch.randint(0, 50, (3, 14))
    loss = model.loss(tokens[:, :-1], tokens[:, 1:], chunk=4)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    plain = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    expected = torch.autograd.grad(plain, list(model.parameters()))
    torch.testing.assert_close(loss, plain, rtol=1e-13, atol=1e-13)
    for grad, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-13)


def test_nothing_of_the_size_of_the_logits_is_saved() -> None:
    hidden = torch.randn(1, 64, 4, requires_grad=True)
    weight = torch.randn(1000, 4, requires_grad=True)
    saved = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunked_cross_entropy(hidden, weight, torch.randint(0, 1000, (1, 64)), chunk=8)
    assert max(saved) <= weight.numel()


def test_no_target_at_all_is_no_loss() -> None:
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    weight = torch.randn(5, 8)
    loss = chunked_cross_entropy(hidden, weight, torch.full((1, 4), -100))
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and hidden.grad.abs().sum() == 0
    assert chunked_cross_entropy(hidden[:, :0], weight, torch.zeros(1, 0, dtype=torch.int64)).item() == 0


def test_bfloat16_is_summed_in_float32() -> None:
    hidden, weight = torch.randn(1, 4, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    assert chunked_cross_entropy(hidden, weight, torch.zeros(1, 4, dtype=torch.int64)).dtype == torch.float32


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("targets", {"targets": torch.tensor([[0, 5]])}),
        ("targets", {"targets": torch.tensor([[0, -1]])}),
        ("targets", {"targets": torch.tensor([0, 1])}),
        ("targets", {"targets": torch.tensor([[0.0, 1.0]])}),
        ("reduction", {"reduction": "sum"}),
        ("chunk", {"chunk": 0}),
    ],
)
def test_bad_arguments_are_refused(argument: str, changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.randn(1, 2, 8),
        "weight": torch.randn(5, 8),
        "targets": torch.tensor([[0, 1]]),
    }
    with pytest.raises(InvalidInput, match=argument):
        chunked_cross_entropy(**arguments | changes)
