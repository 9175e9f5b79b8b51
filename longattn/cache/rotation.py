"""How the keys of a cache rotate: before they are stored, or whenever they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.arguments import CacheShape, Rotation
from longattn.rope import Rope


class Rotations:
    """Rotations of one cache. Tables of cos and sin are kept for the next call."""

    def __init__(self) -> None:
        self._inv_freq: Tensor | None = None  # of the tables
        self._tables: tuple[Tensor, Tensor] | None = None

    def of(
        self, shape: CacheShape, rope: Rope | None, lengths: list[int], new: int, dtype: torch.dtype
    ) -> Rotation | None:
        """The rotation of a call after which the sequences are `lengths` long, `new` tokens of them at most new.

        Args:
            dtype: of the tables.
        """
        if rope is None:
            return None
        if shape.cache_positions:
            assert shape.window is not None
            places = shape.window + shape.sinks  # the context, whatever came before
            inv_freq, factor = rope.frequencies(places, shape.device)
            rows = max(shape.window + new - 1, places)
            return Rotation(rope, inv_freq, factor, *self._kept(inv_freq, factor, rows, dtype))
        if not rope.depends_on_length:
            return Rotation(rope, *rope.frequencies(1, shape.device), None, None)
        longest = max(lengths)
        found = [rope.frequencies(max(1, length), shape.device) for length in lengths]
        inv_freq, factor = found[0]
        if all(other is inv_freq for other, _ in found):
            return Rotation(rope, inv_freq, factor, *self._kept(inv_freq, factor, longest, dtype))
        inv_freq = torch.stack([other for other, _ in found])
        return Rotation(rope, inv_freq, factor, *_tables(inv_freq, factor, longest, dtype))

    def _kept(self, inv_freq: Tensor, factor: float, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        tables = self._tables
        if tables is None or self._inv_freq is not inv_freq or tables[0].dtype != dtype or tables[0].shape[1] < rows:
            grown = 1 << max(0, rows - 1).bit_length()
            self._tables = tables = _tables(inv_freq[None], factor, grown, dtype)
            self._inv_freq = inv_freq
        return tables


def _tables(inv_freq: Tensor, factor: float, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0..rows - 1, times factor: [B, rows, width / 2] for inv_freq [B, width / 2]."""
    positions = torch.arange(rows, dtype=torch.float32, device=inv_freq.device)
    angle = (positions[:, None] * inv_freq[:, None]).to(dtype)
    return angle.cos() * factor, angle.sin() * factor
