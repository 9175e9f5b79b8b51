"""The CPU backend: fills the native parameters and calls the C++ kernels of csrc/cpu."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longattn import forked
from longattn._build_info import build_info
from longattn.backends.angles import rotation_positions
from longattn.backends.base import Backend, Gradients
from longattn.problem import CacheTensors, Problem, Slots, Tensors

try:
    from longattn import _C as _native
except ImportError as error:  # built without a compiler, or not built at all
    _native = None
    _UNAVAILABLE: str | None = f"the C++ kernels are missing: {build_info().reason or error}"
else:
    _UNAVAILABLE = None

_DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
    torch.int8: 5,
}

# Bytes from which on memory surely comes from the system, page by page as it is written, and goes back to it: the
# largest threshold for that of glibc's malloc.
_MAPPED = 32 << 20


class CpuBackend(Backend):
    """C++ kernels for the instruction set of this machine."""

    name = "cpu"

    def unavailable(self) -> str | None:
        return _UNAVAILABLE

    def reasons(self, problem: Problem) -> list[str]:
        found = []
        if problem.device != "cpu":
            found.append(f"runs on the cpu, not on {problem.device}")
        for name, width in (("head_dim", problem.head_dim), ("v_head_dim", problem.v_head_dim)):
            if width > 512:
                found.append(f"{name} is at most 512, not {width}")
        return found

    def forward(self, problem: Problem, tensors: Tensors, out: Tensor, lse: Tensor) -> None:
        _prefer_large_pages(out)
        if problem.varlen:  # tokens outside all sequences
            out.zero_()
            lse.fill_(-torch.inf)
        params, keep = _params(problem, tensors, out, lse)
        native().attention_forward(params)
        del keep

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
        params, keep = _params(problem, tensors, out, lse)
        params.dout = _view(dout)
        if dlse is not None:
            dlse = dlse.contiguous()
            params.dlse = dlse.data_ptr()
        delta = torch.zeros_like(lse) if problem.varlen else torch.empty_like(lse)
        params.delta = delta.data_ptr()
        for name, grad in (("dq", grads.q), ("dk", grads.k), ("dv", grads.v)):
            if grad is not None:
                _prefer_large_pages(grad)
                if problem.varlen or tensors.key_lens is not None:  # tokens outside all sequences
                    grad.zero_()
                setattr(params, name, _view(grad))
        if grads.q is not None:
            dq_sum = grads.q
            if problem.dtype != problem.accumulate_dtype:
                dq_sum = torch.empty_like(grads.q, dtype=problem.accumulate_dtype)
                _prefer_large_pages(dq_sum)
            params.dq_sum = _view(dq_sum.zero_())
        dbias = dslopes = None
        if grads.bias is not None:
            dbias = torch.zeros(grads.bias.shape, dtype=problem.accumulate_dtype, device="cpu")
            params.dbias = _bias(dbias)
        if grads.alibi_slopes is not None and grads.alibi_slopes.numel():  # [0, Hq] where no sequences are packed
            dslopes = torch.zeros_like(lse)  # of each query
            params.dslope_rows = dslopes.data_ptr()
        native().attention_backward(params)
        del keep
        if grads.bias is not None and dbias is not None:
            grads.bias.copy_(dbias)
        if grads.alibi_slopes is not None and dslopes is not None:
            _sum_slopes(problem, tensors, dslopes, grads.alibi_slopes)
        if grads.sink_logits is not None and tensors.sink_logits is not None:
            sinks = tensors.sink_logits.to(lse.dtype)[:, None]
            weights = torch.where(lse == -torch.inf, 0.0, torch.exp(sinks - lse))  # of the sinks, that have no value
            grads.sink_logits.copy_(-_sum_to(weights * delta, (1, problem.q_heads, 1)).flatten())

    def append(self, problem: Problem, tensors: CacheTensors, slots: Slots) -> None:
        params, keep = _cache_params(problem, tensors, slots)
        native().attention_append(params)
        del keep

    def decode(self, problem: Problem, tensors: CacheTensors, slots: Slots, out: Tensor, lse: Tensor) -> None:
        params, keep = _cache_params(problem, tensors, slots)
        assert tensors.q is not None
        params.q_heads, params.q, params.out, params.lse = problem.q_heads, _view(tensors.q), _view(out), lse.data_ptr()
        native().attention_decode(params)
        del keep

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
        _prefer_large_pages(out)
        params = native().RopeParams()
        params.batch, params.heads, params.tokens, params.width = x.shape
        params.rotated = 2 * inv_freq.shape[0]
        params.dtype = _DTYPES[x.dtype]
        params.x, params.out = _view(x), _view(out)
        positions, inv_freq = positions.contiguous(), inv_freq.contiguous()
        params.positions, params.inv_freq = positions.data_ptr(), inv_freq.data_ptr()
        params.positions_batch = 0 if len(positions) == 1 or positions.dim() == 1 else positions.shape[1]
        params.factor, params.interleaved, params.inverse = factor, interleaved, inverse
        params.threads = forked.num_threads()
        native().rope(params)


def native() -> ModuleType:
    """The extension module."""
    assert _native is not None
    return _native


def _params(problem: Problem, tensors: Tensors, out: Tensor, lse: Tensor) -> tuple[Any, list[Tensor]]:
    """The native parameters, and the tensors made here that must outlive the call."""
    params = native().AttentionParams()
    params.batch, params.q_heads, params.kv_heads = problem.batch, problem.q_heads, problem.kv_heads
    params.nq, params.nk = problem.nq, problem.nk
    params.head_dim, params.v_head_dim = problem.head_dim, problem.v_head_dim
    params.dtype = _DTYPES[problem.dtype]
    params.q, params.k, params.v, params.out = _view(tensors.q), _view(tensors.k), _view(tensors.v), _view(out)
    params.lse = lse.data_ptr()
    mask = problem.mask
    params.left = -1 if mask.left is None else mask.left
    params.right = -1 if mask.right is None else mask.right
    params.sinks, params.offset, params.from_end = mask.sinks, mask.offset, mask.from_end
    params.scale, params.softcap, params.dropout_p = problem.scale, problem.softcap, problem.dropout_p
    params.threads = forked.num_threads()
    params.first_sequence, params.first_head, params.first_query, params.first_key = problem.origin
    keep = []
    for name, x in (
        ("offsets", tensors.offset),
        ("key_mask", tensors.key_mask),
        ("key_lens", tensors.key_lens),
        ("lo", tensors.lo),
        ("hi", tensors.hi),
        ("cu_seqlens_q", tensors.cu_seqlens_q),
        ("cu_seqlens_k", tensors.cu_seqlens_k),
    ):
        if x is not None:
            x = x.contiguous()
            keep.append(x)
            setattr(params, name, x.data_ptr())
    for name, x in (("alibi_slopes", tensors.alibi_slopes), ("sink_logits", tensors.sink_logits)):
        if x is not None:
            x = x.to(problem.accumulate_dtype).contiguous()
            keep.append(x)
            setattr(params, name, x.data_ptr())
    if tensors.alibi_slopes is not None and tensors.alibi_slopes.dim() == 2:
        params.slopes_batch = problem.q_heads
    if tensors.bias is not None:
        params.bias = _bias(tensors.bias)
    if tensors.seed is not None:
        params.seed = int(tensors.seed) % 2**64
    if tensors.lo is not None:
        params.bounds_batch = problem.nq if tensors.lo.dim() == 2 else 0
    if tensors.inv_freq is not None:
        params.rotated, params.interleaved = 2 * tensors.inv_freq.shape[0], problem.interleaved
        for_q, for_k, start = rotation_positions(problem, tensors)
        k_tables = _tables(for_k, tensors.inv_freq, problem.rope_factor, problem.dtype)
        if for_q is None:  # queries stand at keys' positions
            q_tables = tuple([table[..., start : start + problem.nq, :] for table in k_tables])
        else:
            q_tables = _tables(for_q, tensors.inv_freq, problem.rope_factor, problem.dtype)
        params.q_angles, params.k_angles = _angles(*q_tables), _angles(*k_tables)
        keep += [*q_tables, *k_tables]
    return params, keep


def _cache_params(problem: Problem, tensors: CacheTensors, slots: Slots) -> tuple[Any, list[Tensor]]:
    """The native parameters of a call on a cache without queries, and the tensors that must outlive the call."""
    params = native().AttentionParams()
    params.batch, params.q_heads, params.kv_heads = problem.batch, 0, problem.kv_heads
    params.nq, params.nk = problem.nq, problem.nk
    params.head_dim, params.v_head_dim = problem.head_dim, problem.v_head_dim
    params.dtype = _DTYPES[problem.dtype]
    params.k, params.v = _view(slots.k), _view(slots.v)
    if slots.k_scales is not None and slots.v_scales is not None:
        params.k_scales, params.v_scales = slots.k_scales.data_ptr(), slots.v_scales.data_ptr()
    pages, _, size, _ = slots.k.shape
    table, dtype = slots.table, _DTYPES[slots.k.dtype]
    params.pages = table.data_ptr(), table.shape[1], pages, size, slots.sinks, slots.ring, dtype
    params.key_lens, params.query_lens = tensors.key_lens.data_ptr(), tensors.query_lens.data_ptr()
    if tensors.k is not None and tensors.v is not None:
        params.new_k, params.new_v = _view(tensors.k), _view(tensors.v)
    mask = problem.mask
    params.left = -1 if mask.left is None else mask.left
    params.right = -1 if mask.right is None else mask.right
    params.sinks, params.frame = mask.sinks, problem.frame
    params.scale, params.softcap = problem.scale, problem.softcap
    params.threads = forked.num_threads()
    keep = []
    for name, x in (("alibi_slopes", tensors.alibi_slopes), ("sink_logits", tensors.sink_logits)):
        if x is not None:
            x = x.to(problem.accumulate_dtype).contiguous()
            keep.append(x)
            setattr(params, name, x.data_ptr())
    if tensors.alibi_slopes is not None and tensors.alibi_slopes.dim() == 2:
        params.slopes_batch = problem.q_heads
    if tensors.inv_freq is not None:
        params.rotated, params.interleaved = 2 * tensors.inv_freq.shape[-1], problem.interleaved
        params.rope_factor = problem.rope_factor
        params.inv_freq, params.inv_freq_batch = _per_sequence(tensors.inv_freq, 1, keep)
        if tensors.positions is not None:
            params.positions, params.positions_batch = _per_sequence(tensors.positions, 1, keep)
    if tensors.cos is not None and tensors.sin is not None:
        params.k_angles = _angles(tensors.cos, tensors.sin)
    if tensors.tree is not None and tensors.depths is not None:
        params.tree, params.tree_batch = _per_sequence(tensors.tree, 2, keep)
        params.depths, params.depths_batch = _per_sequence(tensors.depths, 1, keep)
    return params, keep


def _per_sequence(x: Tensor, dims: int, keep: list[Tensor]) -> tuple[int, int]:
    """Address of x, contiguous, and its batch stride: 0 where all sequences share its `dims` dimensions."""
    x = x.contiguous()
    keep.append(x)
    return x.data_ptr(), x.stride(0) if x.dim() > dims else 0


def _sum_slopes(problem: Problem, tensors: Tensors, rows: Tensor, out: Tensor) -> None:
    """Sum each query's part [B, Hq, Nq] of the slopes' gradient to their shape [Hq] or [B, Hq]."""
    if out.dim() == 1:
        out.copy_(_sum_to(rows, (1, problem.q_heads, 1)).flatten())
    elif tensors.cu_seqlens_q is None:
        out.copy_(_sum_to(rows, (problem.batch, problem.q_heads, 1))[..., 0])
    else:
        starts = tensors.cu_seqlens_q.tolist()
        for b in range(problem.batch):
            out[b].copy_(_sum_to(rows[0, :, starts[b] : starts[b + 1]], (problem.q_heads, 1))[:, 0])


def _sum_to(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x.sum_to_size(shape), for a shape of x's rank; bitwise the same with every number of threads.

    PyTorch splits a sum to several numbers among threads by these numbers, but a sum to a single one by its terms.
    """
    if math.prod(shape) != 1:
        return x.sum_to_size(shape)
    return x.expand(2, *x.shape).sum_to_size((2, *shape))[0]


