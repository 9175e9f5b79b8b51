"""The memory of a cache: pages of slots, one key and one value per slot and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Storage(NamedTuple):
    """What slots hold. P pages of S slots for each of Hkv heads."""

    k: Tensor  # [P, Hkv, S, D], contiguous
    v: Tensor  # [P, Hkv, S, Dv]
    k_scales: Tensor | None  # float32 [P, Hkv, S]: what int8 numbers are multiples of
    v_scales: Tensor | None

    @classmethod
    def empty(
        cls, pages: int, kv_heads: int, slots: int, widths: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Storage:
        shape = (pages, kv_heads, slots)
        k, v = (torch.empty(*shape, width, dtype=dtype, device=device) for width in widths)
        if dtype != torch.int8:
            return cls(k, v, None, None)
        k_scales, v_scales = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
        return cls(k, v, k_scales, v_scales)

    @classmethod
    def like(cls, other: Storage, pages: int, slots: int) -> Storage:
        """Empty storage of the same heads, widths and dtype."""
        widths = (other.k.shape[3], other.v.shape[3])
        return cls.empty(pages, other.k.shape[1], slots, widths, other.k.dtype, other.k.device)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self if part is not None)

    def clone(self) -> Storage:
        return self._map(Tensor.clone)

    def take(self, pages: Tensor) -> Storage:
        """These pages, copied."""
        return self._map(lambda part: part[pages])

    def read(self, pages: Tensor, slots: Tensor) -> list[Tensor | None]:
        """What these slots hold, as `write` takes it: each [slots, Hkv] or [slots, Hkv, width]."""
        return [None if part is None else part[pages, :, slots] for part in self]

    def write(self, pages: Tensor, slots: Tensor, rows: list[Tensor | None]) -> None:
        for part, values in zip(self, rows, strict=True):
            if part is not None and values is not None:
                part[pages, :, slots] = values

    def _map(self, f: Callable[[Tensor], Tensor]) -> Storage:
        k_scales, v_scales = (None if part is None else f(part) for part in (self.k_scales, self.v_scales))
        return Storage(f(self.k), f(self.v), k_scales, v_scales)

    def copy_page(self, source: int, target: int) -> None:
        for part in self:
            if part is not None:
                part[target] = part[source]
