"""A cache that is a plain tensor, or pages of one: what flash_attn_with_kvcache writes and reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longattn.compat.errors import described
from longattn.compat.flash_attn.checks import DENSE, PAGES, check_axes, check_contents, check_indices, check_sequences
from longattn.compat.flash_attn.packing import token_places
from longattn.errors import InvalidInput


class Cache(NamedTuple):
    """Keys and values of a batch, in rows [batch_cache, seqlen, nheads_k, headdim] or in pages."""

    k: Tensor
    v: Tensor
    rows: Tensor | None  # int [batch], each sequence's row; None: 0, 1, ...
    block_table: Tensor | None  # int [batch, max_blocks], each sequence's pages

    @classmethod
    def checked(
        cls, k: Tensor, v: Tensor, rows: Tensor | None, block_table: Tensor | None, batch: int, device: torch.device
    ) -> Cache:
        """The cache of flash_attn_with_kvcache's arguments for `batch` sequences."""
        axes = DENSE if block_table is None else PAGES
        check_axes("k_cache", k, axes)
        check_axes("v_cache", v, axes)
        if block_table is not None:
            if rows is not None:
                raise InvalidInput("cache_batch_idx", "None beside block_table", described(rows))
            _check_block_table(block_table, batch, k)
        elif rows is not None:
            check_indices("cache_batch_idx", rows, (batch,), device)
            check_contents("cache_batch_idx", rows, 0, k.shape[0] - 1, "rows of the cache")
        elif k.shape[0] < batch:
            raise InvalidInput("k_cache", f"at least {batch} rows, as q has sequences", described(k))
        return cls(k, v, rows, block_table)

    @property
    def capacity(self) -> int:
        """Tokens that one sequence can have."""
        return self.k.shape[1] * (1 if self.block_table is None else self.block_table.shape[1])

    def write(self, k: Tensor, v: Tensor, starts: Tensor) -> None:
        """Put k and v [batch, n, nheads_k, headdim] at each sequence's places starts..starts + n - 1."""
        batch, n = k.shape[:2]
        place = starts[:, None] + torch.arange(n, device=k.device)
        if self.block_table is not None:
            size = self.k.shape[1]
            row = self.block_table.gather(1, (place // size).to(torch.int64))
            _check_pages(row, self.k)
            place = place % size
        else:
            row = torch.arange(batch, device=k.device) if self.rows is None else self.rows
            row = row[:, None].expand(-1, n)
        self.k[row, place] = k
        self.v[row, place] = v

    def read(self, batch: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """k and v [batch, at least the longest of lengths, nheads_k, headdim]; views where rows are in order."""
        if self.block_table is None:
            if self.rows is None:
                return self.k[:batch], self.v[:batch]
            return self.k[self.rows], self.v[self.rows]
        pages = self.block_table
        if lengths is not None:
            size = self.k.shape[1]
            longest = int(lengths.max()) if batch else 0
            pages = pages[:, : (longest + size - 1) // size]
            # Entries past a sequence's last page are never read, whatever they hold.
            used = torch.arange(pages.shape[1], device=pages.device) * size < lengths[:, None]
            pages = torch.where(used, pages, 0)
        _check_pages(pages, self.k)
        return self.k[pages].flatten(1, 2), self.v[pages].flatten(1, 2)


def packed_from_pages(k: Tensor, v: Tensor, block_table: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of flash_attn_varlen_func's pages k and v [blocks, block_size, nheads_k, headdim], packed.

    Returns:
        k and v [tokens, nheads_k, headdim], and cu_seqlens from 0 on.
    """
    check_sequences("cu_seqlens_k", cu_seqlens, k.device)
    _check_block_table(block_table, cu_seqlens.shape[0] - 1, k)
    capacity = k.shape[1] * block_table.shape[1]
    check_contents("cu_seqlens_k", cu_seqlens.diff(), 0, capacity, "lengths up to the capacity of block_table")
    cu_seqlens = cu_seqlens - cu_seqlens[0]
    sequence, place, _ = token_places(cu_seqlens, int(cu_seqlens[-1]))
    page = block_table[sequence, place // k.shape[1]]
    _check_pages(page, k)
    place = place % k.shape[1]
    return k[page, place], v[page, place], cu_seqlens


def _check_block_table(block_table: Tensor, batch: int, pages: Tensor) -> None:
    check_axes("block_table", block_table, (batch, "max_blocks"))
    check_indices("block_table", block_table, tuple(block_table.shape), pages.device)


def _check_pages(entries: Tensor, pages: Tensor) -> None:
    check_contents("block_table", entries, 0, pages.shape[0] - 1, "pages, as far as lengths reach")
