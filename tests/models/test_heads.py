"""Heads: losses that are those of the logits, padding, and labels that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from longattn import InvalidInput
from longattn.models import (
    MaskedLM,
    SentenceEncoder,
    SequenceClassifier,
    TokenClassifier,
    TransformerConfig,
    info_nce,
    mean_pool,
)

CONFIG = TransformerConfig.style("bert", vocab_size=50, dim=32, layers=2, heads=4, max_length=24)
TOKENS = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))


def test_masked_loss_is_that_of_the_masked_logits() -> None:
    model = MaskedLM(CONFIG, next_sentence=True).double()
    targets = torch.where(torch.rand(3, 9) < 0.4, TOKENS, -100)
    plain = F.cross_entropy(model(TOKENS).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(TOKENS, targets, chunk=2), plain)
    is_random = torch.tensor([True, False, True])
    pairs = F.cross_entropy(model.next_sentence_logits(model.encoder(TOKENS)), is_random.long())
    loss = model.loss(TOKENS, targets, is_random=is_random)
    torch.testing.assert_close(loss, plain + pairs)
    loss.backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is None} == set()
    assert model.loss(TOKENS, torch.full((3, 9), -100)).item() == 0


def test_classifiers_read_what_is_not_padding() -> None:
    mask = torch.arange(9) < torch.tensor([[9], [4], [6]])
    labels = torch.tensor([2, 0, 1])
    sequences = SequenceClassifier(CONFIG, 3).double()
    logits = sequences(TOKENS, key_mask=mask)
    torch.testing.assert_close(sequences(TOKENS[1:2, :4]), logits[1:2])
    torch.testing.assert_close(sequences.loss(TOKENS, labels, key_mask=mask), F.cross_entropy(logits, labels))
    tokens = TokenClassifier(CONFIG, 5).double()
    labels = torch.where(mask, TOKENS % 5, -100)
    wanted = F.cross_entropy(tokens(TOKENS, key_mask=mask).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(tokens.loss(TOKENS, labels, key_mask=mask), wanted)
    assert tokens.loss(TOKENS, torch.full((3, 9), -100)).item() == 0


def test_sentences_are_unit_vectors_of_their_own_tokens() -> None:
    model = SentenceEncoder(CONFIG).double()
    mask = torch.arange(9) < torch.tensor([[9], [4], [0]])
    vectors = model(TOKENS, key_mask=mask)
    torch.testing.assert_close(vectors[1:2], model(TOKENS[1:2, :4]))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.tensor([1.0, 1.0, 0.0]).double())
    assert mean_pool(torch.ones(2, 0, 4)).tolist() == [[0] * 4] * 2
    torch.testing.assert_close(
        model.loss(TOKENS, TOKENS.flip(0)), info_nce(model(TOKENS), model(TOKENS.flip(0)), temperature=0.05)
    )


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("classes", lambda: SequenceClassifier(CONFIG, 1)),
        ("labels", lambda: SequenceClassifier(CONFIG, 3).loss(TOKENS, torch.tensor([0, 1, 3]))),
        ("labels", lambda: SequenceClassifier(CONFIG, 3).loss(TOKENS, torch.tensor([0.0, 1, 2]))),
        ("labels", lambda: TokenClassifier(CONFIG, 3).loss(TOKENS, torch.tensor([0, 1, 2]))),
        ("tokens", lambda: SequenceClassifier(CONFIG, 3)(TOKENS[:, :0])),
        ("targets", lambda: MaskedLM(CONFIG).loss(TOKENS, TOKENS[:, :4])),
        ("is_random", lambda: MaskedLM(CONFIG).loss(TOKENS, TOKENS, is_random=torch.ones(3))),
        ("architecture", lambda: MaskedLM(TransformerConfig(dim=32, layers=1, heads=4, max_length=8))),
    ],
)
def test_bad_input_is_named(argument: str, call: Any) -> None:
    with pytest.raises(InvalidInput) as error:
        call()
    assert error.value.argument == argument
