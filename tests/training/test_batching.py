"""Labelled examples and windows of documents become the arguments of each model's loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longattn import InvalidInput
from longattn.models import EncoderDecoder, MaskedLM, SentenceEncoder, TokenClassifier, TransformerConfig
from longattn.training import (
    ByteTokenizer,
    DenoisedWindows,
    LabelledSequence,
    LabelledSequences,
    LabelledTokens,
    MaskedWindows,
    SentencePairs,
    SequencePair,
    TaggedSequences,
    TokenFile,
    Translations,
    pad,
    write_token_file,
)

BYTES = ByteTokenizer()
PAD, UNK, START, END, MASK = (BYTES.id_of(f"[{name}]") for name in ("PAD", "UNK", "CLS", "SEP", "MASK"))
SIZES: dict[str, Any] = {"vocab_size": BYTES.vocab_size, "dim": 32, "layers": 1, "heads": 2, "max_length": 64}


@pytest.fixture
def documents(tmp_path: Path) -> TokenFile:
    texts = [chr(65 + n) * (5 + n) for n in range(26)] + ["z"]
    return write_token_file(tmp_path / "text", texts, BYTES.encode, BYTES.vocab_size)


def test_rows_are_filled_up() -> None:
    tokens, real = pad([[1, 2], [3, 4, 5], []], fill=9)
    assert tokens.tolist() == [[1, 2, 9], [3, 4, 5], [9, 9, 9]]
    assert real.tolist() == [[True, True, False], [True, True, True], [False, False, False]]
    assert pad([])[0].shape == (0, 0)


def test_every_example_comes_once_an_epoch() -> None:
    examples = [LabelledSequence([n, n], n) for n in range(10)]
    batches = LabelledSequences(examples, batch_size=4, seed=3)
    labels = torch.cat([batches.batch(step)["labels"] for step in range(5)]).tolist()
    assert sorted(labels[:10]) == sorted(labels[10:]) == list(range(10)) and labels[:10] != labels[10:]
    again = LabelledSequences(examples, batch_size=4, seed=3)
    assert torch.equal(again.batch(7)["labels"], batches.batch(7)["labels"])
    other = LabelledSequences([*examples[:-1], LabelledSequence([9, 8], 9)], batch_size=4, seed=3)
    assert again.describe() == batches.describe() != other.describe()


def test_batches_are_what_the_losses_take() -> None:
    config = TransformerConfig.style("bert", **SIZES)
    tagged = TaggedSequences([LabelledTokens([1, 2], [0, -100]), LabelledTokens([3], [1])], batch_size=2)
    batch = tagged.collate(tagged.examples)
    assert batch["labels"].tolist() == [[0, -100], [1, -100]]
    assert TokenClassifier(config, 2).loss(**batch).isfinite()
    pairs = [SequencePair([5, 6], [7]), SequencePair([8], [9, 10])]
    assert SentenceEncoder(config).loss(**SentencePairs(pairs, batch_size=2).batch(0)).isfinite()
    taught = Translations(pairs, start_id=START, end_id=END, batch_size=2)
    batch = taught.collate(pairs)
    assert batch["tokens"].tolist() == [[START, 7, 0], [START, 9, 10]]
    assert batch["targets"].tolist() == [[7, END, -100], [9, 10, END]]
    assert EncoderDecoder(TransformerConfig.style("transformer", **SIZES)).loss(**batch).isfinite()


@pytest.mark.parametrize("next_sentence", [False, True])
def test_masked_windows(documents: TokenFile, next_sentence: bool) -> None:
    ids: dict[str, Any] = {"mask_id": MASK, "start_id": START, "separator_id": END, "special_ids": [PAD, UNK]}
    windows = MaskedWindows(documents, batch_size=8, length=16, next_sentence=next_sentence, seed=1, **ids)
    random = []
    for step in range(20):
        batch = windows.batch(step)
        whole = torch.where(batch["targets"] == -100, batch["tokens"], batch["targets"])
        for row, real in zip(whole.tolist(), batch["key_mask"].tolist(), strict=True):
            row = row[: sum(real)]
            assert row[0] == START and row[-1] == END and len(row) <= 16 and row.count(END) == 1 + next_sentence
            first, *rest = (set(part) for part in _between(row[1:], END))
            assert len(first) == 1  # a window lies in one document
            if next_sentence:
                random.append(first != rest[0])
        if next_sentence:
            assert torch.equal(batch["is_random"], torch.tensor(random[-8:]))
            assert torch.equal(batch["token_types"].sum(1) > 0, torch.ones(8, dtype=torch.bool))
    assert not next_sentence or 0.3 < np.mean(random) < 0.7
    model = MaskedLM(TransformerConfig.style("bert", **SIZES), next_sentence=next_sentence)
    assert model.loss(**batch).isfinite()
    assert (
        windows.describe()
        == MaskedWindows(documents, batch_size=8, length=16, next_sentence=next_sentence, seed=1, **ids).describe()
    )


@pytest.mark.parametrize("kind", [{"mask_id": MASK}, {"sentinel_ids": range(252, 256)}])
def test_denoised_windows(documents: TokenFile, kind: dict[str, Any]) -> None:
    windows = DenoisedWindows(documents, batch_size=6, length=16, start_id=START, end_id=END, **kind)
    batch = windows.batch(0)
    written = (batch["targets"] != END)[:, :-1]
    assert torch.equal(batch["tokens"][:, 1:][written], batch["targets"][:, :-1].clamp(min=0)[written])
    assert (batch["tokens"][:, 0] == START).all() and ((batch["targets"] == END).sum(1) == 1).all()
    hidden = torch.isin(batch["source"], torch.tensor([MASK, *range(252, 256)]))
    assert hidden.any(1).all()
    assert EncoderDecoder(TransformerConfig.style("transformer", **SIZES)).loss(**batch).isfinite()


def test_a_token_file_is_split_by_document(tmp_path: Path) -> None:
    texts = [f"document {n}" for n in range(200)]
    first, second = write_token_file(tmp_path / "a", [*texts, *texts[:50]], str.encode, 256).split(0.2)
    sides = [{bytes(document.tolist()).decode() for document in side} for side in (first, second)]
    assert sides[0] | sides[1] == set(texts) and not sides[0] & sides[1]
    assert 20 <= len(sides[1]) <= 60 and len(first) + len(second) == 250
    assert first.lengths.sum() + second.lengths.sum() == sum(map(len, [*texts, *texts[:50]]))
    _, more = write_token_file(tmp_path / "b", [f"new {n}" for n in range(50)] + texts, str.encode, 256).split(0.2)
    assert sides[1] <= {bytes(document.tolist()).decode() for document in more}
    assert first.digest() != second.digest()
    with pytest.raises(IndexError):
        second[len(second)]


def test_bytes_with_special_tokens() -> None:
    assert BYTES.decode([*BYTES.encode("é"), MASK, 200]) == "é\ufffd" and BYTES.vocab_size == 261
    with pytest.raises(InvalidInput, match="one of"):
        BYTES.id_of("[NONE]")


@pytest.mark.parametrize(
    ("says", "call"),
    [
        ("examples", lambda file: LabelledSequences([], batch_size=1)),
        (
            r"examples\[0\]: expected at least one token",
            lambda file: LabelledSequences([LabelledSequence([], 0)], batch_size=1),
        ),
        ("a label >= 0", lambda file: LabelledSequences([LabelledSequence([1], -1)], batch_size=1)),
        ("a label for each", lambda file: TaggedSequences([LabelledTokens([1, 2], [1])], batch_size=1)),
        ("at least one token", lambda file: SentencePairs([SequencePair([1], [])], batch_size=1)),
        ("batch_size", lambda file: SentencePairs([SequencePair([1], [2])], batch_size=0)),
        ("held_out", lambda file: file.split(1.0)),
        ("both sides", lambda file: file.split(1e-9)),
        ("mask_id", lambda file: DenoisedWindows(file, batch_size=1, length=8, start_id=1, end_id=2)),
        ("sentinel_ids", lambda file: denoised(file, sentinel_ids=[1])),
        ("share", lambda file: denoised(file, mask_id=1, share=2.0)),
        ("length", lambda file: MaskedWindows(file, batch_size=1, length=4, mask_id=1, start_id=2, separator_id=3)),
        ("mask_id", lambda file: MaskedWindows(file, batch_size=1, length=8, mask_id=999, start_id=2, separator_id=3)),
    ],
)
def test_bad_input_is_named(says: str, call: Any, documents: TokenFile) -> None:
    with pytest.raises(InvalidInput, match=says):
        call(documents)


def denoised(file: TokenFile, **kind: Any) -> DenoisedWindows:
    return DenoisedWindows(file, batch_size=1, length=8, start_id=START, end_id=END, **kind)


def _between(row: list[int], separator: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in row:
        if token == separator:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts[:-1]
