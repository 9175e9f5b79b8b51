"""From a Problem and its Tensors to kernel launches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from longattn.backends.angles import rotation_positions
from longattn.backends.base import Gradients
from longattn.backends.triton import config
from longattn.backends.triton.backward import (
    bias_gradient_kernel,
    delta_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from longattn.backends.triton.config import Tiles, padded
from longattn.backends.triton.forward import forward_kernel
from longattn.backends.triton.params import Dropout, Rows, ScoreTerms, Sequences, Visibility
from longattn.backends.triton.rope import rope_kernel
from longattn.problem import Problem, Tensors

_DELTA_ROWS = 16
_UNBOUNDED = 1 << 30  # a window side that no position reaches the end of


def launch(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
    """Start a kernel; the one place where that happens."""
    if programs:
        kernel[(programs,)](*arguments, **meta)


class Call:
    """What all kernels of one call share: rotated tensors, arguments, constants."""

    def __init__(self, problem: Problem, tensors: Tensors, architecture: int, interpreted: bool) -> None:
        self.problem, self.tensors = problem, tensors
        self.kernels = config.kernels(problem, architecture)
        self.q, self.k, self.v = tensors.q, tensors.k, tensors.v
        if tensors.inv_freq is not None:
            for_q, for_k, start = rotation_positions(problem, tensors)
            self.for_q = for_k[..., start : start + problem.nq] if for_q is None else for_q
            self.for_k = for_k
            self.q, self.k = torch.empty_like(self.q), torch.empty_like(self.k)
            self._turn(tensors.q, self.for_q, False, self.q)
            self._turn(tensors.k, self.for_k, False, self.k)
        self.sequences = _sequences(problem, tensors)
        self.mask = _visibility(problem, tensors)
        self.terms = _score_terms(problem, tensors)
        self.dropout = _dropout(problem, tensors)
        self.constants = {
            "WIDTH": problem.head_dim,
            "V_WIDTH": problem.v_head_dim,
            "D": padded(problem.head_dim),
            "DV": padded(problem.v_head_dim),
            "PLAIN": problem.scale > 0 and not {"softcap", "bias", "alibi_slopes"} & set(problem.features),
            "PRECISION": _precision(problem, interpreted),
        }

    def forward(self, out: Tensor, lse: Tensor) -> None:
        problem, tensors = self.problem, self.tensors
        if problem.varlen:  # tokens outside all sequences
            out.zero_()
            lse.fill_(-torch.inf)
        tiles = self._query_tiles(self.kernels.forward)
        self._launch(
            forward_kernel, self.kernels.forward, tiles * problem.q_heads * problem.batch,
            *map(_rows, (self.q, self.k, self.v, out)), lse, _float32(tensors.sink_logits),
            self.sequences, self.mask, self.terms, self.dropout, problem.q_heads, problem.group, tiles,
        )  # fmt: skip

    def backward(self, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, grads: Gradients) -> None:
        problem, tensors = self.problem, self.tensors
        delta = torch.empty_like(lse)
        launch(
            delta_kernel, math.ceil(problem.nq / _DELTA_ROWS) * lse.shape[0] * lse.shape[1],
            _rows(out), _rows(dout), lse, None if dlse is None else dlse.contiguous(), delta, problem.nq,
            problem.q_heads, V_WIDTH=problem.v_head_dim, DV=padded(problem.v_head_dim), M=_DELTA_ROWS, num_warps=4,
        )  # fmt: skip
        if problem.varlen or tensors.key_lens is not None:  # tokens outside all sequences
            for grad in grads[:3]:
                if grad is not None:
                    grad.zero_()
        inputs = tuple(map(_rows, (self.q, self.k, self.v, dout)))
        shared = (self.sequences, self.mask, self.terms, self.dropout)
        if grads.k is not None or grads.v is not None:
            dk = torch.empty_like(self.k) if grads.k is None else grads.k
            dv = torch.empty_like(self.v) if grads.v is None else grads.v
            tiles = self._key_tiles(self.kernels.key_gradient)
            self._launch(
                key_gradient_kernel, self.kernels.key_gradient, tiles * problem.kv_heads * problem.batch,
                *inputs, _rows(dk), _rows(dv), lse, delta, *shared, problem.kv_heads, problem.group, tiles,
            )  # fmt: skip
            if tensors.inv_freq is not None and grads.k is not None:
                self._turn(dk, self.for_k, True, dk)
        if grads.q is not None or grads.alibi_slopes is not None:
            dq = torch.empty_like(self.q) if grads.q is None else grads.q
            rows = None
            if grads.alibi_slopes is not None:
                rows = torch.zeros_like(lse) if problem.varlen else torch.empty_like(lse)
            tiles = self._query_tiles(self.kernels.query_gradient)
            self._launch(
                query_gradient_kernel, self.kernels.query_gradient, tiles * problem.q_heads * problem.batch,
                *inputs, _rows(dq), lse, delta, rows, *shared, problem.q_heads, problem.group, tiles,
            )  # fmt: skip
            if tensors.inv_freq is not None and grads.q is not None:
                self._turn(dq, self.for_q, True, dq)
            if rows is not None and grads.alibi_slopes is not None:
                _sum_slopes(problem, tensors, rows, grads.alibi_slopes)
        if grads.bias is not None:
            self._bias_gradient(inputs, lse, delta, grads.bias)
        if grads.sink_logits is not None and tensors.sink_logits is not None:
            sinks = tensors.sink_logits.float()[:, None]
            weights = torch.where(lse == -torch.inf, 0.0, torch.exp(sinks - lse))  # of the sinks, that have no value
            grads.sink_logits.copy_(-(weights * delta).sum((0, 2)))

    def _bias_gradient(self, inputs: tuple[Rows, ...], lse: Tensor, delta: Tensor, dbias: Tensor) -> None:
        problem, tiles = self.problem, self.kernels.bias_gradient
        batch, heads, queries, keys = dbias.shape
        sums = torch.empty(dbias.shape, dtype=torch.float32, device=dbias.device)
        i_tiles, j_tiles = self._query_tiles(tiles), self._key_tiles(tiles)
        whole = (problem.batch, problem.q_heads, problem.nq, problem.nk)
        by = [own == full for own, full in zip(dbias.shape, whole, strict=True)]
        self._launch(
            bias_gradient_kernel, tiles,
            batch * heads * (i_tiles if by[2] else 1) * (j_tiles if by[3] else 1),
            *inputs, sums, lse, delta, self.sequences, self.mask, self.terms, self.dropout, problem.batch,
            problem.q_heads, problem.group, i_tiles, j_tiles, heads, queries, keys,
            **dict(zip(("BY_BATCH", "BY_HEAD", "BY_QUERY", "BY_KEY"), by, strict=True)),
        )  # fmt: skip
        dbias.copy_(sums)

    def _query_tiles(self, tiles: Tiles) -> int:
        return math.ceil((self.problem.max_seqlen_q if self.problem.varlen else self.problem.nq) / tiles.m)

    def _key_tiles(self, tiles: Tiles) -> int:
        return math.ceil((self.problem.max_seqlen_k if self.problem.varlen else self.problem.nk) / tiles.n)

    def _launch(self, kernel: Any, tiles: Tiles, programs: int, *arguments: Any, **constants: Any) -> None:
        launch(
            kernel, programs, *arguments, **self.constants, **constants, M=tiles.m, N=tiles.n,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def _turn(self, x: Tensor, positions: Tensor, inverse: bool, out: Tensor) -> None:
        assert self.tensors.inv_freq is not None
        rope(x, self.tensors.inv_freq, positions, self.problem.rope_factor, self.problem.interleaved, inverse, out)


def rope(
    x: Tensor, inv_freq: Tensor, positions: Tensor, factor: float, interleaved: bool, inverse: bool, out: Tensor
) -> None:
    """Backend.rope; out may be x."""
    batch, heads, n, width = x.shape
    pairs = inv_freq.shape[0]
    block = 1 << max(0, pairs - 1).bit_length()
    tokens = max(1, min(config.ROPE_ENTRIES // block, 1 << max(0, n - 1).bit_length()))
    rest = 0 if out is x or width == 2 * pairs else 1 << (width - 2 * pairs - 1).bit_length()
    positions = positions.contiguous()
    launch(
        rope_kernel, math.ceil(n / tokens) * batch, _rows(x), _rows(out), inv_freq, positions,
        n if positions.dim() == 2 and positions.shape[0] > 1 else 0, n, heads, factor,
        PAIRS=pairs, WIDTH=width, INTERLEAVED=interleaved, INVERSE=inverse, T=tokens, P=block, REST=rest, num_warps=4,
    )  # fmt: skip


def _rows(x: Tensor) -> Rows:
    batch, head, token, _ = x.stride()
    return Rows(x, batch, head, token, 1 if token * config.LONGEST_TILE >= 2**31 else None)


def _sequences(problem: Problem, tensors: Tensors) -> Sequences:
    return Sequences(
        problem.nq,
        problem.nk,
        *(
            None if x is None else x.contiguous()
            for x in (tensors.key_lens, tensors.cu_seqlens_q, tensors.cu_seqlens_k)
        ),
    )


def _visibility(problem: Problem, tensors: Tensors) -> Visibility:
    mask = problem.mask
    return Visibility(
        left=None if mask.left is None else min(mask.left, _UNBOUNDED),
        right=None if mask.right is None else min(mask.right, _UNBOUNDED),
        sinks=min(mask.sinks, _UNBOUNDED) if mask.sinks else None,
        shift=mask.offset,
        from_end=int(mask.from_end),
        offset=None if tensors.offset is None else tensors.offset.contiguous(),
        key_mask=None if tensors.key_mask is None else tensors.key_mask.contiguous().view(torch.uint8),
        lo=None if tensors.lo is None else tensors.lo.contiguous(),
        hi=None if tensors.hi is None else tensors.hi.contiguous(),
        bounds_batch=problem.nq if tensors.lo is not None and tensors.lo.dim() == 2 else 0,
    )


def _score_terms(problem: Problem, tensors: Tensors) -> ScoreTerms:
    bias, slopes = tensors.bias, _float32(tensors.alibi_slopes)
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if bias is not None:
        strides = tuple(0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True))
        bias = bias.view(torch.uint8) if bias.dtype == torch.bool else bias
    return ScoreTerms(
        problem.scale,
        problem.softcap or None,
        bias,
        *strides,
        slopes,
        problem.q_heads if slopes is not None and slopes.dim() == 2 else 0,
    )


def _dropout(problem: Problem, tensors: Tensors) -> Dropout:
    if not problem.dropout_p:
        return Dropout(None, None, None)
    return Dropout(tensors.seed, min(round(problem.dropout_p * 2**32), 2**32 - 1), 1.0 / (1.0 - problem.dropout_p))


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _precision(problem: Problem, interpreted: bool) -> str:
    """Of float32 products: as PyTorch's own matrix products have it."""
    if interpreted:
        return "widen"
    return "tf32" if problem.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _sum_slopes(problem: Problem, tensors: Tensors, rows: Tensor, out: Tensor) -> None:
    """Sum each query's part [B, Hq, Nq] of the slopes' gradient to their shape [Hq] or [B, Hq]."""
    if out.dim() == 1:
        out.copy_(rows.sum((0, 2)))
    elif tensors.cu_seqlens_q is None:
        out.copy_(rows.sum(2))
    else:  # one matrix product with the sequences' indicators: lengths stay on the device
        index = torch.arange(problem.nq, device=rows.device)
        inside = (index >= tensors.cu_seqlens_q[:-1, None]) & (index < tensors.cu_seqlens_q[1:, None])
        for b in range(problem.batch):
            out[b].copy_(torch.where(inside[b], rows[0], 0.0).sum(1))
