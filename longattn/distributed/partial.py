"""What a rank gathers, block by block: its queries' outputs, and the gradients of everything."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longattn import ops
from longattn.distributed.spans import Span
from longattn.distributed.whole import Keys, Whole


class Outputs:
    """The attention of this rank's queries to the keys attended to so far, merged through lse.

        lse = log(exp(lse) + exp(lse'))        out = exp(lse_before - lse) out + exp(lse' - lse) out'

    (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.) A learned sink is where lse starts.
    """

    def __init__(self, whole: Whole, q: Tensor, v_head_dim: int, sink_logits: Tensor | None) -> None:
        self.whole, self.q = whole, q
        dtype = whole.problem.accumulate_dtype
        self.out = ops.empty_laid_out_as(q, v_head_dim, dtype).zero_()
        self.lse = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
        if sink_logits is not None:
            for rows in _rows_in_documents(whole):
                self.lse[:, :, rows] = sink_logits.to(dtype)[:, None]

    def attend(self, held: Keys) -> None:
        for queries in self.whole.geometry.queries_of(self.whole.rank):
            for block in self.whole.blocks(queries, held.span):
                rows = self.whole.local(block.queries)
                self._merge(rows, *self.whole.forward(block, self.q[:, :, rows], held))

    def _merge(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        before, total = self.lse[:, :, rows], self.out[:, :, rows]
        after = torch.logaddexp(before, lse)
        shift = torch.where(after == -torch.inf, 0.0, after)
        total.mul_(torch.exp(before - shift)[..., None]).addcmul_(out, torch.exp(lse - shift)[..., None])
        before.copy_(after)


class QueryGradients:
    """The gradients of what this rank alone holds: its queries, and its share in those of slopes and learned sinks."""

    def __init__(
        self,
        whole: Whole,
        q: Tensor,
        sink_logits: Tensor | None,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        slopes: bool,
    ) -> None:
        """slopes: whether their gradient is wanted."""
        self.whole, self.q, self.out, self.lse, self.dout, self.dlse = whole, q, out, lse, dout, dlse
        dtype = whole.problem.accumulate_dtype
        self.dq = torch.zeros_like(q, dtype=dtype)
        alibi = whole.tensors.alibi_slopes
        self.dslopes = torch.zeros_like(alibi, dtype=dtype) if slopes and alibi is not None else None
        self.sink_logits = sink_logits

    def dsinks(self) -> Tensor:
        """- sum_i P_i delta_i, where P is the weight of the sink: it has no value, so W is 0."""
        assert self.sink_logits is not None
        delta = (self.dout.to(self.lse.dtype) * self.out.to(self.lse.dtype)).sum(-1)
        if self.dlse is not None:
            delta = delta - self.dlse
        weights = torch.exp(self.sink_logits.to(self.lse.dtype)[:, None] - self.lse)
        return -torch.where(self.lse == -torch.inf, 0.0, weights * delta).sum((0, 2))

    def attend(self, held: Keys, into: KeyGradients) -> None:
        """Add the share of these keys, and to `into`, which are of the same keys or more, their own gradients."""
        for queries in self.whole.geometry.queries_of(self.whole.rank):
            for block in self.whole.blocks(queries, held.span):
                rows = self.whole.local(block.queries)
                dlse = None if self.dlse is None else self.dlse[:, :, rows]
                results = (self.out[:, :, rows], self.lse[:, :, rows], self.dout[:, :, rows], dlse)
                grads = self.whole.backward(block, self.q[:, :, rows], held, *results, self.dslopes is not None)
                assert grads.q is not None and grads.k is not None and grads.v is not None
                self.dq[:, :, rows] += grads.q
                into.add(block.keys, grads.k, grads.v)
                if self.dslopes is not None and grads.alibi_slopes is not None:
                    total = self.dslopes if self.dslopes.dim() == 1 else self.dslopes[self.whole.slopes_rows(block)]
                    total += grads.alibi_slopes


class KeyGradients(NamedTuple):
    """The gradients of neighbouring keys and values, in the dtype of sums."""

    span: Span
    k: Tensor
    v: Tensor

    @classmethod
    def zeros(cls, held: Keys, dtype: torch.dtype) -> KeyGradients:
        return cls(held.span, *(torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (held.k, held.v)))

    def add(self, span: Span, k: Tensor, v: Tensor) -> None:
        """Add those of some of these keys."""
        rows = slice(span.start - self.span.start, span.stop - self.span.start)
        self.k[:, :, rows] += k
        self.v[:, :, rows] += v


def _rows_in_documents(whole: Whole) -> list[slice]:
    """This rank's queries, but for those outside all packed documents."""
    geometry = whole.geometry
    spans = geometry.queries_of(whole.rank)
    if geometry.starts is not None:
        inside = Span(geometry.starts[0], geometry.starts[-1])
        spans = [cut for cut in (span.cut(inside) for span in spans) if cut.length]
    return [whole.local(span) for span in spans]
