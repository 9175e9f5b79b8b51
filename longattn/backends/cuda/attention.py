"""From a Problem and its Tensors to calls of the library: attention and its gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from longattn.backends.angles import rotation_positions
from longattn.backends.base import Gradients
from longattn.backends.cuda.native import Call, Library, RopeCall, Rows
from longattn.problem import Problem, Tensors

_UNIT = 8  # 16-bit numbers in 16 bytes: widths, and strides, are multiples


def aligned(x: Tensor) -> Tensor:
    """x [B, H, N, D], or a copy that TMA can describe: rows of whole 16 bytes, zeros after them, none shared."""
    width = x.shape[3]
    fits = not width % _UNIT and not x.data_ptr() % (2 * _UNIT)
    for size, stride in zip(x.shape[:3], x.stride(), strict=False):
        fits = fits and (size == 1 or (stride > 0 and not stride % _UNIT))
    if fits:
        return x
    copy = x.new_zeros(*x.shape[:3], padded(width))
    copy[..., :width].copy_(x)
    return copy


def empty_rows(x: Tensor) -> Tensor:
    """x itself if kernels can write its rows, or an empty tensor of its shape, but for padding, whose rows they can."""
    fits = not x.shape[3] % _UNIT and not x.data_ptr() % (2 * _UNIT) and not any(n % _UNIT for n in x.stride()[:3])
    return x if fits else x.new_empty(*x.shape[:3], padded(x.shape[3]))


def padded(width: int) -> int:
    return math.ceil(width / _UNIT) * _UNIT


def forward(library: Library, problem: Problem, tensors: Tensors, out: Tensor, lse: Tensor) -> None:
    """Backend.forward."""
    if problem.varlen:  # tokens outside all sequences
        out.zero_()
        lse.fill_(-torch.inf)
    if not out.numel():
        return
    call, keep = attention_call(library, problem, tensors)
    rows = empty_rows(out)
    if rows is not out and problem.varlen:
        rows.zero_()
    call.out, call.lse = Rows.of(rows), lse.data_ptr()
    counters = torch.zeros(library.workspace(call).counters, dtype=torch.int32, device=out.device)
    call.counters = counters.data_ptr()
    library.run("forward", call)
    if rows is not out:
        out.copy_(rows[..., : problem.v_head_dim])
    del keep


def backward(
    library: Library,
    problem: Problem,
    tensors: Tensors,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    grads: Gradients,
) -> None:
    """Backend.backward."""
    wanted = [x for x in grads[:3] if x is not None]
    if problem.varlen or tensors.key_lens is not None or not problem.nk:  # tokens outside all sequences
        for x in wanted:
            x.zero_()
    if not problem.nk or not problem.nq or not lse.numel():
        for x in wanted:
            x.zero_()
        if grads.sink_logits is not None:
            _sink_gradient(tensors, out, lse, dout, dlse, grads.sink_logits)
        return
    call, keep = attention_call(library, problem, tensors)
    out, dout = aligned(out), aligned(dout)
    dlse = None if dlse is None else dlse.contiguous()
    call.out, call.dout, call.lse = Rows.of(out), Rows.of(dout), lse.data_ptr()
    call.dlse = None if dlse is None else dlse.data_ptr()
    call.deterministic = problem.deterministic
    rows = []
    for name, grad, like in zip(("dq", "dk", "dv"), grads[:3], tensors[:3], strict=True):
        to = empty_rows(torch.empty_like(like, memory_format=torch.contiguous_format) if grad is None else grad)
        if to is not grad and (problem.varlen or tensors.key_lens is not None):
            to.zero_()
        setattr(call, name, Rows.of(to))
        rows.append(to)
    sizes, device = library.workspace(call), lse.device
    counters = torch.zeros(sizes.counters, dtype=torch.int32, device=device)
    row_terms = torch.empty(sizes.row_terms, dtype=torch.float32, device=device)
    dq_sum = torch.empty(sizes.dq_sum, dtype=torch.float32, device=device)
    call.counters, call.row_terms, call.dq_sum = (x.data_ptr() for x in (counters, row_terms, dq_sum))
    library.run("backward", call)
    for to, grad in zip(rows, grads, strict=False):
        if grad is not None and to is not grad:
            grad.copy_(to[..., : grad.shape[3]])
    if tensors.inv_freq is not None:
        for grad, positions in zip(grads[:2], turning_positions(problem, tensors), strict=True):
            if grad is not None:
                grad.copy_(turned(library, problem, tensors, grad, positions, inverse=True))
    if grads.sink_logits is not None:
        _sink_gradient(tensors, out[..., : problem.v_head_dim], lse, dout, dlse, grads.sink_logits)
    del keep


def turning_positions(problem: Problem, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """float32 [N] or [B, N] of queries and of keys."""
    for_q, for_k, start = rotation_positions(problem, tensors)
    return for_k[..., start : start + problem.nq] if for_q is None else for_q, for_k


def turned(library: Library, problem: Problem, tensors: Tensors, x: Tensor, positions: Tensor, inverse: bool) -> Tensor:
    """x [B, H, N, D] rotated, in a new tensor."""
    assert tensors.inv_freq is not None
    out = torch.empty_like(x)
    rope(library, x, tensors.inv_freq, positions, problem.rope_factor, problem.interleaved, inverse, out)
    return out


def rope(
    library: Library,
    x: Tensor,
    inv_freq: Tensor,
    positions: Tensor,
    factor: float,
    interleaved: bool,
    inverse: bool,
    out: Tensor,
) -> None:
    """Backend.rope."""
    if not x.numel():
        return
    batch, heads, tokens, width = x.shape
    inv_freq, positions = inv_freq.contiguous(), positions.contiguous()
    by_batch = positions.dim() == 2 and positions.shape[0] > 1
    call = RopeCall(
        batch=batch,
        heads=heads,
        tokens=tokens,
        width=width,
        rotated=2 * inv_freq.shape[0],
        is_bfloat16=x.dtype == torch.bfloat16,
        interleaved=interleaved,
        inverse=inverse,
        x=Rows.of(x),
        out=Rows.of(out),
        inv_freq=inv_freq.data_ptr(),
        positions=positions.data_ptr(),
        positions_batch=tokens if by_batch else 0,
        factor=factor,
    )
    library.run("rope", call)


def _sink_gradient(tensors: Tensors, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, to: Tensor) -> None:
    """A sink is a key without a value: dlogit_h = -sum_i weight_i delta_i, delta_i = dout_i . out_i - dlse_i."""
    assert tensors.sink_logits is not None
    delta = (dout[..., : out.shape[3]].float() * out.float()).sum(-1)
    if dlse is not None:
        delta -= dlse
    weights = torch.exp(tensors.sink_logits.float()[:, None] - lse)
    to.copy_(-torch.where(lse == -torch.inf, 0.0, weights * delta).sum((0, 2)))


def attention_call(library: Library, problem: Problem, tensors: Tensors) -> tuple[Call, list[Any]]:
    """The call but for its results, and the tensors that it points into."""
    q, k, v = tensors.q, tensors.k, tensors.v
    if tensors.inv_freq is not None:
        for_q, for_k = turning_positions(problem, tensors)
        q = turned(library, problem, tensors, q, for_q, inverse=False)
        k = turned(library, problem, tensors, k, for_k, inverse=False)
    q, k, v = (aligned(x) for x in (q, k, v))
    if not problem.nk:  # TMA describes no empty tensor
        k, v = (x.new_zeros(*x.shape[:2], 1, x.shape[3]) for x in (k, v))
    mask = problem.mask
    call = Call(
        batch=problem.batch,
        q_heads=problem.q_heads,
        kv_heads=problem.kv_heads,
        nq=problem.nq,
        nk=problem.nk,
        head_dim=q.shape[3],
        v_head_dim=v.shape[3],
        is_bfloat16=problem.dtype == torch.bfloat16,
        q=Rows.of(q),
        k=Rows.of(k),
        v=Rows.of(v),
        left=-1 if mask.left is None else mask.left,
        right=-1 if mask.right is None else mask.right,
        sinks=mask.sinks,
        offset=mask.offset,
        from_end=mask.from_end,
        max_seqlen_q=problem.max_seqlen_q,
        max_seqlen_k=problem.max_seqlen_k,
        bounds_batch=problem.nq if tensors.lo is not None and tensors.lo.dim() == 2 else 0,
        scale=problem.scale,
        softcap=problem.softcap,
    )
    keep: list[Any] = [q, k, v]
    for name, x in (
        ("offsets", tensors.offset),
        ("key_lens", tensors.key_lens),
        ("key_mask", tensors.key_mask),
        ("lo", tensors.lo),
        ("hi", tensors.hi),
        ("cu_seqlens_q", tensors.cu_seqlens_q),
        ("cu_seqlens_k", tensors.cu_seqlens_k),
        ("sink_logits", None if tensors.sink_logits is None else tensors.sink_logits.float()),
    ):
        if x is not None:
            x = x.contiguous()
            keep.append(x)
            setattr(call, name, x.data_ptr())
    return call, keep
