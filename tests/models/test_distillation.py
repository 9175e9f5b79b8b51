"""A student beside its teacher: the loss is the sum of its parts, and a training of it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longattn import InvalidInput
from longattn.models import Decoder, Distillation, TransformerConfig
from longattn.training import TrainingConfig, load_model, train

SIZES: dict[str, Any] = {"vocab_size": 30, "layers": 1, "heads": 2, "max_length": 16}
STEPS = TrainingConfig(steps=4, warmup=1, precision="float32", save_every=2)


def decoder(seed: int, **sizes: Any) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(TransformerConfig(**{"dim": 32, **SIZES, **sizes}))


class Windows:
    def batch(self, step: int) -> Tensor:
        return torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(step))

    def describe(self) -> dict[str, Any]:
        return {}


def test_the_loss_is_the_sum_of_its_parts() -> None:
    student, teacher = decoder(0).double(), decoder(1, layers=2).double()
    windows = Windows().batch(0)
    tokens, targets = windows[:, :-1], windows[:, 1:].clone()
    targets[0, 2] = -100
    loss = Distillation(student, teacher, temperature=3.0, share=0.4, hidden_weight=0.5)(tokens, targets, chunk=5)

    counted = targets != -100
    ours, theirs = student(tokens)[counted], teacher(tokens)[counted].detach()
    soft = F.kl_div((ours / 3).log_softmax(-1), (theirs / 3).softmax(-1), reduction="batchmean") * 9
    cosine = F.cosine_similarity(student.hidden_states(tokens), teacher.hidden_states(tokens).detach(), dim=-1)
    wanted = 0.6 * F.cross_entropy(ours, targets[counted]) + 0.4 * soft + 0.5 * (1 - cosine[counted]).mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    loss.backward()
    assert all(weight.grad is not None for weight in student.parameters())
    assert all(weight.grad is None for weight in teacher.parameters())


def test_a_distillation_resumes_with_the_same_teacher_only(tmp_path: Path) -> None:
    teacher = decoder(1, dim=64)
    before = [weight.clone() for weight in teacher.parameters()]

    def run(student: Decoder, teacher: Decoder, **options: Any) -> list[float]:
        loss = Distillation(student, teacher)
        return train(student, Windows(), STEPS, loss=loss, show_progress=False, **options).losses

    whole = run(decoder(0), teacher)

    class Stopped(Windows):
        def batch(self, step: int) -> Tensor:
            if step == 3:
                raise ConnectionError
            return super().batch(step)

    path, student = tmp_path / "student", decoder(0)
    with pytest.raises(ConnectionError):
        train(student, Stopped(), STEPS, loss=Distillation(student, teacher), checkpoint=path, show_progress=False)
    with pytest.raises(InvalidInput, match="teacher"):
        run(decoder(0), decoder(2, dim=64), checkpoint=path, resume=True)
    with pytest.raises(InvalidInput, match="loss"):
        train(decoder(0), Windows(), STEPS, checkpoint=path, resume=True, show_progress=False)
    assert run(decoder(5), teacher, checkpoint=path, resume=True) == whole[3:]
    assert isinstance(load_model(path), Decoder)  # the student alone
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


@pytest.mark.parametrize(
    ("says", "options", "teacher"),
    [
        ("teacher", {}, {"vocab_size": 31}),
        ("temperature", {"temperature": 0.0}, {}),
        ("share", {"share": 1.1}, {}),
        ("hidden_weight", {"hidden_weight": 1.0}, {"dim": 64}),
    ],
)
def test_bad_input_is_named(says: str, options: dict[str, Any], teacher: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=says):
        Distillation(decoder(0), decoder(1, **teacher), **options)
