"""What a trained model is worth: accuracy and F1 by scikit-learn, BLEU by sacreBLEU, perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.models import autocast
from longattn.models.losses import IGNORED

__all__ = ["accuracy", "bleu", "f1", "mean_loss", "perplexity", "retrieval_accuracy"]

Labels = Tensor | Sequence[int]


def accuracy(labels: Labels, predictions: Labels) -> float:
    """The share of predictions that are right.

    Args:
        labels: ints of any shape; what is -100 is left out. predictions: of the same shape.

    Raises:
        InvalidInput: nothing to count, or shapes that do not fit.
        ImportError: scikit-learn is not installed.
    """
    metrics = _import("sklearn.metrics", "scikit-learn")
    return float(metrics.accuracy_score(*_counted(labels, predictions)))


def f1(labels: Labels, predictions: Labels, *, average: str = "macro") -> float:
    """The harmonic mean of precision and recall.

    Args:
        labels, predictions: as in `accuracy`.
        average: over the classes: "macro" (each counts the same), "micro", "weighted" by frequency; "binary" is that of
            class 1. A class that occurs on one side only has an F1 of 0.

    Raises:
        As `accuracy`; ValueError for another average.
    """
    metrics = _import("sklearn.metrics", "scikit-learn")
    return float(metrics.f1_score(*_counted(labels, predictions), average=average, zero_division=0))


def bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU of one reference each, 0 to 100, with sacreBLEU's own tokenizer (Post, arXiv 1804.08771).

    Raises:
        InvalidInput: no texts, or not as many of each.
        ImportError: sacrebleu is not installed.
    """
    library = _import("sacrebleu", "sacrebleu")
    _check_pairs(translations, references)
    return float(library.corpus_bleu(list(translations), [list(references)]).score)


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats per token; inf where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@torch.no_grad()
def mean_loss(model: Any, batches: Any, count: int, *, dtype: torch.dtype = torch.float32) -> float:
    """The mean of a model's own loss over the first `count` batches, in eval mode.

    Args:
        model: with a `loss`, and batches of its arguments, as `longattn.training.train` takes them.
        dtype: of the matrix products: float32, or bfloat16 (autocast).

    Raises:
        InvalidInput: no batches.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InvalidInput("count", "an int >= 1", repr(count))
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = 0.0
    for step in range(count):
        batch = batches.batch(step)
        inputs = {"tokens": batch[:, :-1], "targets": batch[:, 1:]} if isinstance(batch, Tensor) else batch
        with autocast(device, dtype):
            total += model.loss(**{name: x.to(device) for name, x in inputs.items()}).item()
    model.train(training)
    return total / count


def retrieval_accuracy(queries: Tensor, keys: Tensor) -> float:
    """Return how often a query [B, C] is nearest by cosine to its own key, row by row of [B, C], among all of them.

    Raises:
        InvalidInput: shapes that do not fit, or a row that is not finite or whose length overflows float32.
    """
    if queries.shape != keys.shape or queries.dim() != 2 or not len(queries):
        raise InvalidInput("keys", f"[B, C] as queries {tuple(queries.shape)}", tuple(keys.shape))
    for name, x in (("queries", queries), ("keys", keys)):
        wrong = (~torch.linalg.vector_norm(x.float(), dim=-1).isfinite()).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise InvalidInput(name, "finite rows, of a length that float32 holds", f"row {row}: {x[row].tolist()}")
    normalize = torch.nn.functional.normalize
    nearest = (normalize(queries.float(), dim=-1) @ normalize(keys.float(), dim=-1).T).argmax(-1)
    return (nearest == torch.arange(len(queries), device=queries.device)).float().mean().item()


def _counted(labels: Labels, predictions: Labels) -> tuple[list[int], list[int]]:
    wanted, found = torch.as_tensor(labels, device="cpu"), torch.as_tensor(predictions, device="cpu")
    if wanted.shape != found.shape:
        raise InvalidInput("predictions", f"shape {tuple(wanted.shape)} as labels", tuple(found.shape))
    counted = wanted != IGNORED
    for name, x in (("labels", wanted), ("predictions", found)):
        chosen = x[counted]
        if x.is_complex() or not chosen.isfinite().all() or (chosen.double() != chosen.double().trunc()).any():
            raise InvalidInput(name, "whole numbers wherever a label counts", chosen.tolist())
    if not counted.any():
        raise InvalidInput("labels", "at least one that counts", f"{wanted.numel()} of which none does")
    return wanted[counted].tolist(), found[counted].tolist()


def _check_pairs(translations: Sequence[str], references: Sequence[str]) -> None:
    if not translations or len(translations) != len(references):
        expected = f"as many texts as translations, {len(translations)}, and at least one"
        raise InvalidInput("references", expected, len(references))


def _import(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this metric needs {package}: pip install longattn[metrics]") from error
