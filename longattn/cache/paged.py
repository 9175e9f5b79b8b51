"""Pages out of one pool, shared where sequences have a beginning in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longattn import ops
from longattn.cache.base import Cache, Room, check_int
from longattn.cache.storage import Storage
from longattn.errors import CacheFull, InvalidInput
from longattn.problem import Slots

_ENTRIES = 1 << 18  # of the table from the start, where a sequence may take more pages; each growth is one more graph


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
        width = min(num_pages, max(8, _ENTRIES // batch))
        self._table = torch.zeros(batch, width, dtype=torch.int32, device=self.device)
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._holders = [0] * num_pages  # sequences that hold each page
        self._free = list(range(num_pages - 1, -1, -1))
        self._changes: list[_Change] = []  # what the last call took
        self._stand_in = ops.stand_in(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._stand_in = ops.stand_in(self)  # a copy has pages of its own

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def _make_room(self, rows: list[int], counts: list[int]) -> Room:
        lengths = [self._lengths[row] for row in rows]
        longest = max([length + count for length, count in zip(lengths, counts, strict=True)])
        pages, width = max(1, -(-longest // self.page_size)), self._table.shape[1]
        if width < pages <= self.num_pages:
            wider = torch.zeros(self.batch, min(2 * pages, self.num_pages), dtype=torch.int32, device=self.device)
            wider[:, :width] = self._table
            self._table = wider
        ops.take_pages(self, self._stand_in, self._table, self._storage, rows, lengths, counts)
        whole = len(rows) == self.batch and rows == sorted(rows)
        table = self._table if whole else self._table[:, :pages][rows]
        return Room(Slots(*self._storage, table), release=self._give_back)

    def take_pages(
        self,
        table: Tensor,
        storage: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        rows: Sequence[int],
        lengths: Sequence[int],
        counts: Sequence[int],
    ) -> None:
        """Give sequence rows[i], of lengths[i] tokens, pages of its own for counts[i] more, or raise CacheFull.

        Args:
            table, storage: those of the cache, or in a graph what stands for them.
        """
        changes: list[_Change] = []
        self._changes = changes
        try:
            for row, length, count in zip(rows, lengths, counts, strict=True):
                if count:
                    self._own_pages(row, length, changes, table, Storage(*storage))
                while len(self._pages[row]) < -(-(length + count) // self.page_size):
                    self._put(row, len(self._pages[row]), changes, table, Storage(*storage))
        except BaseException:
            self._undo(changes, table)
            raise

    def check_pages(
        self,
        table: Tensor,
        storage: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        rows: Sequence[int],
        lengths: Sequence[int],
        counts: Sequence[int],
    ) -> None:
        """Check what the operator of `take_pages` gets, which anyone may call.

        Raises:
            InvalidInput: other tensors than the cache's, or numbers that are not those of its sequences.
            CacheFull: more tokens than the table has room for.
        """
        if table.shape != self._table.shape or table.dtype != self._table.dtype:
            raise InvalidInput("table", f"the table of the cache, {list(self._table.shape)}", f"{list(table.shape)}")
        for own, given in zip(self._storage, storage, strict=True):
            if (own is None) != (given is None) or (own is not None and own.shape != given.shape):  # type: ignore[union-attr]
                raise InvalidInput("storage", "the storage of the cache", "tensors of other shapes")
        if not len(rows) == len(lengths) == len(counts):
            raise InvalidInput("rows", "as many as lengths and counts", f"{len(rows)}")
        room = self._table.shape[1] * self.page_size
        for row, length, count in zip(rows, lengths, counts, strict=True):
            got = f"{count} after {length} in sequence {row}"
            if not 0 <= row < self._table.shape[0] or length < 0 or count < 0:
                raise InvalidInput("counts", "tokens of the cache's sequences", got)
            if length + count > room:
                raise CacheFull("cache", f"at most {room} tokens a sequence", got)

    def _give_back(self) -> None:
        self._undo(self._changes, self._table)

    def _own_pages(self, row: int, length: int, changes: list[_Change], table: Tensor, storage: Storage) -> None:
        """Copies of the pages that hold tokens from `length` on, where other sequences hold them too."""
        for index in range(length // self.page_size, len(self._pages[row])):
            if self._holders[self._pages[row][index]] > 1:
                self._put(row, index, changes, table, storage)

    def _put(self, row: int, index: int, changes: list[_Change], table: Tensor, storage: Storage) -> None:
        """A page from the pool as number `index` of a sequence, with what the page before held."""
        pages = self._pages[row]
        if not self._free:
            raise CacheFull("cache", "a free page for the new tokens", f"{self.num_pages} pages, all in use")
        page, before = self._free[-1], pages[index] if index < len(pages) else None
        if before is not None:
            storage.copy_page(before, page)
        changes.append(_Change(row, index, before))
        self._free.pop()
        self._holders[page] = 1
        table[row, index] = page
        if before is None:
            pages.append(page)
        else:
            pages[index] = page
            self._holders[before] -= 1

    def _undo(self, changes: list[_Change], table: Tensor) -> None:
        while changes:
            row, index, before = changes.pop()
            pages = self._pages[row]
            if before is None:
                self._release(pages.pop())
            else:
                self._release(pages[index])
                pages[index] = before
                self._holders[before] += 1
                table[row, index] = before

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
            self._own_pages(sequence, length, changes, self._table, self._storage)
        except BaseException:
            self._undo(changes, self._table)
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
