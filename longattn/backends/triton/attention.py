"""From a Problem and its Tensors to launches: attention, its gradients, and rope."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from longattn.backends.angles import rotation_positions
from longattn.backends.base import Gradients
from longattn.backends.triton import config, launch
from longattn.backends.triton.backward import (
    bias_gradient_kernel,
    delta_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from longattn.backends.triton.config import Tiles, padded
from longattn.backends.triton.forward import forward_kernel
from longattn.backends.triton.params import (
    Dropout,
    Lengths,
    Pages,
    Rows,
    ScoreTerms,
    Sequences,
    Visibility,
    float32,
    plain_scores,
    precision,
)
from longattn.backends.triton.rope import rope_kernel
from longattn.backends.triton.splits import attend
from longattn.problem import Problem, Tensors

_DELTA_ROWS = 16
_ALIGNMENT = 16  # bytes: of what is loaded at once, and of what a descriptor describes
_CACHED_BYTES = 32 << 20  # what a GPU's cache is trusted to keep while tiles go by


class Call:
    """What all kernels of one call share: rotated tensors, arguments, constants."""

    def __init__(self, problem: Problem, tensors: Tensors, architecture: int, interpreted: bool) -> None:
        self.problem, self.tensors, self.interpreted = problem, tensors, interpreted
        self.q, self.k, self.v = (_aligned(x) for x in (tensors.q, tensors.k, tensors.v))
        if tensors.inv_freq is not None:
            for_q, for_k, start = rotation_positions(problem, tensors)
            self.for_q = for_k[..., start : start + problem.nq] if for_q is None else for_q
            self.for_k = for_k
            self.q, self.k = _empty_rows(self.q), _empty_rows(self.k)
            self._turn([Turn(tensors.q, self.for_q, self.q), Turn(tensors.k, self.for_k, self.k)], inverse=False)
        self.descriptors = config.uses_descriptors(problem, architecture) and not (
            _expanded(self.q) or _expanded(self.k) or _expanded(self.v)
        )
        self.kernels = config.kernels(problem, architecture, self.descriptors)
        self.sequences = _sequences(problem, tensors)
        self.mask = _visibility(problem, tensors)
        self.terms = ScoreTerms.of(problem, tensors.bias, tensors.alibi_slopes)
        self.dropout = _dropout(problem, tensors)
        self.constants: dict[str, Any] = {
            "WIDTH": problem.head_dim,
            "V_WIDTH": problem.v_head_dim,
            "D": padded(problem.head_dim),
            "DV": padded(problem.v_head_dim),
            "PLAIN": plain_scores(problem),
            "PRECISION": precision(problem, interpreted),
        }

    def forward(self, out: Tensor, lse: Tensor) -> None:
        problem, tensors = self.problem, self.tensors
        if config.is_decode(problem):
            return attend(
                problem, self.q, Pages(Rows.of(self.k), Rows.of(self.v)), Lengths(problem.nk, self.sequences.key_lens),
                self.mask, self.terms, tensors.sink_logits, out, lse, config.decode_tiles(problem, problem.dtype),
                torch.float32 if self.interpreted else problem.dtype, self.constants["PRECISION"],
            )  # fmt: skip
        if problem.varlen:  # tokens outside all sequences
            out.zero_()
            lse.fill_(-torch.inf)
        tiles = self._query_tiles(self.kernels.forward)
        self._launch(
            forward_kernel, self.kernels.forward, tiles * problem.q_heads * problem.batch,
            *map(Rows.of, (self.q, self.k, self.v)), self._tiles(self.k, self.kernels.forward.n),
            self._tiles(self.v, self.kernels.forward.n), Rows.of(out), lse, float32(tensors.sink_logits),
            self.sequences, self.mask, self.terms, self.dropout, problem.q_heads, problem.group, tiles,
            self._together(problem.nk) * problem.group,
        )  # fmt: skip

    def backward(self, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, grads: Gradients) -> None:
        problem, tensors, dout = self.problem, self.tensors, _aligned(dout)
        delta = torch.empty_like(lse)
        launch.launch(
            delta_kernel, math.ceil(problem.nq / _DELTA_ROWS) * lse.shape[0] * lse.shape[1],
            Rows.of(out), Rows.of(dout), lse, None if dlse is None else dlse.contiguous(), delta, problem.nq,
            problem.q_heads, V_WIDTH=problem.v_head_dim, DV=padded(problem.v_head_dim), M=_DELTA_ROWS, num_warps=4,
        )  # fmt: skip
        if problem.varlen or tensors.key_lens is not None:  # tokens outside all sequences
            for grad in grads[:3]:
                if grad is not None:
                    grad.zero_()
        inputs = tuple(map(Rows.of, (self.q, self.k, self.v, dout)))
        shared = (self.sequences, self.mask, self.terms, self.dropout)
        if grads.k is not None or grads.v is not None:
            dk = torch.empty_like(self.k) if grads.k is None else grads.k
            dv = torch.empty_like(self.v) if grads.v is None else grads.v
            own = self.kernels.key_gradient
            tiles = self._key_tiles(own)
            self._launch(
                key_gradient_kernel, own, tiles * problem.kv_heads * problem.batch,
                *inputs, self._tiles(self.q, own.m), self._tiles(dout, own.m), Rows.of(dk), Rows.of(dv), lse, delta,
                *shared, problem.kv_heads, problem.group, tiles, self._together(problem.nq * problem.group),
            )  # fmt: skip
        if grads.q is not None or grads.alibi_slopes is not None:
            dq = torch.empty_like(self.q) if grads.q is None else grads.q
            rows = None
            if grads.alibi_slopes is not None:
                rows = torch.zeros_like(lse) if problem.varlen else torch.empty_like(lse)
            own = self.kernels.query_gradient
            tiles = self._query_tiles(own)
            self._launch(
                query_gradient_kernel, own, tiles * problem.q_heads * problem.batch,
                *inputs, self._tiles(self.k, own.n), self._tiles(self.v, own.n), Rows.of(dq), lse, delta, rows,
                *shared, problem.q_heads, problem.group, tiles, self._together(problem.nk) * problem.group,
            )  # fmt: skip
            if rows is not None and grads.alibi_slopes is not None:
                _sum_slopes(problem, tensors, rows, grads.alibi_slopes)
        if tensors.inv_freq is not None:
            rotated = ((grads.q, self.for_q), (grads.k, self.for_k))
            self._turn([Turn(x, positions, x) for x, positions in rotated if x is not None], inverse=True)
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
        launch.launch(
            kernel, programs, *arguments, **self.constants, **constants, M=tiles.m, N=tiles.n,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def _tiles(self, x: Tensor, rows: int) -> Any:
        """The descriptor of x for tiles of `rows` rows, or None where the hardware has none or cannot describe x."""
        if not self.descriptors or not x.numel() or _expanded(x):
            return None
        sizes, strides = list(x.shape), list(x.stride())
        if 1 in sizes:  # its stride means nothing, but is looked at
            strides = [_ALIGNMENT if size == 1 else stride for size, stride in zip(sizes, strides, strict=True)]
        strides[3] = 1
        return _Descriptor(x, sizes, strides, [1, 1, rows, padded(sizes[3])])

    def _together(self, rows: int) -> int:
        """Heads of key/value, whose programs start side by side: causal tiles see more or less, the others alike.

        Args:
            rows: that the programs of a head read, of both widths.
        """
        mask, problem = self.problem.mask, self.problem
        if mask.right is None or mask.left is not None or problem.varlen:
            return 1
        read = rows * (problem.head_dim + problem.v_head_dim) * problem.dtype.itemsize
        return max(1, min(problem.batch * problem.kv_heads, _CACHED_BYTES // max(1, read)))

    def _turn(self, turns: Sequence[Turn], inverse: bool) -> None:
        assert self.tensors.inv_freq is not None
        rope(turns, self.tensors.inv_freq, self.problem.rope_factor, self.problem.interleaved, inverse)


class _Descriptor(TensorDescriptor):
    """One of a tensor that fits: to check that again, as Triton's own does, takes as long as a launch."""

    def __post_init__(self) -> None:
        pass


