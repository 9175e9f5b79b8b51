"""Next-sentence prediction (Devlin et al., BERT, arXiv 1810.04805, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longattn.errors import InvalidInput

__all__ = ["SentencePair", "join_pair", "sentence_pair"]


class SentencePair(NamedTuple):
    """Two sentences, and whether the second is not the one that follows."""

    first: Sequence[int]
    second: Sequence[int]
    is_random: bool


def sentence_pair(documents: Sequence[Sequence[Sequence[int]]], rng: np.random.Generator) -> SentencePair:
    """A sentence with the next one of its document, or, as often, with one of another document.

    Args:
        documents: each a sequence of sentences, which are sequences of token ids. Documents of one sentence serve as
            source of random ones only.
        rng: draws the pair.

    Raises:
        InvalidInput: fewer than two documents with a sentence, or none with two.
    """
    filled = [index for index, document in enumerate(documents) if len(document)]
    paired = [index for index in filled if len(documents[index]) > 1]
    if len(filled) < 2 or not paired:
        got = f"{len(filled)} with sentences, {len(paired)} with two"
        raise InvalidInput("documents", "at least two documents with sentences, one of them with two", got)
    index = paired[rng.integers(len(paired))]
    document = documents[index]
    place = int(rng.integers(len(document) - 1))
    if rng.random() < 0.5:
        return SentencePair(document[place], document[place + 1], False)
    others = [other for other in filled if other != index]
    other = documents[others[rng.integers(len(others))]]
    return SentencePair(document[place], other[int(rng.integers(len(other)))], True)


def join_pair(
    first: Sequence[int], second: Sequence[int], *, start_id: int, separator_id: int, length: int
) -> tuple[Tensor, Tensor]:
    """[start] first [separator] second [separator], with the longer sentence cut from its end until all fit.

    Args:
        length: the most tokens, at least 5: one of each sentence and three more.

    Returns:
        (tokens, token types: 0 up to the first separator, 1 after it), int64 [at most length].

    Raises:
        InvalidInput: an empty sentence, or too short a length.
    """
    for name, sentence in (("first", first), ("second", second)):
        if not len(sentence):
            raise InvalidInput(name, "at least one token", "an empty sentence")
    if length < 5:
        raise InvalidInput("length", "an int >= 5", length)
    room = length - 3
    half = room // 2
    kept_first = min(len(first), max(room - len(second), room - half))
    kept_second = min(len(second), room - kept_first)
    tokens = [start_id, *first[:kept_first], separator_id, *second[:kept_second], separator_id]
    types = [0] * (kept_first + 2) + [1] * (kept_second + 1)
    return torch.tensor(tokens, device="cpu"), torch.tensor(types, device="cpu")
