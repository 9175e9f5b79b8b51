"""The attention that all ranks of a ring compute together, and the blocks of it that one call can compute.

A block is what some neighbouring queries owe to some neighbouring keys: one call of `longattn.ops`, whose mask says
where its queries stand beside its keys, and whose origin says where dropout counts from. With the lse and output of
the whole, the gradients of its blocks sum to those of the whole (Dao et al., "FlashAttention", 2022, appendix B).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longattn import ops
from longattn.backends import registry
from longattn.backends.base import Gradients
from longattn.distributed.geometry import Geometry
from longattn.distributed.spans import Span
from longattn.mask import Mask
from longattn.problem import Origin, Problem, Tensors, present_features


class Keys(NamedTuple):
    """Neighbouring keys and values."""

    span: Span
    k: Tensor  # [B, Hkv, keys, D]
    v: Tensor  # [B, Hkv, keys, Dv]
    key_mask: Tensor | None  # bool [B, keys]

    def cut(self, span: Span) -> Keys:
        rows = slice(span.start - self.span.start, span.stop - self.span.start)
        mask = None if self.key_mask is None else self.key_mask[:, rows]
        return Keys(span, self.k[:, :, rows], self.v[:, :, rows], mask)


class Block(NamedTuple):
    """What to compute of a span of queries against a span of keys, both within one or several documents."""

    queries: Span
    keys: Span
    mask: Mask
    origin: Origin
    documents: Span | None  # of which the block is; None: not packed
    packed: bool  # they are several: queries and keys are the same tokens


@dataclass(frozen=True)
class Whole:
    """
    Args:
        problem: of this rank's queries against its own keys; its mask is not looked at.
        geometry: of the whole.
        rank: this one, of the ring.
        tensors: what blocks read beside q, k and v, which are empty. key_lens, offset, lo and hi count in the whole; lo
            and hi are those of this rank's queries, key_mask of its keys.
        first_head: the number of this rank's first query head.
        backend: as in `longattn.attention`.
    """

    problem: Problem
    geometry: Geometry
    rank: int
    tensors: Tensors
    first_head: int = 0
    backend: str = "auto"

    def blocks(self, queries: Span, keys: Span) -> Iterator[Block]:
        """The blocks of these queries and keys: spans of a rank each, or a part of one."""
        geometry = self.geometry
        if not any(span.cut(keys).length for span in geometry.seen_by(queries)):
            return
        starts = geometry.starts
        if starts is None:
            rows = geometry.rows_that_see(queries, keys, Span(0, geometry.nk))
            if rows.length:
                yield self._block(rows, keys, Span(0, 0), 0, None)
            return
        documents = geometry.numbers(queries)
        if queries == keys:  # all else has at most one document in common
            if starts[documents.start] < queries.start or documents.length == 1:
                yield from self._of_document(documents.start, queries, keys)
                documents = Span(documents.start + 1, documents.stop)
            if documents.length == 1:
                yield from self._of_document(documents.start, queries, keys)
            elif documents.length:
                rows = Span(starts[documents.start], min(queries.stop, starts[documents.stop]))
                mask = self._mask(0, 0)
                yield Block(rows, rows, mask, Origin(documents.start, self.first_head, 0, 0), documents, packed=True)
            return
        for document in range(documents.start, documents.stop):
            yield from self._of_document(document, queries, keys)

    def forward(self, block: Block, q: Tensor, held: Keys) -> tuple[Tensor, Tensor]:
        """(out, lse) of the block's queries q [B, Hq, rows, D], among its keys alone."""
        tensors, problem, backend = self._call(block, q, held)
        return ops.attention(tensors, problem, backend)

    def backward(
        self,
        block: Block,
        q: Tensor,
        held: Keys,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        slopes: bool,
    ) -> Gradients:
        """The block's part of the gradients, by the results over all keys of its queries."""
        tensors, problem, backend = self._call(block, q, held)
        wanted = [True, True, True, False, slopes, False]
        return ops.attention_backward(tensors, problem, backend, out, lse, dout, dlse, wanted)

    def slopes_rows(self, block: Block) -> slice:
        """Which rows of alibi_slopes [B, Hq] the block reads."""
        return slice(None) if block.documents is None else slice(*block.documents)

    def _call(self, block: Block, q: Tensor, held: Keys) -> tuple[Tensors, Problem, str]:
        held, whole = held.cut(block.keys), self.tensors
        mine = self.local(block.queries)
        slopes = whole.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[self.slopes_rows(block)]
        cu_seqlens = longest = None
        if block.packed:
            assert block.documents is not None and self.geometry.starts is not None
            starts = self.geometry.starts[block.documents.start : block.documents.stop + 1]
            ends = [min(start, block.queries.stop) - block.queries.start for start in starts]
            cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=q.device)
            longest = max(stop - start for start, stop in zip(ends, ends[1:], strict=False))
        # No key is before 0: a bound far below would wrap around.
        lo, hi = (None if x is None else x[..., mine].clamp(min=0) - block.keys.start for x in (whole.lo, whole.hi))
        first = block.queries.start - block.keys.start
        tensors = Tensors(
            q,
            held.k,
            held.v,
            key_mask=held.key_mask,
            key_lens=None
            if whole.key_lens is None
            else (whole.key_lens - block.keys.start).clamp(0, block.keys.length),
            lo=lo,
            hi=hi,
            offset=None if whole.offset is None else whole.offset + first,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            alibi_slopes=slopes,
            seed=whole.seed,
        )
        problem = self.problem._replace(
            batch=len(cu_seqlens) - 1 if cu_seqlens is not None else q.shape[0],
            nq=block.queries.length,
            nk=block.keys.length,
            mask=block.mask,
            origin=block.origin,
            max_seqlen_q=longest or 0,
            max_seqlen_k=longest or 0,
            features=present_features(tensors, self.problem.softcap, self.problem.dropout_p, block.origin),
        )
        return tensors, problem, registry.select(problem, self.backend).name

    def local(self, queries: Span) -> slice:
        """Where this rank holds these queries."""
        start = 0
        for span in self.geometry.queries_of(self.rank):
            if span.holds(queries):
                return slice(start + queries.start - span.start, start + queries.stop - span.start)
            start += span.length
        raise AssertionError(f"{queries} is not of rank {self.rank}")

    def _mask(self, query: int, key: int, sinks_from: int = 0) -> Mask:
        mask = self.geometry.mask
        return Mask(mask.left, mask.right, max(0, mask.sinks - sinks_from), mask.offset + query - key, from_end=False)

    def _block(self, rows: Span, keys: Span, document: Span, number: int, documents: Span | None) -> Block:
        query, key = rows.start - document.start, keys.start - document.start
        origin = Origin(number, self.first_head, query, key)
        return Block(rows, keys, self._mask(query, key, key), origin, documents, packed=False)

    def _of_document(self, number: int, queries: Span, keys: Span) -> Iterator[Block]:
        document = self.geometry.document(number)
        queries, keys = queries.cut(document), keys.cut(document)
        if queries.length and keys.length:
            rows = self.geometry.rows_that_see(queries, keys, document)
            if rows.length:
                yield self._block(rows, keys, document, number, Span(number, number + 1))
