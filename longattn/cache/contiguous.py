"""One run of slots per sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.cache.base import Cache, Room, check_int
from longattn.cache.storage import Storage
from longattn.errors import CacheFull
from longattn.problem import Slots

_LEAST = 64  # slots of a cache that grows


class KVCache(Cache):
    """All keys and values of each sequence, side by side.

    Args:
        batch, kv_heads, head_dim: B, Hkv, D; v_head_dim: Dv, head_dim by default.
        capacity: tokens of a sequence, allocated at once; a call that needs more raises CacheFull. None: the slots of
            all sequences double whenever the longest outgrows them.
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
        capacity: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, v_head_dim, dtype, device)
        if capacity is not None:
            check_int("capacity", capacity, 1)
        self.capacity = capacity
        widths = (self.head_dim, self.v_head_dim)
        self._storage = Storage.empty(batch, kv_heads, capacity or _LEAST, widths, self.dtype, self.device)
        self._table = torch.arange(batch, dtype=torch.int32, device=self.device)[:, None]

    def _make_room(self, rows: list[int], counts: list[int]) -> Room:
        longest = max([self._lengths[row] + count for row, count in zip(rows, counts, strict=True)])
        slots = self._storage.k.shape[2]
        if longest > slots:
            if self.capacity is not None:
                raise CacheFull("cache", f"at most {self.capacity} tokens, its capacity", longest)
            self._grow(max(longest, 2 * slots))
        table = self._table if len(rows) == self.batch and rows == sorted(rows) else self._table[rows]
        return Room(Slots(*self._storage, table))

    def _grow(self, slots: int) -> None:
        used = max(self._lengths)
        grown = Storage.like(self._storage, self.batch, slots)
        for old, new in zip(self._storage, grown, strict=True):
            if old is not None and new is not None:
                new[:, :, :used] = old[:, :, :used]
        self._storage = grown

    def _places(self, sequence: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(positions, sequence), positions

    def _share(self, source: int, target: int, length: int) -> None:
        for part in self._storage:
            if part is not None:
                part[target, :, :length] = part[source, :, :length]

    def _permute(self, index: list[int]) -> None:
        self._storage = self._storage.take(torch.tensor(index, device=self.device))