def _view(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of a [B, H, N, D] tensor with unit stride in D."""
    batch, head, token, _ = x.stride()
    return x.data_ptr(), batch, head, token


def _prefer_large_pages(x: Tensor) -> None:
    """Of a new, dense tensor that will be filled: a large one may have no memory yet."""
    if x.nbytes >= _MAPPED:
        native().prefer_large_pages(x.data_ptr(), x.nbytes)


def _bias(x: Tensor) -> tuple[int, int, int, int, int, int]:
    """Address, strides (0 where it is broadcast) and dtype of a 4-D bias."""
    batch, head, query, key = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), batch, head, query, key, _DTYPES[x.dtype]


def _tables(positions: Tensor, inv_freq: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin), both [1 or B, N, rotated / 2] in the accumulation dtype, of the float32 angle, times factor."""
    positions, inv_freq = (positions[None] if positions.dim() == 1 else positions).contiguous(), inv_freq.contiguous()
    tables = torch.promote_types(dtype, torch.float32)
    cos, sin = torch.empty(2, *positions.shape, len(inv_freq), dtype=tables, device="cpu")
    params = native().AngleParams()
    params.tokens, params.half, params.dtype = positions.numel(), len(inv_freq), _DTYPES[tables]
    params.positions, params.inv_freq, params.factor = positions.data_ptr(), inv_freq.data_ptr(), factor
    params.cos, params.sin = cos.data_ptr(), sin.data_ptr()
    params.threads = forked.num_threads()
    native().angles(params)
    return cos, sin


def _angles(cos: Tensor, sin: Tensor) -> tuple[int, int, int]:
    return cos.data_ptr(), sin.data_ptr(), cos.stride(0) if cos.shape[0] > 1 else 0
