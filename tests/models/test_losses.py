"""The loss in chunks is the plain loss, and so are its gradients; no [N, vocab] logits outlive their chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("called", [False, True])
def test_what_is_left_out_need_not_be_finite(called: bool, reduction: str, value: float) -> None:
    head = torch.nn.Linear(8, 11)
    if called:
        head.register_forward_hook(lambda *_: None)
    targets = torch.tensor([1, -100, 2, 3, -100])
    counted = targets != -100
    hidden = torch.randn(5, 8)
    hidden[~counted] = value
    hidden.requires_grad_()
    loss = chunked_cross_entropy(hidden, head, targets, reduction=reduction, chunk=2)
    expected = F.cross_entropy(head(hidden[counted]), targets[counted], reduction=reduction)
    torch.testing.assert_close(loss if reduction == "mean" else loss[counted], expected)
    inputs = (hidden, *head.parameters())
    found, wanted = (torch.autograd.grad(x.sum(), inputs) for x in (loss, expected))
    torch.testing.assert_close(found, wanted)
    assert not found[0][~counted].any()


def test_a_bias_of_minus_infinity_leaves_the_mean_finite() -> None:
    bias = torch.zeros(11)
    bias[0] = -torch.inf
    loss = chunked_cross_entropy(torch.randn(3, 8), torch.randn(11, 8), torch.tensor([1, -100, 2]), bias=bias)
    assert loss.isfinite()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_what_does_not_count_in_a_distillation_need_not_be_finite(share: float) -> None:
    student, teacher = torch.randn(4, 8), torch.randn(4, 8)
    counted = torch.tensor([True, False, True, True])
    student[1] = torch.nan
    teacher[1] = torch.inf
    student.requires_grad_()
    weight = torch.randn(11, 8, requires_grad=True)

    def loss(*rows: torch.Tensor, **keywords: Any) -> torch.Tensor:
        if share:
            return chunked_distillation(rows[0], weight, rows[1], weight.detach(), chunk=2, **keywords)
        return hidden_state_loss(*rows, **keywords) + 0 * weight.sum()

    pair = [torch.autograd.grad(loss(student, teacher, counted=counted), (student, weight))]
    pair.append(torch.autograd.grad(loss(student[counted], teacher[counted]), (student, weight)))
    torch.testing.assert_close(*pair)


def test_a_mean_without_gradient_computes_none() -> None:
    hidden, weight = torch.randn(32, 8), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(0, 50, (32,))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, FlopCounterMode(display=False) as counter:
            chunked_cross_entropy(hidden, weight, targets, chunk=8)
        assert counter.get_total_flops() == 2 * 32 * 8 * 50
    assert chunked_cross_entropy(hidden, weight, targets).requires_grad


def test_losses_have_per_sample_gradients() -> None:
    weight = torch.randn(50, 8, dtype=torch.float64)
    hidden, targets = torch.randn(3, 6, 8, dtype=torch.float64), torch.randint(0, 50, (3, 6))
    targets[:, 2] = -100

    def loss(weight: torch.Tensor, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(hidden, weight, targets, chunk=4)

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, hidden, targets)
    for sample in range(3):
        other = weight.clone().requires_grad_()
        plain = F.cross_entropy(hidden[sample] @ other.T, targets[sample])
        torch.testing.assert_close(found[sample], torch.autograd.grad(plain, other)[0])


def test_a_negative_target_is_never_taken_for_an_id() -> None:
    targets = torch.tensor([0, -1, 2])
    with FlopCounterMode(display=False), pytest.raises((InvalidInput, IndexError, RuntimeError)):
        chunked_cross_entropy(torch.randn(3, 8), torch.randn(5, 8), targets)
    with pytest.raises((InvalidInput, IndexError, RuntimeError)):
        torch.func.grad(lambda x: chunked_cross_entropy(x, torch.randn(5, 8), targets))(torch.randn(3, 8))
