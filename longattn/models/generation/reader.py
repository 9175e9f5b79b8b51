"""A model with the caches of its layers: reads more of several sequences and predicts their next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longattn.cache import Cache, PagedKVCache, SlidingKVCache
from longattn.errors import InvalidInput
from longattn.models.decoder import Decoder
from longattn.models.encoder_decoder import EncoderDecoder
from longattn.models.projection import project

__all__ = ["Model", "Reader", "check_model", "make_caches", "placement"]

Model = Decoder | EncoderDecoder

_PAGE_SIZE = 128  # as many as the CPU kernels read at a time
_PROMPT_CHUNK = 4096  # tokens of a prompt that go through the layers at once


@torch.no_grad()
def placement(model: Model) -> tuple[torch.dtype, torch.device]:
    """Return the dtype and the device of what the model's layers read: those of its token embeddings.

    An embedding whose weight is kept elsewhere, as in a model that accelerate offloads, is called for a token to see
    where its output lies.
    """
    embedding = model.embedding
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, Tensor) and not weight.is_meta:
        return weight.dtype, weight.device
    embedded = embedding(torch.zeros(1, 1, dtype=torch.int64, device="cpu"))
    return embedded.dtype, embedded.device


def make_caches(
    model: Model,
    batch: int,
    tokens: int,
    *,
    positions: str | None = None,
    spare: int = 0,
    page_size: int = _PAGE_SIZE,
    dtype: torch.dtype | None = None,
) -> list[Cache]:
    """A cache for each layer: rings for sliding layers, pages for full ones.

    Args:
        model: whose layers.
        batch: sequences.
        tokens: room in the full layers for so many of all sequences together; what sequences share counts once.
        positions, spare: of the rings, as in `longattn.SlidingKVCache`; positions by default as the model's config has
            them.
        page_size: tokens of a page.
        dtype: of the caches; the weights' by default.

    Raises:
        InvalidInput: as the caches; or positions in the cache of a model that rotates nothing.
    """
    config = model.config
    weight_dtype, device = placement(model)
    positions = config.window_positions if positions is None else positions
    if positions == "cache" and config.rope is None:
        raise InvalidInput("positions", f"'original' with positions {config.positions!r} of the model", positions)
    shared: dict[str, Any] = {"dtype": weight_dtype if dtype is None else dtype, "device": device}
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
        model: the decoder, or encoder-decoder.
        caches: of its (decoder's) layers, empty.
        sources: of an encoder-decoder, token ids for each of the first sequences.
    """

    def __init__(self, model: Model, caches: Sequence[Cache], sources: Sequence[list[int]] = ()) -> None:
        self.model = model
        self.caches = caches
        self.dtype, self.device = placement(model)
        self.vocab_size = model.config.vocab_size
        self._sources = sources
        self._memory: list[Cache] = []  # what cross-attention reads, of each layer

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens read of each sequence."""
        return self.caches[0].lengths

    @torch.no_grad()
    def read_prompts(self, prompts: Sequence[list[int]]) -> Tensor:
        """Read the sources, and the first tokens of the first sequences, a piece of all at a time.

        A rope whose frequencies depend on the length takes those of the prompt's length, so that all is read at once.

        Returns:
            logits [prompts, V] of what follows; 0 for a prompt without tokens.
        """
        self._read_sources()
        longest = max(map(len, prompts))
        rope = self.model.config.rope
        at_once = rope is not None and rope.depends_on_length
        chunk = max(1, longest if at_once else _PROMPT_CHUNK)
        last = torch.zeros(len(prompts), self.model.config.dim, dtype=self.dtype, device=self.device)
        for start in range(0, longest, chunk):
            rows = [row for row, prompt in enumerate(prompts) if len(prompt) > start]
            hidden = self._hidden([prompts[row][start : start + chunk] for row in rows], rows)
            for place, row in enumerate(rows):
                if len(prompts[row]) <= start + chunk:
                    last[row] = hidden[place, len(prompts[row]) - start - 1]
        return project(last, self.model.projection)

    @torch.no_grad()
    def read(self, tokens: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
        """Read the next tokens of these sequences: logits [rows, V] of what follows the last of each."""
        hidden = self._hidden(tokens, rows)
        last = torch.tensor([len(part) - 1 for part in tokens], device=self.device)
        return project(hidden[torch.arange(len(rows), device=self.device), last], self.model.projection)

    @torch.no_grad()
    def read_all(self, tokens: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
        """As `read`, with as many tokens for each: logits [rows, T, V] of what follows every one."""
        return project(self._hidden(tokens, rows), self.model.projection)

    def free(self, row: int) -> None:
        for cache in (*self.caches, *self._memory):
            cache.free(row)

    def truncate(self, row: int, length: int) -> None:
        for cache in self.caches:
            cache.truncate(row, length)

    def fork(self, source: int, target: int) -> None:
        for cache in (*self.caches, *self._memory):
            cache.fork(source, target)

    def reorder(self, index: Sequence[int]) -> None:
        for cache in (*self.caches, *self._memory):
            cache.reorder(index)

    def _read_sources(self) -> None:
        """Encode all sources at once; their pages are shared by what is forked from a sequence."""
        if not isinstance(self.model, EncoderDecoder):
            return
        config = self.model.config
        tokens, counts = self._padded(self._sources)
        lens = torch.tensor(counts, dtype=torch.int32, device=self.device)
        memory = self.model.encode(tokens, source_lens=lens)
        pages = sum(-(-count // _PAGE_SIZE) for count in counts)
        self._memory = [
            PagedKVCache(
                self.caches[0].batch,
                config.kv_heads,
                config.head_dim,
                num_pages=pages,
                page_size=_PAGE_SIZE,
                dtype=self.caches[0].dtype,
                device=self.device,
            )
            for _ in range(config.layers)
        ]
        self.model.remember(memory, self._memory, source_lens=counts, sequences=range(len(counts)))

    def _hidden(self, tokens: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
        """[rows, T, C], T tokens of the longest."""
        padded, counts = self._padded(tokens)
        call: dict[str, Any] = {
            "caches": self.caches,
            "lengths": None if min(counts) == max(counts) else counts,
            "sequences": None if len(rows) == self.caches[0].batch else rows,
        }
        if isinstance(self.model, EncoderDecoder):
            return self.model.decode(padded, memory_caches=self._memory, **call)
        return self.model.hidden_states(padded, **call)

    def _padded(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        """Tokens [rows, T] of the longest, and how many each has."""
        counts = [len(part) for part in tokens]
        padded = torch.zeros(len(counts), max(counts), dtype=torch.int64, device="cpu")
        for place, part in enumerate(tokens):
            padded[place, : len(part)] = torch.as_tensor(part, device="cpu")
        return padded.to(self.device), counts


def check_model(name: str, model: Model) -> None:
    if not isinstance(model, Model):
        raise InvalidInput(name, "a longattn.models.Decoder or EncoderDecoder", type(model).__name__)
    if model.training:
        raise InvalidInput(name, "a model in eval mode (see Module.eval)", "one in training mode")
