"""The oracle: the contract written down in eager float64, a block of query rows at a time. Slow, and never wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longattn.backends.base import Backend, Gradients
from longattn.backends.philox import uniform_bits
from longattn.problem import Problem, Tensors

_BLOCK_BYTES = 1 << 28  # float64 scores held at once


class ReferenceBackend(Backend):
    """Eager PyTorch in float64 on the tensors' own device."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def reasons(self, problem: Problem) -> list[str]:
        if problem.device not in ("cpu", "cuda", "xpu"):
            return [f"device {problem.device} has no float64 PyTorch kernels to run on"]
        return []

    def forward(self, problem: Problem, tensors: Tensors, out: Tensor, lse: Tensor) -> None:
        out.zero_()
        lse.fill_(-torch.inf)
        for part in _parts(problem, tensors):
            for rows in part.row_blocks():
                weights = part.weights(rows)
                out[part.batch, :, part.queries][:, :, rows] = (weights.dropped @ part.v).to(out.dtype)
                lse[part.batch, :, part.queries][:, :, rows] = weights.lse.to(lse.dtype)

    def backward(
        self,
        problem: Problem,
        tensors: Tensors,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        grads: Gradients,
    ) -> None:
        dout = dout.double()
        delta = (dout * out.double()).sum(-1)
        if dlse is not None:
            delta = delta - dlse.double()
        sums = Gradients(*(None if x is None else torch.zeros_like(x, dtype=torch.float64) for x in grads))
        for part in _parts(problem, tensors):
            part.add_gradients(sums, dout[part.batch, :, part.queries], delta[part.batch, :, part.queries])
        for total, grad in zip(sums, grads, strict=True):
            if grad is not None and total is not None:
                grad.copy_(total)

    def rope(
        self,
        x: Tensor,
        inv_freq: Tensor,
        positions: Tensor,
        factor: float,
        interleaved: bool,
        inverse: bool,
        out: Tensor,
    ) -> None:
        out.copy_(_rotate(x.double(), inv_freq, positions, factor, interleaved, inverse))


class _Weights(NamedTuple):
    """A block of rows of the attention matrix, all [B, Hq, rows, Nk] in float64."""

    exact: Tensor  # softmax
    keep: Tensor | None  # dropout's multiplier
    capped: Tensor  # scores after the softcap, before slopes and bias
    lse: Tensor  # [B, Hq, rows]

    @property
    def dropped(self) -> Tensor:
        return self.exact if self.keep is None else self.exact * self.keep


