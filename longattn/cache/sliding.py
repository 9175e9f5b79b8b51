"""A ring of slots per sequence: the newest tokens, and the first ones."""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.cache.base import Cache, Room, check_int
from longattn.cache.storage import Storage
from longattn.errors import InvalidInput
from longattn.problem import Slots


class SlidingKVCache(Cache):
    """The newest `window` keys and values of each sequence, and its first `sinks`: constant memory, however long.

    Token j lies in slot j if it is a sink, else in slot sinks + (j - sinks) % (window + spare). A call that appends
    more than spare + 1 tokens to a sequence works in memory of the call's size, and leaves a new ring.

    Args:
        batch, kv_heads, head_dim: B, Hkv, D; v_head_dim: Dv, head_dim by default.
        window: newest tokens that a query sees, its own included.
        sinks: first tokens that stay visible.
        positions: where tokens stand in the rotation. "original": in the stream. "cache": in the cache, as in
            StreamingLLM (Xiao et al., arXiv 2309.17453): query p and the window's key j stand p - j apart, query p and
            sink j min(p, window + sinks - 1) - j apart, so that no distance exceeds those of the trained length.
        spare: slots past the window. As many tokens can always be taken back by `truncate`, and one more is appended
            in place.
        dtype: float32, bfloat16, float16, float64 or int8 (see Cache); torch's default by default.
        device: the CPU by default.
    """

    window: int

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        window: int,
        sinks: int = 0,
        positions: str = "original",
        spare: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, v_head_dim, dtype, device)
        for name, value, least in (("window", window, 1), ("sinks", sinks, 0), ("spare", spare, 0)):
            check_int(name, value, least)
        if positions not in ("original", "cache"):
            raise InvalidInput("positions", "'original' or 'cache'", repr(positions))
        self.window, self.sinks, self.spare = window, sinks, spare
        self.cache_positions = positions == "cache"
        self._ring = window + spare
        widths = (self.head_dim, self.v_head_dim)
        self._storage = Storage.empty(batch, kv_heads, sinks + self._ring, widths, self.dtype, self.device)
        self._table = torch.arange(batch, dtype=torch.int32, device=self.device)[:, None]
        self._oldest = [0] * batch  # no token from here on was overwritten, sinks aside

    def _make_room(self, rows: list[int], counts: list[int]) -> Room:
        if max(counts) > self.spare + 1:
            return self._make_long_room(rows, counts)
        self._count(rows, counts)  # at once: what is written there is gone, whatever becomes of the call
        table = self._table if len(rows) == self.batch and rows == sorted(rows) else self._table[rows]
        return Room(Slots(*self._storage, table, self._ring, self.sinks))

    def _make_long_room(self, rows: list[int], counts: list[int]) -> Room:
        """A longer ring, as the new tokens' first queries see keys that the last new tokens would overwrite."""
        ring = self.window - 1 + max(counts)
        room = Storage.like(self._storage, len(rows), self.sinks + ring)
        for page, row in enumerate(rows):
            self._copy(self._storage, row, self._ring, room, page, ring, row, self._lengths[row])
        table = torch.arange(len(rows), dtype=torch.int32, device=self.device)[:, None]

        def finish() -> Storage:
            storage = self._storage.clone()
            for page, (row, count) in enumerate(zip(rows, counts, strict=True)):
                self._copy(room, page, ring, storage, row, self._ring, row, self._lengths[row] + count)
            self._count(rows, counts)
            return storage

        return Room(Slots(*room, table, ring, self.sinks), finish)

    def _count(self, rows: list[int], counts: list[int]) -> None:
        for row, count in zip(rows, counts, strict=True):
            self._oldest[row] = max(self._oldest[row], self._lengths[row] + count - self._ring)

    def _copy(
        self, source: Storage, page: int, ring: int, target: Storage, at: int, at_ring: int, row: int, length: int
    ) -> None:
        """Copy what both rings hold of a sequence of `length` tokens."""
        oldest = max(self._oldest[row], length - min(ring, at_ring))
        held = self._positions(oldest, length)
        rows = source.read(torch.full_like(held, page), self._slots(held, ring))
        target.write(torch.full_like(held, at), self._slots(held, at_ring), rows)

    def _positions(self, oldest: int, length: int) -> Tensor:
        sinks = min(self.sinks, length)
        parts = torch.arange(sinks, device="cpu"), torch.arange(max(oldest, sinks), max(length, sinks), device="cpu")
        return torch.cat(parts).to(self.device)

    def _slots(self, positions: Tensor, ring: int) -> Tensor:
        return torch.where(positions < self.sinks, positions, self.sinks + (positions - self.sinks) % ring)

    def _oldest_held(self, sequence: int) -> int:
        return self._oldest[sequence]

    def _held(self, sequence: int) -> Tensor:
        length = self._lengths[sequence]
        return self._positions(max(self._oldest[sequence], length - self.window), length)

    def _places(self, sequence: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(positions, sequence), self._slots(positions, self._ring)

    def _check_length(self, sequence: int, length: int) -> None:
        super()._check_length(sequence, length)
        oldest = self._oldest[sequence]
        if length > self.sinks and oldest > max(self.sinks, length - self.window + 1):
            least = oldest + self.window - 1
            raise InvalidInput("length", f"at least {least}: older windows were overwritten (see spare)", length)

    def _drop(self, sequence: int, length: int) -> None:
        if length <= self.sinks:
            self._oldest[sequence] = 0

    def _share(self, source: int, target: int, length: int) -> None:
        for part in self._storage:
            if part is not None:
                part[target] = part[source]
        self._oldest[target] = self._oldest[source]
        self._drop(target, length)

    def _permute(self, index: list[int]) -> None:
        self._storage = self._storage.take(torch.tensor(index, device=self.device))
        self._oldest = [self._oldest[sequence] for sequence in index]
