"""Where in the whole sequence the tokens of each rank stand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from longattn.errors import InvalidInput

LAYOUTS = ("contiguous", "zigzag")


class Span(NamedTuple):
    """Tokens start, start + 1, .., stop - 1 of the whole sequence; empty if stop <= start."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return max(0, self.stop - self.start)

    def cut(self, other: Span) -> Span:
        """What both hold."""
        return Span(max(self.start, other.start), min(self.stop, other.stop))

    def holds(self, other: Span) -> bool:
        return self.start <= other.start and other.stop <= self.stop


def spans_of(layout: str, ranks: int, rank: int, tokens: int) -> list[Span]:
    """What a rank of a ring holds, in the order in which it holds it.

    contiguous: the tokens are cut into a part a rank. zigzag: into two, of which rank r holds parts r and
    2 ranks - 1 - r, so that under a causal mask all have the same work (Zhu, ring-flash-attention, 2024).

    Args:
        tokens: of one rank, even for zigzag.
    """
    if layout == "contiguous":
        return [Span(rank * tokens, (rank + 1) * tokens)]
    half = tokens // 2
    return [Span(part * half, (part + 1) * half) for part in (rank, 2 * ranks - 1 - rank)]


def union(spans: Iterable[Span]) -> list[Span]:
    """The same tokens in ascending spans that do not touch each other."""
    found: list[Span] = []
    for span in sorted(span for span in spans if span.length):
        if found and span.start <= found[-1].stop:
            found[-1] = Span(found[-1].start, max(found[-1].stop, span.stop))
        else:
            found.append(span)
    return found


def without(spans: Iterable[Span], others: Iterable[Span]) -> list[Span]:
    """The tokens of `spans` that are not in `others`, in ascending spans."""
    left = union(spans)
    for other in others:
        cut = [
            (Span(span.start, min(span.stop, other.start)), Span(max(span.start, other.stop), span.stop))
            for span in left
        ]
        left = [part for pair in cut for part in pair if part.length]
    return left


def check_layout(layout: object) -> None:
    if layout not in LAYOUTS:
        raise InvalidInput("layout", f"one of {', '.join(map(repr, LAYOUTS))}", repr(layout))