class _Part:
    """Sequences of equal lengths: the whole batch, or one packed sequence. k and v are repeated to Hq heads."""

    def __init__(
        self, problem: Problem, tensors: Tensors, batch: slice, queries: slice, keys: slice, first: int
    ) -> None:
        self.problem, self.tensors = problem, tensors
        self.batch, self.queries, self.keys = batch, queries, keys
        self.first = first  # the first sequence's number
        q = tensors.q[batch, :, queries].double()
        k = tensors.k[batch, :, keys].double()
        v = tensors.v[batch, :, keys].double()
        self.lq, self.lk = q.shape[2], k.shape[2]
        sequence = slice(first, first + q.shape[0])
        key_lens = None if tensors.key_lens is None else tensors.key_lens[sequence]
        offset = None if tensors.offset is None else tensors.offset[sequence]
        bounds = None if tensors.lo is None or tensors.hi is None else (tensors.lo, tensors.hi)
        self.visible = lambda rows: problem.mask.materialize(
            self.lq,
            self.lk,
            offset=offset,
            key_mask=tensors.key_mask,
            key_lens=key_lens,
            bounds=bounds,
            rows=rows,
            device=q.device,
        )
        shift = problem.mask.position(0, self.lq, 0)
        lens = torch.full((q.shape[0],), self.lk, device=q.device) if key_lens is None else key_lens.long()
        starts = lens * int(problem.mask.from_end) + shift if offset is None else offset.long()
        self.positions = starts[:, None] + torch.arange(self.lq, device=q.device)  # p_i: [B, Lq]

        hidden = torch.arange(self.lk, device=q.device) >= lens[:, None]
        if tensors.key_mask is not None:
            hidden = hidden | ~tensors.key_mask
        k = k.masked_fill(hidden[:, None, :, None], 0.0)  # what nobody sees may hold anything
        v = v.masked_fill(hidden[:, None, :, None], 0.0)
        if tensors.inv_freq is not None:
            q = self._rotate(q, self._query_angles())
            k = self._rotate(k, self._key_angles())
        self.q = q
        self.k = k.repeat_interleave(problem.group, 1)
        self.v = v.repeat_interleave(problem.group, 1)

    def row_blocks(self) -> Iterator[slice]:
        height = max(1, _BLOCK_BYTES // max(1, 8 * self.q.shape[0] * self.q.shape[1] * self.lk))
        for start in range(0, self.lq, height):
            yield slice(start, min(start + height, self.lq))

    def weights(self, rows: slice) -> _Weights:
        problem, tensors = self.problem, self.tensors
        scores = problem.scale * (self.q[:, :, rows] @ self.k.mT)
        if problem.softcap:
            scores = problem.softcap * torch.tanh(scores / problem.softcap)
        capped = scores
        if tensors.alibi_slopes is not None:
            scores = scores - self._slopes() * self._distance(rows)
        visible = self.visible(rows)[:, None]
        if tensors.bias is not None:
            bias = _rows(tensors.bias, rows)
            if bias.dtype == torch.bool:
                visible = visible & bias
            else:
                scores = scores + bias.double()
        scores = scores.masked_fill(~visible, -torch.inf)
        lse = torch.logsumexp(scores, -1)
        if self.lk == 0:
            lse = torch.full_like(lse, -torch.inf)
        if tensors.sink_logits is not None:
            lse = torch.logaddexp(lse, tensors.sink_logits.double()[:, None])
        exact = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
        keep = self._dropout(rows) if problem.dropout_p else None
        return _Weights(exact, keep, capped, lse)

    def add_gradients(self, sums: Gradients, dout: Tensor, delta: Tensor) -> None:
        problem, tensors = self.problem, self.tensors
        dq, dk, dv = torch.zeros_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v)
        for rows in self.row_blocks():
            weights = self.weights(rows)
            dweights = dout[:, :, rows] @ self.v.mT
            if weights.keep is not None:
                dweights = dweights * weights.keep
            dscores = weights.exact * (dweights - delta[:, :, rows, None])
            dscores = torch.where(weights.exact == 0, 0.0, dscores)
            dv += weights.dropped.mT @ dout[:, :, rows]
            if sums.bias is not None:
                _rows(sums.bias, rows).add_(dscores.sum_to_size(_rows(sums.bias, rows).shape))
            if sums.alibi_slopes is not None:
                dslopes = -(dscores * self._distance(rows)).sum((2, 3))
                total = self._of_sequences(sums.alibi_slopes)
                total.add_(dslopes.sum_to_size(total.shape))
            if problem.softcap:
                dscores = dscores * (1.0 - (weights.capped / problem.softcap) ** 2)
            dq[:, :, rows] = problem.scale * (dscores @ self.k)
            dk += problem.scale * (dscores.mT @ self.q[:, :, rows])
            if sums.sink_logits is not None and tensors.sink_logits is not None:
                sink = torch.exp(tensors.sink_logits.double()[:, None] - weights.lse)
                sums.sink_logits.sub_((sink * delta[:, :, rows]).sum((0, 2)))
        dk, dv = (x.unflatten(1, (problem.kv_heads, problem.group)).sum(2) for x in (dk, dv))
        if tensors.inv_freq is not None:
            dq = self._rotate(dq, self._query_angles(), inverse=True)
            dk = self._rotate(dk, self._key_angles(), inverse=True)
        if sums.q is not None:
            sums.q[self.batch, :, self.queries] += dq
        if sums.k is not None:
            sums.k[self.batch, :, self.keys] += dk
        if sums.v is not None:
            sums.v[self.batch, :, self.keys] += dv

    def _rotate(self, x: Tensor, positions: Tensor, inverse: bool = False) -> Tensor:
        assert self.tensors.inv_freq is not None
        factor, interleaved = self.problem.rope_factor, self.problem.interleaved
        return _rotate(x, self.tensors.inv_freq, positions, factor, interleaved, inverse)

    def _key_angles(self) -> Tensor:
        positions = self.tensors.positions_k
        return torch.arange(self.lk, device=self.q_device).float() if positions is None else positions[..., self.keys]

    def _query_angles(self) -> Tensor:
        tensors = self.tensors
        if tensors.positions_q is not None:
            return tensors.positions_q[..., self.queries]
        if tensors.positions_k is None:
            return self.positions.float()
        table = tensors.positions_k[..., self.keys].expand(self.positions.shape[0], -1)
        if self.lk == 0:
            return torch.zeros_like(self.positions, dtype=torch.float32)
        return table.gather(1, self.positions.clamp(0, self.lk - 1))

    @property
    def q_device(self) -> torch.device:
        return self.tensors.q.device

    def _distance(self, rows: slice) -> Tensor:
        """|p_i - j|: [B, 1, rows, Lk]."""
        keys = torch.arange(self.lk, device=self.q_device)
        return (self.positions[:, None, rows, None] - keys).abs().double()

    def _slopes(self) -> Tensor:
        assert self.tensors.alibi_slopes is not None
        return self._of_sequences(self.tensors.alibi_slopes).double()[..., None, None]

    def _of_sequences(self, slopes: Tensor) -> Tensor:
        """The slopes [Hq] that all sequences share, or the rows of this part's out of [B, Hq]."""
        return slopes if slopes.dim() == 1 else slopes[self.first : self.first + self.q.shape[0]]

    def _dropout(self, rows: slice) -> Tensor:
        assert self.tensors.seed is not None
        sizes = (range(self.first, self.first + self.q.shape[0]), range(self.problem.q_heads))
        b, h = (torch.tensor(tuple(size), dtype=torch.int64, device=self.q_device) for size in sizes)
        i = torch.arange(self.lq, device=self.q_device)[rows]
        bits = uniform_bits(self.tensors.seed, b[:, None, None], h[:, None], i, self.lk)
        keep = bits >= round(self.problem.dropout_p * 2**32)
        return keep.double() / (1.0 - self.problem.dropout_p)


