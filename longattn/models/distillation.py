"""A student learns from a teacher: its predictions, and what its last block says."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.models.decoder import Decoder
from longattn.models.losses import IGNORED, chunked_cross_entropy, chunked_distillation, hidden_state_loss
from longattn.scaling import finite_number

__all__ = ["Distillation"]


class Distillation:
    """The loss of a student decoder beside its teacher, for `longattn.training.train(student, ..., loss=...)`.

        (1 - share) * cross-entropy + share * distillation of the logits + hidden_weight * cosine loss of hidden states

    Hinton et al., arXiv 1503.02531; the last term as in Sanh et al., DistilBERT, arXiv 1910.01108.

    Args:
        student: what is trained.
        teacher: over the same token ids; read without gradient, in eval mode, and left as it is.
        temperature: of both models' logits, > 0.
        share: of the teacher's predictions, in [0, 1].
        hidden_weight: >= 0; above 0 the two models must be of one width.

    Raises:
        InvalidInput: models that do not fit each other, or numbers out of range.
    """

    def __init__(
        self,
        student: Decoder,
        teacher: Decoder,
        *,
        temperature: float = 2.0,
        share: float = 0.5,
        hidden_weight: float = 0.0,
    ) -> None:
        if teacher.config.vocab_size != student.config.vocab_size:
            raise InvalidInput("teacher", f"a model of {student.config.vocab_size} ids", teacher.config.vocab_size)
        self.temperature = finite_number("temperature", temperature, above=0.0)
        self.share = finite_number("share", share, at_least=0.0, at_most=1.0)
        self.hidden_weight = finite_number("hidden_weight", hidden_weight, at_least=0.0)
        if hidden_weight and teacher.config.dim != student.config.dim:
            got = f"{hidden_weight} with widths {student.config.dim} and {teacher.config.dim}"
            raise InvalidInput("hidden_weight", "0 for models of different widths", got)
        self.student = student
        self.teacher = teacher.eval()

    def __call__(
        self, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor | None = None, chunk: int = 1024
    ) -> Tensor:
        """The loss of a batch, a scalar; arguments as `Decoder.loss`."""
        student = self.student.hidden_states(tokens, cu_seqlens=cu_seqlens)
        with torch.no_grad():
            teacher = self.teacher.hidden_states(tokens, cu_seqlens=cu_seqlens)
        counted = targets != IGNORED
        projection = self.student.projection
        loss = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
        if self.share < 1:
            loss = loss + (1 - self.share) * chunked_cross_entropy(student, projection, targets, chunk=chunk)
        if self.share:
            learned = chunked_distillation(
                student,
                projection,
                teacher,
                self.teacher.projection,
                temperature=self.temperature,
                counted=counted,
                chunk=chunk,
            )
            loss = loss + self.share * learned
        if self.hidden_weight:
            loss = loss + self.hidden_weight * hidden_state_loss(student, teacher, counted=counted)
        return loss

    def describe(self) -> dict[str, Any]:
        """What decides the loss, in plain Python values; the teacher by its config and the sums of its weights."""
        sums = [weight.double().sum().item() for weight in self.teacher.parameters()]
        teacher = hashlib.sha256(json.dumps([self.teacher.config.to_dict(), sums], sort_keys=True).encode())
        return {
            "temperature": self.temperature,
            "share": self.share,
            "hidden_weight": self.hidden_weight,
            "teacher": teacher.hexdigest()[:16],
        }
