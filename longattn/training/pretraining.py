"""Windows of documents as training batches of the objectives that see both sides: masking, denoising."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.models.losses import IGNORED
from longattn.training.batching import pad
from longattn.training.objectives import corrupt_spans, infill_text, join_pair, mask_tokens
from longattn.training.packing import Documents

__all__ = ["DenoisedWindows", "MaskedWindows"]


class _Windows:
    """Random windows of documents, every token as likely as any other; the batch of a step hangs on seed and step."""

    def __init__(self, documents: Documents, *, batch_size: int, length: int, least: int, seed: int) -> None:
        for name, value, low in (("batch_size", batch_size, 1), ("length", length, least)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise InvalidInput(name, f"an int >= {low}", repr(value))
        lengths = documents.lengths
        self._usable = np.flatnonzero(lengths > 1)
        if not len(self._usable):
            raise InvalidInput("documents", "at least one of two tokens", f"{len(documents)} of one")
        self._cumulative = np.cumsum(lengths[self._usable])
        self.documents = documents
        self.batch_size = batch_size
        self.length = length
        self.seed = seed

    def describe(self) -> dict[str, Any]:
        """What decides the batches, in plain Python values."""
        return {
            "batches": type(self).__name__,
            "batch_size": self.batch_size,
            "length": self.length,
            "seed": self.seed,
            "documents": self.documents.digest(),
        }

    def _draw(self, rng: np.random.Generator, room: int, *, but: int | None = None) -> tuple[int, list[int]]:
        """(document, at most `room` tokens of it that stand side by side); of another document than `but`."""
        while True:
            place = rng.integers(self._cumulative[-1])
            index = int(self._usable[np.searchsorted(self._cumulative, place, side="right")])
            if index != but:
                break
        document = self.documents[index]
        start = int(rng.integers(max(1, len(document) - room + 1)))
        return index, document[start : start + room].tolist()


class MaskedWindows(_Windows):
    """For `MaskedLM`: tokens with masks, targets, key_mask; with next_sentence also token_types and is_random.

    A sequence is [start] window [separator]. With next_sentence it is [start] A [separator] B [separator], where B goes
    on where A ends, or, as often, is of another document (`longattn.training.objectives`).

    Args:
        documents: where the text is.
        batch_size: B; length: the most tokens of a sequence.
        mask_id, start_id, separator_id: the ids of these.
        special_ids: further ids that are never masked, nor put in place of others.
        next_sentence: make pairs; needs two documents.
        probability: of a token to be predicted.
        seed: of all that is drawn.

    Raises:
        InvalidInput: too few documents, or numbers out of range.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        batch_size: int,
        length: int,
        mask_id: int,
        start_id: int,
        separator_id: int,
        special_ids: Sequence[int] = (),
        next_sentence: bool = False,
        probability: float = 0.15,
        seed: int = 0,
    ) -> None:
        super().__init__(documents, batch_size=batch_size, length=length, least=5, seed=seed)
        if next_sentence and len(self._usable) < 2:
            raise InvalidInput("documents", "at least two of two tokens, for pairs", len(self._usable))
        self.mask_id = mask_id
        self.start_id = start_id
        self.separator_id = separator_id
        self.special_ids = tuple(sorted({start_id, separator_id, mask_id, *special_ids}))
        self.next_sentence = next_sentence
        self.probability = probability
        self.batch(0)  # reports what is out of range

    def batch(self, step: int) -> dict[str, Tensor]:
        """The arguments of `MaskedLM.loss`."""
        rng = np.random.default_rng([self.seed, step])
        rows: list[list[int]] = []
        types: list[list[int]] = []
        is_random: list[bool] = []
        for _ in range(self.batch_size):
            if self.next_sentence:
                row, row_types, other = self._pair(rng)
                types.append(row_types)
                is_random.append(other)
            else:
                row = [self.start_id, *self._draw(rng, self.length - 2)[1], self.separator_id]
            rows.append(row)
        tokens, key_mask = pad(rows, fill=self.separator_id)
        masked, targets = mask_tokens(
            tokens,
            mask_id=self.mask_id,
            vocab_size=self.documents.vocab_size,
            special_ids=self.special_ids,
            probability=self.probability,
            generator=torch.Generator().manual_seed(int(rng.integers(2**62))),
        )
        batch = {"tokens": masked, "targets": targets, "key_mask": key_mask}
        if self.next_sentence:
            batch |= {"token_types": pad(types)[0], "is_random": torch.tensor(is_random, device="cpu")}
        return batch

    def describe(self) -> dict[str, Any]:
        """What decides the batches, in plain Python values."""
        return {
            **super().describe(),
            "special_ids": list(self.special_ids),
            "next_sentence": self.next_sentence,
            "probability": self.probability,
        }

    def _pair(self, rng: np.random.Generator) -> tuple[list[int], list[int], bool]:
        """(tokens, token types, is the second part of another document)."""
        room = self.length - 3
        index, window = self._draw(rng, room)
        cut = int(rng.integers(1, len(window)))
        first, second = window[:cut], window[cut:]
        is_random = bool(rng.random() < 0.5)
        if is_random:
            _, second = self._draw(rng, len(second), but=index)
        tokens, types = join_pair(
            first, second, start_id=self.start_id, separator_id=self.separator_id, length=self.length
        )
        return tokens.tolist(), types.tolist(), is_random


