"""Which keys a query may see: one value type, the only description of visibility in the library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longattn.errors import InvalidInput


class KeyRange(NamedTuple):
    """The keys that a tile of queries can see: `[0, sinks) + [start, stop)`.

    Every query of the tile sees every key of `[full_start, full_stop)`, a part of `[start, stop)`; all
    else in the two ranges must be tested key by key. Empty ranges have stop <= start.
    """

    sinks: int
    start: int
    full_start: int
    full_stop: int
    stop: int


@dataclass(frozen=True)
class Mask:
    """A query at position p sees the key at position j exactly if

        (right is None or j <= p + right)  and  (left is None or j >= p - left or j < sinks)

    Query i of Lq stands at position `i + offset`, plus `Lk - Lq` if `from_end` (the last query stands at the last
    of the Lk keys). The tensors that restrict visibility further (key_mask, key_lens, bounds) travel beside the mask.
    """

    left: int | None = None
    right: int | None = None
    sinks: int = 0
    offset: int = 0
    from_end: bool = True

    @classmethod
    def from_window(
        cls,
        *,
        causal: bool = False,
        window: int | tuple[int, int] | None = None,
        sinks: int = 0,
        align: str | int = "end",
    ) -> Mask:
        """The mask of the public keywords.

        `window=W` keeps the W newest keys if causal, else W - 1 on both sides; `window=(l, r)` keeps l keys to the
        left and r to the right, -1 for unbounded. `align` is "end", "start" or the offset itself.

        Raises:
            InvalidInput: for a causal, window, sinks or align outside these meanings.
        """
        if not isinstance(causal, bool):
            raise InvalidInput("causal", "a bool", repr(causal))
        left, right = _window_sides(window)
        if causal:
            right = 0
        if isinstance(sinks, bool) or not isinstance(sinks, (int, torch.SymInt)) or sinks < 0:
            raise InvalidInput("sinks", "an int >= 0", repr(sinks))
        if isinstance(align, str):
            if align not in ("end", "start"):
                raise InvalidInput("align", "'end', 'start', an int or an int tensor [B]", repr(align))
            return cls(left, right, sinks, 0, align == "end")
        if isinstance(align, bool) or not isinstance(align, (int, torch.SymInt)):
            raise InvalidInput("align", "'end', 'start', an int or an int tensor [B]", repr(align))
        return cls(left, right, sinks, align, False)

    def position(self, query: int, lq: int, lk: int) -> int:
        """The position of a query, given the number of queries and of keys of its sequence."""
        return query + self.offset + (lk - lq if self.from_end else 0)

    def allows(self, position: int, key: int) -> bool:
        """Whether a query at `position` may see `key`."""
        return (self.right is None or key <= position + self.right) and (
            self.left is None or key >= position - self.left or key < self.sinks
        )

    def kv_range(self, first: int, last: int, lk: int) -> KeyRange:
        """The keys of `[0, lk)` visible to the queries at positions `first..last` (both included)."""
        stop = lk if self.right is None else max(0, min(lk, last + self.right + 1))
        start = 0 if self.left is None else max(0, min(stop, first - self.left))
        full_start = 0 if self.left is None else max(0, last - self.left)
        full_stop = lk if self.right is None else max(0, min(lk, first + self.right + 1))
        return KeyRange(min(self.sinks, start), start, min(max(full_start, start), stop), full_stop, stop)

    def visible_pairs(self, lq: int, lk: int) -> int:
        """The (query, key) pairs that see each other, counted without looking at each."""
        first = self.position(0, lq, lk)
        pairs = lq * lk if self.right is None else _sum_clamped(first + self.right + 1, lq, lk)
        if self.left is not None:
            pairs -= _sum_clamped(first - self.left, lq, lk)  # keys that are too old
            pairs += _sum_clamped(first - self.left, lq, min(self.sinks, lk))  # but for the sinks among them
        return pairs

    def visible(self, positions: Tensor, keys: Tensor) -> Tensor:
        """`allows` for int tensors that broadcast against each other."""
        visible = torch.ones(torch.broadcast_shapes(positions.shape, keys.shape), dtype=torch.bool, device=keys.device)
        if self.right is not None:
            visible = visible & (keys <= positions + self.right)
        if self.left is not None:
            visible = visible & ((keys >= positions - self.left) | (keys < self.sinks))
        return visible

    def materialize(
        self,
        lq: int,
        lk: int,
        *,
        offset: Tensor | None = None,
        key_mask: Tensor | None = None,
        key_lens: Tensor | None = None,
        bounds: tuple[Tensor, Tensor] | None = None,
        rows: slice | Tensor | None = None,
        keys: slice | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The mask as a bool tensor, True = visible: [1 or B, Lq, Lk], or a part of it. The slow oracle.

        Args:
            offset: int tensor [B], in place of the mask's own offset.
            key_mask: bool [B, Lk], True = visible.
            key_lens: int [B], keys at or past it are hidden; it takes the place of Lk in the alignment.
            bounds: (lo, hi), int [Lq] or [B, Lq]: a query sees keys of [lo, hi) only.
            rows: the queries wanted, a slice or their indices; keys: the keys wanted. None: all.
        """
        rows = slice(None) if rows is None else rows
        keys = slice(None) if keys is None else keys
        j = torch.arange(*_indices(keys, lk), device=device)
        lens = torch.tensor([lk], device=device) if key_lens is None else key_lens.to(torch.int64)
        shift = torch.tensor([self.offset], device=device) if offset is None else offset.to(torch.int64)
        if self.from_end:
            shift = shift + lens - lq
        i = rows if isinstance(rows, Tensor) else torch.arange(*_indices(rows, lq), device=device)
        p = i + shift[:, None]  # [B, rows]
        p = p[:, :, None]
        visible = self.visible(p, j) & (j < lens[:, None, None])
        if key_mask is not None:
            visible = visible & key_mask[:, None, keys]
        if bounds is not None:
            lo, hi = (x if x.dim() == 2 else x[None] for x in bounds)
            visible = visible & (lo[:, rows, None] <= j) & (j < hi[:, rows, None])
        return visible.expand(visible.shape[0], p.shape[1], j.shape[0])


def _indices(part: slice, count: int) -> tuple[int, int, int]:
    """slice.indices, which would make a constant of a symbolic count."""
    return (0, count, 1) if part == slice(None) else part.indices(count)


def _window_sides(window: int | tuple[int, int] | None) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    expected = "None, an int >= 1, or a pair of ints >= -1"
    if isinstance(window, (tuple, list)):
        if len(window) != 2 or any(
            isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)) for side in window
        ):
            raise InvalidInput("window", expected, repr(window))
        left, right = window
        if left < -1 or right < -1:
            raise InvalidInput("window", expected, repr(window))
        return None if left == -1 else left, None if right == -1 else right
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)) or window < 1:
        raise InvalidInput("window", expected, repr(window))
    return window - 1, window - 1


def _sum_clamped(first: int, count: int, high: int) -> int:
    """The sum of min(max(x, 0), high) over x = first, ..., first + count - 1."""

    def below(stop: int) -> int:
        """Of x = 0, ..., stop - 1."""
        rising = min(max(stop, 0), high)
        return rising * (rising - 1) // 2 + high * (max(stop, 0) - rising)

    return below(first + count) - below(first)
