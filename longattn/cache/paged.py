"""Pages out of one pool, shared where sequences have a beginning in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longattn.cache.base import Cache, Room, check_int
from longattn.cache.storage import Storage
from longattn.errors import CacheFull
from longattn.problem import Slots


class _Change(NamedTuple):
    """A page that a sequence got, at `place` of its list, instead of `before` or at the end."""

    sequence: int
    place: int
    before: int | None


class PagedKVCache(Cache):
    """Keys and values in pages that sequences take from a pool as they grow (Kwon et al., arXiv 2309.06180).

    `fork` shares pages; who appends to a page that others hold too gets a copy of it first. A call for which the pool
    has too few pages raises CacheFull.

    Args:
        batch, kv_heads, head_dim: B, Hkv, D; v_head_dim: Dv, head_dim by default.
        num_pages: of the pool; page_size: tokens of a page.
        dtype: float32, bfloat16, float16, float64 or int8 (see Cache); torch's default by default.
        device: the CPU by default.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, v_head_dim, dtype, device)
        check_int("num_pages", num_pages, 1)
        check_int("page_size", page_size, 1)
        self.num_pages, self.page_size = num_pages, page_size
        widths = (self.head_dim, self.v_head_dim)
        self._storage = Storage.empty(num_pages, kv_heads, page_size, widths, self.dtype, self.device)
        self._table = torch.zeros(batch, 1, dtype=torch.int32, device=self.device)
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._holders = [0] * num_pages  # sequences that hold each page
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def _make_room(self, rows: list[int], counts: list[int]) -> Room:
        changes: list[_Change] = []
        needed = [-(-(self._lengths[row] + count) // self.page_size) for row, count in zip(rows, counts, strict=True)]
        try:
            for row, count, pages in zip(rows, counts, needed, strict=True):
                if count:
                    self._own_pages(row, self._lengths[row], changes)
                while len(self._pages[row]) < pages:
                    self._put(row, len(self._pages[row]), changes)
        except BaseException:
            self._undo(changes)
            raise
        table = self._table if len(rows) == self.batch and rows == sorted(rows) else self._table[rows]
        return Room(Slots(*self._storage, table), release=lambda: self._undo(changes))

    def _own_pages(self, row: int, length: int, changes: list[_Change]) -> None:
        """Copies of the pages that hold tokens from `length` on, where other sequences hold them too."""
        for index in range(length // self.page_size, len(self._pages[row])):
            if self._holders[self._pages[row][index]] > 1:
                self._put(row, index, changes)

    def _put(self, row: int, index: int, changes: list[_Change]) -> None:
        """A page from the pool as number `index` of a sequence, with what the page before held."""
        pages = self._pages[row]
        if not self._free:
            raise CacheFull("cache", "a free page for the new tokens", f"{self.num_pages} pages, all in use")
        page, before = self._free[-1], pages[index] if index < len(pages) else None
        if before is not None:
            self._storage.copy_page(before, page)
        if index >= self._table.shape[1]:
            wider = torch.zeros(self.batch, min(2 * index, self.num_pages), dtype=torch.int32, device=self.device)
            wider[:, : self._table.shape[1]] = self._table
            self._table = wider
        changes.append(_Change(row, index, before))
        self._free.pop()
        self._holders[page] = 1
        self._table[row, index] = page
        if before is None:
            pages.append(page)
        else:
            pages[index] = page
            self._holders[before] -= 1

    def _undo(self, changes: list[_Change]) -> None:
        while changes:
            row, index, before = changes.pop()
            pages = self._pages[row]
            if before is None:
                self._release(pages.pop())
            else:
                self._release(pages[index])
                pages[index] = before
                self._holders[before] += 1
                self._table[row, index] = before

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)

    def _places(self, sequence: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._table[sequence, positions // self.page_size].long(), positions % self.page_size

    def _drop(self, sequence: int, length: int) -> None:
        pages = self._pages[sequence]
        while len(pages) > -(-length // self.page_size):
            self._release(pages.pop())

    def _share(self, source: int, target: int, length: int) -> None:
        held = self._pages[source][: -(-length // self.page_size)]
        for page in held:
            self._holders[page] += 1
        self._pages[target] = held
        self._table[target] = self._table[source]

    def _make_own(self, sequence: int, length: int) -> None:
        changes: list[_Change] = []
        try:
            self._own_pages(sequence, length, changes)
        except BaseException:
            self._undo(changes)
            raise

    def _permute(self, index: list[int]) -> None:
        pages = [self._pages[sequence].copy() for sequence in index]
        for held in pages:
            for page in held:
                self._holders[page] += 1
        for held in self._pages:
            for page in held:
                self._release(page)
        self._pages = pages
        self._table = self._table[index]
