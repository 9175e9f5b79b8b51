"""The loss in chunks is the plain loss, and so are its gradients; no [N, vocab] logits outlive their chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from longattn import InvalidInput
from longattn.models import (
    Decoder,
    TransformerConfig,
    chunked_cross_entropy,
    chunked_distillation,
    hidden_state_loss,
    info_nce,
    triplet_loss,
)


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


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_products_run_in_autocast_s_dtype(reduction: str) -> None:
    hidden, weight = (torch.randn(*shape).requires_grad_() for shape in ((3, 7, 16), (50, 16)))
    targets = torch.randint(0, 50, (3, 7))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = chunked_cross_entropy(hidden, weight, targets, reduction=reduction, chunk=8).mean()
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
        assert all(x.dtype == torch.float32 for x in found[-1])
    for exact, low in zip(*found, strict=True):
        torch.testing.assert_close(low, exact, rtol=0.03, atol=0.03 * exact.abs().max().item())


def test_only_gradients_that_are_asked_for_are_made() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(5, 8, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3])
    loss = chunked_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert weight.grad is not None and hidden.grad is None
    with torch.no_grad():
        assert chunked_cross_entropy(hidden, weight, targets) == loss


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


def test_a_bias_and_any_leading_shape() -> None:
    hidden, weight, bias = (torch.randn(*shape).double().requires_grad_() for shape in ((6, 4), (9, 4), (9,)))
    targets = torch.tensor([0, 8, -100, 3, 3, 1])
    ours = chunked_cross_entropy(hidden, weight, targets, bias=bias, chunk=4)
    plain = F.cross_entropy(F.linear(hidden, weight, bias), targets)
    torch.testing.assert_close(ours, plain, rtol=1e-13, atol=1e-13)
    inputs = (hidden, weight, bias)
    for grad, wanted in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk", [3, 100])
def test_distillation_is_the_divergence_of_the_logits(chunk: int) -> None:
    student, teacher = torch.randn(2, 5, 4).double().requires_grad_(), torch.randn(2, 5, 7).double()
    weight, theirs = torch.randn(11, 4).double().requires_grad_(), torch.randn(11, 7).double()
    counted = torch.rand(2, 5) < 0.7
    ours = chunked_distillation(student, weight, teacher, theirs, temperature=2.0, counted=counted, chunk=chunk)
    wanted = F.softmax(teacher @ theirs.T / 2, -1)
    found = F.log_softmax(student @ weight.T / 2, -1)
    plain = 4 * (wanted * (wanted.log() - found)).sum(-1)[counted].mean()
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-13)
    inputs = (student, weight)
    for grad, expected in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-13)
    assert chunked_distillation(student, weight, student, weight).item() == pytest.approx(0, abs=1e-14)


def test_hidden_states_are_compared_by_direction() -> None:
    x = torch.randn(2, 5, 4)
    counted = torch.tensor([[True, True, False, False, False]] * 2)
    assert hidden_state_loss(x, 3 * x).item() == pytest.approx(0, abs=1e-6)
    assert hidden_state_loss(x, torch.where(counted[..., None], -x, x), counted=counted).item() == pytest.approx(2)


def test_info_nce_is_cross_entropy_of_cosines() -> None:
    queries, keys = torch.randn(4, 6).double(), torch.randn(7, 6).double()
    cosines = F.cosine_similarity(queries[:, None], keys[None], dim=-1)
    wanted = F.cross_entropy(cosines / 0.1, torch.arange(4))
    torch.testing.assert_close(info_nce(queries, keys, temperature=0.1, chunk=3), wanted)
    square, own = cosines[:, :4] / 0.1, torch.arange(4)
    both = (F.cross_entropy(square, own) + F.cross_entropy(square.T, own)) / 2
    torch.testing.assert_close(info_nce(queries, keys[:4], temperature=0.1, symmetric=True), both)


def test_triplets_count_until_the_margin_is_met() -> None:
    anchor, near, far = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert triplet_loss(anchor, near, far, margin=0.3).item() == 0
    assert triplet_loss(anchor, far, near, margin=0.3).item() == pytest.approx(1.3)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("teacher", lambda x: chunked_distillation(x[None], x, x, x)),
        ("teacher_weight", lambda x: chunked_distillation(x, x, x, x[:2])),
        ("temperature", lambda x: chunked_distillation(x, x, x, x, temperature=0.0)),
        ("counted", lambda x: chunked_distillation(x, x, x, x, counted=torch.ones(4, dtype=torch.bool))),
        ("teacher", lambda x: hidden_state_loss(x, x[:, :2])),
        ("keys", lambda x: info_nce(x, x[:2])),
        ("keys", lambda x: info_nce(x[:2], x, symmetric=True)),
        ("temperature", lambda x: info_nce(x, x, temperature=-1.0)),
        ("negatives", lambda x: triplet_loss(x, x, x[:2])),
        ("margin", lambda x: triplet_loss(x, x, x, margin=-1.0)),
    ],
)
def test_bad_arguments_of_other_losses(argument: str, call: Any) -> None:
    with pytest.raises(InvalidInput) as error:
        call(torch.randn(3, 4))
    assert error.value.argument == argument
