"""Labelled examples as training batches: every epoch in an order of its own, padded to the longest of each batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.models.losses import IGNORED

__all__ = [
    "LabelledSequence",
    "LabelledSequences",
    "LabelledTokens",
    "SequencePair",
    "SentencePairs",
    "TaggedSequences",
    "Translations",
    "pad",
]

Example = TypeVar("Example")


class LabelledSequence(NamedTuple):
    """Token ids, and the class of all of them."""

    tokens: Sequence[int]
    label: int


class LabelledTokens(NamedTuple):
    """Token ids, and the class of each; -100 leaves one out."""

    tokens: Sequence[int]
    labels: Sequence[int]


class SequencePair(NamedTuple):
    """Token ids of two sequences that belong together: a text and its translation, a question and its answer."""

    first: Sequence[int]
    second: Sequence[int]


def pad(rows: Sequence[Sequence[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of several lengths as one tensor.

    Returns:
        int64 [B, N], shorter rows filled up at their end; bool [B, N], True where a row has an entry.
    """
    lengths = torch.tensor([len(row) for row in rows], device="cpu")
    width = int(lengths.max()) if len(rows) else 0
    padded = torch.full((len(rows), width), fill, dtype=torch.int64, device="cpu")
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = torch.as_tensor(row, dtype=torch.int64, device="cpu")
    return padded, torch.arange(width, device="cpu") < lengths[:, None]


class _Examples(Generic[Example]):
    """Batches of examples; what they look like is the subclass's."""

    def __init__(self, examples: Sequence[Example], *, batch_size: int, seed: int = 0) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InvalidInput("batch_size", "an int >= 1", repr(batch_size))
        if not len(examples):
            raise InvalidInput("examples", "at least one", "none")
        for number, example in enumerate(examples):
            self.check(number, example)
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self._order: tuple[int, np.ndarray] | None = None

    def batch(self, step: int) -> dict[str, Tensor]:
        """The examples of a step: the same for the same seed, each of them once an epoch."""
        first = step * self.batch_size
        return self.collate([self.examples[self._place(number)] for number in range(first, first + self.batch_size)])

    def describe(self) -> dict[str, Any]:
        """What decides the batches, in plain Python values."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr(example).encode())
        examples = {"count": len(self.examples), "digest": digest.hexdigest()[:16]}
        return {"batches": type(self).__name__, "batch_size": self.batch_size, "seed": self.seed, "examples": examples}

    def check(self, number: int, example: Example) -> None:
        """Raise InvalidInput unless the example is one."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Examples as the arguments of the model's `loss`."""
        raise NotImplementedError

    def _place(self, number: int) -> int:
        """Which example is the number-th of all epochs."""
        epoch, place = divmod(number, len(self.examples))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
        return int(self._order[1][place])


class LabelledSequences(_Examples[LabelledSequence]):
    """For `SequenceClassifier`: tokens, labels, key_mask.

    Args:
        examples: of at least one token each.
        batch_size: B, examples a batch.
        seed: of their order.

    Raises:
        InvalidInput: no examples, or one without tokens or with a negative label.
    """

    def check(self, number: int, example: LabelledSequence) -> None:
        _check_tokens(number, example.tokens)
        if example.label < 0:
            raise InvalidInput(f"examples[{number}]", "a label >= 0", example.label)

    def collate(self, examples: Sequence[LabelledSequence]) -> dict[str, Tensor]:
        tokens, key_mask = pad([example.tokens for example in examples])
        return {
            "tokens": tokens,
            "labels": torch.tensor([example.label for example in examples], device="cpu"),
            "key_mask": key_mask,
        }


class TaggedSequences(_Examples[LabelledTokens]):
    """For `TokenClassifier`: tokens, labels, key_mask. Arguments and errors as `LabelledSequences`."""

    def check(self, number: int, example: LabelledTokens) -> None:
        _check_tokens(number, example.tokens)
        if len(example.labels) != len(example.tokens):
            expected = f"a label for each of {len(example.tokens)} tokens"
            raise InvalidInput(f"examples[{number}]", expected, f"{len(example.labels)} labels")

    def collate(self, examples: Sequence[LabelledTokens]) -> dict[str, Tensor]:
        tokens, key_mask = pad([example.tokens for example in examples])
        labels, _ = pad([example.labels for example in examples], fill=IGNORED)
        return {"tokens": tokens, "labels": labels, "key_mask": key_mask}


class Translations(_Examples[SequencePair]):
    """For `EncoderDecoder`, by teacher forcing: source, source_mask, tokens (start, target), targets (target, end).

    Args:
        examples: source and target, of at least one token each.
        start_id, end_id: where a target starts and ends.
        batch_size, seed: as in `LabelledSequences`.

    Raises:
        InvalidInput: no examples, or one with an empty side.
    """

    def __init__(
        self, examples: Sequence[SequencePair], *, start_id: int, end_id: int, batch_size: int, seed: int = 0
    ) -> None:
        super().__init__(examples, batch_size=batch_size, seed=seed)
        self.start_id = start_id
        self.end_id = end_id

    def check(self, number: int, example: SequencePair) -> None:
        _check_tokens(number, example.first)
        _check_tokens(number, example.second)

    def collate(self, examples: Sequence[SequencePair]) -> dict[str, Tensor]:
        source, source_mask = pad([example.first for example in examples])
        tokens, _ = pad([[self.start_id, *example.second] for example in examples])
        targets, _ = pad([[*example.second, self.end_id] for example in examples], fill=IGNORED)
        return {"source": source, "source_mask": source_mask, "tokens": tokens, "targets": targets}


class SentencePairs(_Examples[SequencePair]):
    """For `SentenceEncoder`: tokens, others and their masks; the other pairs of a batch are the negatives.

    Arguments and errors as `Translations`, without start and end.
    """

    def check(self, number: int, example: SequencePair) -> None:
        _check_tokens(number, example.first)
        _check_tokens(number, example.second)

    def collate(self, examples: Sequence[SequencePair]) -> dict[str, Tensor]:
        tokens, key_mask = pad([example.first for example in examples])
        others, others_mask = pad([example.second for example in examples])
        return {"tokens": tokens, "key_mask": key_mask, "others": others, "others_mask": others_mask}


def _check_tokens(number: int, tokens: Sequence[int]) -> None:
    if not len(tokens):
        raise InvalidInput(f"examples[{number}]", "at least one token", "an empty text")