class Turn(NamedTuple):
    """x [B, H, N, D] rotates at positions, float32 [N] or [B, N], into out; that may be x."""

    x: Tensor
    positions: Tensor
    out: Tensor


def rope(turns: Sequence[Turn], inv_freq: Tensor, factor: float, interleaved: bool, inverse: bool) -> None:
    """Backend.rope, of at most two tensors of one batch and width at once."""
    if not turns:
        return
    pairs, width = inv_freq.shape[0], turns[0].x.shape[3]
    block = 1 << max(0, pairs - 1).bit_length()
    longest = max(turn.x.shape[2] for turn in turns)
    tokens = max(1, min(config.ROPE_ENTRIES // block, 1 << max(0, longest - 1).bit_length()))
    heads = min(config.ROPE_HEADS, 1 << max(0, max(turn.x.shape[1] for turn in turns) - 1).bit_length())
    in_place = all(turn.out is turn.x for turn in turns)
    rest = 0 if in_place or width == 2 * pairs else 1 << (width - 2 * pairs - 1).bit_length()
    arguments: list[Any] = []
    programs = []
    for x, positions, out in turns:
        n = x.shape[2]
        positions = positions.contiguous()
        by_batch = positions.dim() == 2 and positions.shape[0] > 1
        arguments += (Rows.of(x), Rows.of(out), positions, n if by_batch else 0, n, x.shape[1])
        programs.append(math.ceil(n / tokens) * math.ceil(x.shape[1] / heads) * x.shape[0])
    if len(turns) == 1:
        arguments += [Rows.of(None), Rows.of(None), *[None] * 4]
    launch.launch(
        rope_kernel, sum(programs), *arguments, programs[0], inv_freq, factor,
        PAIRS=pairs, WIDTH=width, INTERLEAVED=interleaved, INVERSE=inverse, T=tokens, H=heads, P=block, REST=rest,
        num_warps=4,
    )  # fmt: skip


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy of it whose rows lie at multiples of 16 bytes: else each entry is loaded by itself."""
    batch, head, token, _ = x.stride()
    if (batch | head | token) * x.itemsize % _ALIGNMENT or x.data_ptr() % _ALIGNMENT:
        return _empty_rows(x).copy_(x)
    return x


def _expanded(x: Tensor) -> bool:
    """Whether a dimension of x repeats what it holds: no descriptor says so."""
    strides = x.stride()
    return 0 in strides and any(not stride and size > 1 for size, stride in zip(x.shape, strides, strict=True))


def _empty_rows(x: Tensor) -> Tensor:
    """An empty tensor of x's shape, of aligned rows."""
    unit = _ALIGNMENT // x.itemsize
    return x.new_empty(*x.shape[:3], math.ceil(x.shape[3] / unit) * unit)[..., : x.shape[3]]


def _sequences(problem: Problem, tensors: Tensors) -> Sequences:
    return Sequences(
        problem.nq,
        problem.nk,
        None if tensors.key_lens is None else tensors.key_lens.contiguous(),
        None if tensors.cu_seqlens_q is None else tensors.cu_seqlens_q.contiguous(),
        None if tensors.cu_seqlens_k is None else tensors.cu_seqlens_k.contiguous(),
    )


def _visibility(problem: Problem, tensors: Tensors) -> Visibility:
    lo, hi = tensors.lo, tensors.hi
    return Visibility.of(
        problem.mask,
        None if tensors.offset is None else tensors.offset.contiguous(),
        None if tensors.key_mask is None else tensors.key_mask.contiguous().view(torch.uint8),
        None if lo is None else lo.contiguous(),
        None if hi is None else hi.contiguous(),
        problem.nq if lo is not None and lo.dim() == 2 else 0,
    )


def _dropout(problem: Problem, tensors: Tensors) -> Dropout:
    if not problem.dropout_p:
        return Dropout()
    threshold, scale = min(round(problem.dropout_p * 2**32), 2**32 - 1), 1.0 / (1.0 - problem.dropout_p)
    if "origin" not in problem.features:
        return Dropout(tensors.seed, threshold, scale)
    return Dropout(tensors.seed, threshold, scale, *problem.origin, uneven=1 if problem.origin.key % 4 else None)


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