def _parts(problem: Problem, tensors: Tensors) -> Iterator[_Part]:
    if tensors.cu_seqlens_q is None or tensors.cu_seqlens_k is None:
        if problem.batch and problem.nq:
            yield _Part(problem, tensors, slice(None), slice(None), slice(None), 0)
        return
    cu_q, cu_k = tensors.cu_seqlens_q.tolist(), tensors.cu_seqlens_k.tolist()
    for b in range(problem.batch):
        if cu_q[b + 1] > cu_q[b]:
            yield _Part(problem, tensors, slice(None), slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2]), b)


def _rows(x: Tensor, rows: slice) -> Tensor:
    """The query rows of a tensor that broadcasts to [B, Hq, Nq, Nk]."""
    return x if x.shape[2] == 1 else x[:, :, rows]


def _rotate(
    x: Tensor, inv_freq: Tensor, positions: Tensor, factor: float, interleaved: bool, inverse: bool = False
) -> Tensor:
    """Rope on x [B, H, N, D] in x's dtype; the angle itself is a product of float32 numbers, as on every backend."""
    angle = (positions.float()[..., None] * inv_freq).to(x.dtype)  # [N or B, N, dim / 2]
    if angle.dim() == 3:
        angle = angle[:, None]
    cos, sin = angle.cos() * factor, angle.sin() * (-factor if inverse else factor)
    dim = 2 * inv_freq.shape[0]
    turning, rest = x[..., :dim], x[..., dim:]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turning.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, rest), -1)
