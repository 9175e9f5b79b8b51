"""Metrics of tasks: the libraries' figures on what counts, and clear errors."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch

from longattn import InvalidInput
from longattn.evaluation import accuracy, bleu, f1, mean_loss, perplexity, retrieval_accuracy
from longattn.models import Decoder, TransformerConfig


def test_accuracy_and_f1() -> None:
    pytest.importorskip("sklearn")
    labels, found = torch.tensor([[0, 1, 1], [-100, 2, 2]]), torch.tensor([[0, 1, 0], [7, 2, 1]])
    assert accuracy(labels, found) == pytest.approx(3 / 5)
    # F1 of the classes: 2/3, 1/2, 2/3.
    assert f1(labels, found) == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert f1([0, 1, 1], [0, 1, 0], average="binary") == pytest.approx(2 / 3)
    assert f1(labels, found, average="micro") == pytest.approx(3 / 5)


def test_bleu() -> None:
    pytest.importorskip("sacrebleu")
    text = "the quick brown fox jumps over the lazy dog"
    assert bleu([text], [text]) == pytest.approx(100.0)
    # Post, A Call for Clarity: precisions 8/9, 6/8, 4/7, 3/6, no brevity penalty.
    found = bleu([text.replace("jumps", "leaps")], [text])
    assert found == pytest.approx(100 * (8 / 9 * 6 / 8 * 4 / 7 * 3 / 6) ** 0.25, rel=0.2)
    assert bleu(["nothing"], [text]) < 5


def test_perplexity_and_mean_loss() -> None:
    assert perplexity(math.log(7.0)) == pytest.approx(7.0) and perplexity(1e4) == math.inf
    model = Decoder(TransformerConfig(dim=32, layers=1, heads=2, max_length=8))

    class Windows:
        def batch(self, step: int) -> torch.Tensor:
            return torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(step))

    model.train()
    with torch.no_grad():
        wanted = [model.loss(x[:, :-1], x[:, 1:]).item() for x in (Windows().batch(0), Windows().batch(1))]
    assert mean_loss(model, Windows(), 2) == pytest.approx(sum(wanted) / 2) and model.training
    with pytest.raises(InvalidInput, match="count"):
        mean_loss(model, Windows(), 0)


def test_retrieval() -> None:
    queries = torch.eye(4)
    assert retrieval_accuracy(queries, 3 * queries) == 1.0
    assert retrieval_accuracy(queries, queries[[0, 1, 3, 2]]) == 0.5


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: accuracy([1], [1, 2]), "predictions"),
        (lambda: accuracy([-100], [1]), "at least one that counts"),
        (lambda: f1([], []), "labels"),
        (lambda: bleu([], []), "references"),
        (lambda: bleu(["a"], ["a", "b"]), "references"),
        (lambda: retrieval_accuracy(torch.ones(2, 3), torch.ones(3, 3)), "keys"),
    ],
)
def test_bad_input_is_named(call: Any, says: str) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("sacrebleu")
    with pytest.raises(InvalidInput, match=says):
        call()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"needs sacrebleu: pip install longattn\[metrics\]"):
        bleu(["a"], ["a"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("argument", ["queries", "keys"])
def test_embeddings_that_are_not_finite_are_refused(argument: str, value: float) -> None:
    rows = {"queries": torch.randn(3, 4), "keys": torch.randn(3, 4)}
    rows[argument][1] = value
    with pytest.raises(InvalidInput, match=f"{argument}.*row 1"):
        retrieval_accuracy(**rows)


def test_labels_are_whole_numbers() -> None:
    pytest.importorskip("sklearn")
    assert accuracy(torch.tensor([1.0, -100.0]), torch.tensor([1.0, float("nan")])) == 1.0
    for bad in (float("nan"), float("inf"), 0.5):
        with pytest.raises(InvalidInput, match="predictions"):
            accuracy([1, 0], [1.0, bad])
        with pytest.raises(InvalidInput, match="labels"):
            f1([1.0, bad], [1, 0])
