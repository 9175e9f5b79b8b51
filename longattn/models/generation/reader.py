"""A decoder with the caches of its layers: reads more of several sequences and predicts their next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longattn.cache import Cache, PagedKVCache, SlidingKVCache
from longattn.errors import InvalidInput
from longattn.models.decoder import Decoder

__all__ = ["Reader", "make_caches"]

_PAGE_SIZE = 64
_PROMPT_CHUNK = 2048  # tokens of a prompt that go through the layers at once


def make_caches(
    model: Decoder,
    batch: int,
    tokens: int,
    *,
    positions: str = "original",
    spare: int = 0,
    page_size: int = _PAGE_SIZE,
    dtype: torch.dtype | None = None,
) -> list[Cache]:
    """A cache for each layer: rings for sliding layers, pages for full ones.

    Args:
        model: whose layers.
        batch: sequences.
        tokens: room in the full layers for so many of all sequences together; what sequences share counts once.
        positions, spare: of the rings, as in `longattn.SlidingKVCache`.
        page_size: tokens of a page.
        dtype: of the caches; the weights' by default.

    Raises:
        InvalidInput: as the caches.
    """
    config, weight = model.config, model.output_weight
    shared: dict[str, Any] = {"dtype": weight.dtype if dtype is None else dtype, "device": weight.device}
    shape = (batch, config.kv_heads, config.head_dim)
    pages = -(-tokens // page_size) + batch  # the last page of each need not be full
    caches: list[Cache] = []
    for layer in range(config.layers):
        if config.is_sliding(layer) and config.window is not None:
            caches.append(
                SlidingKVCache(
                    *shape, window=config.window, sinks=config.sinks, positions=positions, spare=spare, **shared
                )
            )
        else:
            caches.append(PagedKVCache(*shape, num_pages=pages, page_size=page_size, **shared))
    return caches


class Reader:
    """A model in eval mode, and what it has read of each sequence.

    Args:
        model: the decoder.
        caches: of its layers, empty.
    """

    def __init__(self, model: Decoder, caches: Sequence[Cache]) -> None:
        self.model = model
        self.caches = caches
        self.device = model.output_weight.device
        self.vocab_size = model.config.vocab_size

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens read of each sequence."""
        return self.caches[0].lengths

    @torch.no_grad()
    def read_prompts(self, prompts: Sequence[list[int]]) -> Tensor:
        """Read the first tokens of the first sequences, a piece of all at a time.

        A rope whose frequencies depend on the length takes those of the prompt's length, so that all is read at once.

        Returns:
            logits [prompts, V] of what follows; 0 for a prompt without tokens.
        """
        longest = max(map(len, prompts))
        rope = self.model.config.rope
        assert rope is not None
        chunk = max(1, longest if rope.depends_on_length else _PROMPT_CHUNK)
        weight = self.model.output_weight
        last = torch.zeros(len(prompts), weight.shape[1], dtype=weight.dtype, device=self.device)
        for start in range(0, longest, chunk):
            rows = [row for row, prompt in enumerate(prompts) if len(prompt) > start]
            hidden = self._hidden([prompts[row][start : start + chunk] for row in rows], rows)
            for place, row in enumerate(rows):
                if len(prompts[row]) <= start + chunk:
                    last[row] = hidden[place, len(prompts[row]) - start - 1]
        return F.linear(last, weight)

    @torch.no_grad()
    def read(self, tokens: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
        """Read the next tokens of these sequences: logits [rows, V] of what follows the last of each."""
        hidden = self._hidden(tokens, rows)
        last = torch.tensor([len(part) - 1 for part in tokens], device=self.device)
        return F.linear(hidden[torch.arange(len(rows), device=self.device), last], self.model.output_weight)

    @torch.no_grad()
    def read_all(self, tokens: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
        """As `read`, with as many tokens for each: logits [rows, T, V] of what follows every one."""
        return F.linear(self._hidden(tokens, rows), self.model.output_weight)

    def free(self, row: int) -> None:
        for cache in self.caches:
            cache.free(row)

    def truncate(self, row: int, length: int) -> None:
        for cache in self.caches:
            cache.truncate(row, length)

    def fork(self, source: int, target: int) -> None:
        for cache in self.caches:
            cache.fork(source, target)

    def reorder(self, index: Sequence[int]) -> None:
        for cache in self.caches:
            cache.reorder(index)

    def _hidden(self, tokens: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
        """[rows, T, C], T tokens of the longest."""
        counts = [len(part) for part in tokens]
        padded = torch.zeros(len(counts), max(counts), dtype=torch.int64)
        for place, part in enumerate(tokens):
            padded[place, : len(part)] = torch.as_tensor(part)
        everyone = len(rows) == self.caches[0].batch
        return self.model.hidden_states(
            padded.to(self.device),
            caches=self.caches,
            lengths=None if min(counts) == max(counts) else counts,
            sequences=None if everyone else rows,
        )


def check_model(name: str, model: Decoder) -> None:
    if not isinstance(model, Decoder):
        raise InvalidInput(name, "a longattn.models.Decoder", type(model).__name__)
    if model.config.rope is None:
        raise InvalidInput(name, "a model with rotary positions", f"positions {model.config.positions!r}")
    if model.training:
        raise InvalidInput(name, "a model in eval mode (see Module.eval)", "one in training mode")