class DenoisedWindows(_Windows):
    """For `EncoderDecoder`: a window with parts left out as source, what an encoder-decoder shall write as target.

    Args:
        documents: where the text is.
        batch_size: B; length: the most tokens of a window.
        start_id, end_id: where a target starts and ends.
        mask_id: BART's infilling: each part becomes this mask, and the target is the whole window.
        sentinel_ids: T5's spans, in place of mask_id: each part becomes a sentinel, and the target is the parts.
        share: of the tokens to leave out; 0.3 with mask_id and 0.15 with sentinel_ids by default.
        seed: of all that is drawn.

    Raises:
        InvalidInput: both or none of mask_id and sentinel_ids, or what `infill_text` and `corrupt_spans` refuse.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        batch_size: int,
        length: int,
        start_id: int,
        end_id: int,
        mask_id: int | None = None,
        sentinel_ids: Sequence[int] | None = None,
        share: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(documents, batch_size=batch_size, length=length, least=2, seed=seed)
        if (mask_id is None) == (sentinel_ids is None):
            raise InvalidInput("mask_id", "an id, or sentinel_ids in its place", mask_id)
        self.start_id = start_id
        self.end_id = end_id
        self.mask_id = mask_id
        self.sentinel_ids = None if sentinel_ids is None else tuple(sentinel_ids)
        self.share = share if share is not None else 0.15 if mask_id is None else 0.3
        self.batch(0)  # reports what is out of range

    def batch(self, step: int) -> dict[str, Tensor]:
        """The arguments of `EncoderDecoder.loss`."""
        rng = np.random.default_rng([self.seed, step])
        made = []
        for _ in range(self.batch_size):
            window = torch.tensor(self._draw(rng, self.length)[1], device="cpu")
            if self.mask_id is not None:
                made.append(infill_text(window, mask_id=self.mask_id, rng=rng, share=self.share))
            else:
                sentinels = self.sentinel_ids or ()
                made.append(corrupt_spans(window, sentinel_ids=sentinels, rng=rng, share=self.share))
        source, source_mask = pad([one.source.tolist() for one in made])
        tokens, _ = pad([[self.start_id, *one.target.tolist()] for one in made])
        targets, _ = pad([[*one.target.tolist(), self.end_id] for one in made], fill=IGNORED)
        return {"source": source, "source_mask": source_mask, "tokens": tokens, "targets": targets}

    def describe(self) -> dict[str, Any]:
        """What decides the batches, in plain Python values."""
        special = {"mask_id": self.mask_id, "sentinel_ids": self.sentinel_ids and list(self.sentinel_ids)}
        return {**super().describe(), **special, "share": self.share}
