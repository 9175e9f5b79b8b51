"""Who sees whose keys: the attention of a ring of ranks, without its data."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

from longattn.distributed.spans import Span, spans_of, union, without
from longattn.mask import Mask


@dataclass(frozen=True)
class Geometry:
    """
    Args:
        mask: query i of nq stands at i + mask.offset; in packed documents both count in their document.
        nq, nk: queries and keys of all ranks together.
        layout, ranks: of the ring.
        starts: where each packed document starts and the last ends; none sees another. None: not packed.
        movable: where queries stand is not known here.
    """

    mask: Mask
    nq: int
    nk: int
    layout: str
    ranks: int
    starts: tuple[int, ...] | None = None
    movable: bool = False

    def queries_of(self, rank: int) -> list[Span]:
        return spans_of(self.layout, self.ranks, rank, self.nq // self.ranks)

    def keys_of(self, rank: int) -> list[Span]:
        return spans_of(self.layout, self.ranks, rank, self.nk // self.ranks)

    def seen_by(self, queries: Span) -> list[Span]:
        """Keys of which these queries may see some, in ascending spans."""
        if self.movable:
            return [Span(0, self.nk)]
        found = []
        for mine, keys in self.documents(queries):
            first = mine.start - keys.start + self.mask.offset
            seen = self.mask.kv_range(first, first + mine.length - 1, keys.length)
            found += [Span(keys.start, keys.start + seen.sinks), Span(keys.start + seen.start, keys.start + seen.stop)]
        return union(found)

    def rows_that_see(self, queries: Span, keys: Span, document: Span) -> Span:
        """Those of the queries that may see some of the keys, all of one document, as far as they are neighbours."""
        first, last = queries
        if not self.movable:
            if self.mask.right is not None:
                first = max(first, keys.start - self.mask.right - self.mask.offset)
            if self.mask.left is not None and keys.start - document.start >= self.mask.sinks:
                last = min(last, keys.stop + self.mask.left - self.mask.offset)
        return Span(first, last)

    def visible_pairs(self, queries: Span) -> int:
        """The (query, key) pairs of these queries that see each other."""
        pairs, mask = 0, self.mask
        for mine, keys in self.documents(queries):
            first = mine.start - keys.start + mask.offset
            moved = Mask(mask.left, mask.right, mask.sinks, first, from_end=False)
            pairs += moved.visible_pairs(mine.length, keys.length)
        return pairs

    def documents(self, queries: Span) -> list[tuple[Span, Span]]:
        """Of each document of these queries: (those that are of it, its keys)."""
        if self.starts is None:
            return [(queries, Span(0, self.nk))]
        found = [(queries.cut(document), document) for document in map(self.document, range(*self.numbers(queries)))]
        return [(mine, document) for mine, document in found if mine.length]

    def document(self, number: int) -> Span:
        assert self.starts is not None
        return Span(self.starts[number], self.starts[number + 1])

    def numbers(self, tokens: Span) -> Span:
        """The numbers of the documents that these tokens are of, or stand between."""
        assert self.starts is not None
        last = len(self.starts) - 1
        return Span(
            max(0, bisect_right(self.starts, tokens.start) - 1), min(last, bisect_right(self.starts, tokens.stop - 1))
        )


@lru_cache(maxsize=64)
def hops(geometry: Geometry) -> tuple[int, ...]:
    """How far each rank's keys travel around the ring until nobody further on sees them."""
    ranks = range(geometry.ranks)
    seen = [
        union(span for queries in geometry.queries_of(rank) for span in geometry.seen_by(queries)) for rank in ranks
    ]

    def is_seen(source: int, rank: int) -> bool:
        return any(span.cut(keys).length for keys in geometry.keys_of(source) for span in seen[rank])

    return tuple(
        next((step for step in reversed(ranks[1:]) if is_seen(source, (source + step) % geometry.ranks)), 0)
        for source in ranks
    )


def broadcast_sinks(geometry: Geometry) -> Span:
    """The keys that all ranks of a halo exchange get in one broadcast: the sinks, if the first rank holds them all."""
    mask = geometry.mask
    whole = mask.left is not None and geometry.starts is None and not geometry.movable
    return Span(0, mask.sinks) if whole and mask.sinks <= geometry.keys_of(0)[0].length else Span(0, 0)


@lru_cache(maxsize=4096)
def halo(geometry: Geometry, source: int, to: int) -> tuple[Span, ...]:
    """The keys that one rank sends to another: those that the other sees, but for the sinks that are broadcast."""
    seen = union(span for queries in geometry.queries_of(to) for span in geometry.seen_by(queries))
    seen = without(seen, [broadcast_sinks(geometry)])
    cut = [span.cut(keys) for keys in geometry.keys_of(source) for span in seen]
    return tuple(span for span in cut if span.length)


@lru_cache(maxsize=64)
def imbalance(geometry: Geometry) -> float:
    """The pairs that the busiest rank computes, over the mean."""
    work = [sum(map(geometry.visible_pairs, geometry.queries_of(rank))) for rank in range(geometry.ranks)]
    return max(work) * len(work) / max(1, sum(work))
