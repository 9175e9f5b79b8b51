"""One token a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from longattn.models.generation.reader import Reader
from longattn.models.generation.sampling import Sampling, draw, uniform

__all__ = ["New", "PlainSteps", "Steps", "seen_tokens"]


class New(NamedTuple):
    """A new token; drafted: a draft model guessed it."""

    token: int
    drafted: bool


class Steps(Protocol):
    """How sequences grow."""

    def start(self, prompts: Sequence[list[int]]) -> None:
        """Read the prompts."""

    def advance(self, rows: Sequence[int]) -> list[list[New]]:
        """At least one more token of each of these sequences."""

    def free(self, row: int) -> None:
        """A sequence is done."""


class PlainSteps:
    """One call of the model per token."""

    def __init__(self, reader: Reader, sampling: Sampling, generator: torch.Generator | None) -> None:
        self._reader = reader
        self._sampling = sampling
        self._generator = generator
        self._logits: Tensor | None = None  # of what follows the prompts
        self._newest: list[int] = []
        self._seen: Tensor | None = None
        self._batch = 0

    def start(self, prompts: Sequence[list[int]]) -> None:
        self._batch = len(prompts)
        self._newest = [prompt[-1] for prompt in prompts]
        self._logits = self._reader.read_prompts(prompts)
        if self._sampling.penalises:
            self._seen = seen_tokens(prompts, self._reader)

    def advance(self, rows: Sequence[int]) -> list[list[New]]:
        if self._logits is None:
            logits = self._reader.read([[self._newest[row]] for row in rows], rows)
        else:
            logits, self._logits = self._logits[rows], None
        seen = None if self._seen is None else self._seen[rows]
        probabilities = self._sampling.probabilities(logits, seen)
        if self._sampling.temperature == 0:
            chosen = probabilities.argmax(-1)
        else:  # drawn for all sequences, so that none depends on which others have ended
            drawn = uniform(self._batch, 1, self._generator, self._reader.device)
            chosen = draw(probabilities, drawn[rows, 0])
        if self._seen is not None:
            self._seen[rows, chosen] = True
        tokens = chosen.tolist()
        for row, token in zip(rows, tokens, strict=True):
            self._newest[row] = token
        return [[New(token, False)] for token in tokens]

    def free(self, row: int) -> None:
        self._reader.free(row)


def seen_tokens(prompts: Sequence[list[int]], reader: Reader) -> Tensor:
    """bool [prompts, V]: which tokens each has."""
    seen = torch.zeros(len(prompts), reader.vocab_size, dtype=torch.bool, device=reader.device)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    return seen
