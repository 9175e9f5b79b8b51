"""From a call on a cache to calls of the library: first the new tokens, then attention to all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.backends.cuda.attention import aligned, empty_rows
from longattn.backends.cuda.native import Call, Library, Rows
from longattn.problem import CacheTensors, Problem, Slots


def append(library: Library, problem: Problem, tensors: CacheTensors, slots: Slots) -> None:
    """Backend.append."""
    if problem.nq and slots.table.numel() and tensors.k is not None:
        call, keep = _cache_call(problem, tensors, slots)
        library.run("append", call)
        del keep


def decode(library: Library, problem: Problem, tensors: CacheTensors, slots: Slots, out: Tensor, lse: Tensor) -> None:
    """Backend.decode."""
    if not out.numel():
        return append(library, problem, tensors, slots)
    assert tensors.q is not None
    call, keep = _cache_call(problem, tensors, slots)
    rows = problem.nq * problem.group
    packed_q = torch.empty(
        problem.batch, problem.kv_heads, rows, problem.head_dim, dtype=problem.dtype, device=out.device
    )
    to = empty_rows(out)
    call.packed_q, call.out, call.lse = packed_q.data_ptr(), Rows.of(to), lse.data_ptr()
    sizes = library.workspace(call)
    counters = torch.zeros(sizes.counters, dtype=torch.int32, device=out.device)
    partial_out = torch.empty(sizes.partial_out, dtype=torch.float32, device=out.device)
    partial_lse = torch.empty(sizes.partial_lse, dtype=torch.float32, device=out.device)
    call.counters, call.partial_out, call.partial_lse = (x.data_ptr() for x in (counters, partial_out, partial_lse))
    library.run("append", call)
    library.run("decode", call)
    if to is not out:
        out.copy_(to[..., : problem.v_head_dim])
    del keep


def _cache_call(problem: Problem, tensors: CacheTensors, slots: Slots) -> tuple[Call, list[Any]]:
    """The call but for its results, and the tensors that it points into."""
    mask, page_size, table_width = problem.mask, slots.k.shape[2], slots.table.shape[1]
    used = min(table_width, 2 * max(1, -(-problem.nk // page_size)))  # how many parts a call is cut into follows nk
    call = Call(
        batch=problem.batch,
        q_heads=problem.q_heads,
        kv_heads=problem.kv_heads,
        nq=problem.nq,
        nk=used * page_size,
        head_dim=problem.head_dim,
        v_head_dim=problem.v_head_dim,
        is_bfloat16=problem.dtype == torch.bfloat16,
        k=Rows.of(slots.k),
        v=Rows.of(slots.v),
        left=-1 if mask.left is None else mask.left,
        right=-1 if mask.right is None else mask.right,
        sinks=mask.sinks,
        from_end=True,
        scale=problem.scale,
        softcap=problem.softcap,
        table=slots.table.data_ptr(),
        table_width=table_width,
        pages=slots.k.shape[0],
        page_size=page_size,
        interleaved=problem.interleaved,
        rope_factor=problem.rope_factor,
    )
    keep: list[Any] = [slots.table]
    for name, x in (("q", tensors.q), ("new_k", tensors.k), ("new_v", tensors.v)):
        if x is not None:
            x = aligned(x)
            keep.append(x)
            setattr(call, name, Rows.of(x))
    sink_logits = None if tensors.sink_logits is None else tensors.sink_logits.float()
    for name, x in (
        ("key_lens", tensors.key_lens),
        ("query_lens", tensors.query_lens),
        ("sink_logits", sink_logits),
        ("inv_freq", tensors.inv_freq),
        ("positions", tensors.positions),
    ):
        if x is not None:
            x = x.contiguous()
            keep.append(x)
            setattr(call, name, x.data_ptr())
    if tensors.inv_freq is not None:
        call.rotated = 2 * tensors.inv_freq.shape[-1]
        call.inv_freq_batch = _batch_stride(tensors.inv_freq)
    if tensors.positions is not None:
        call.positions_batch = _batch_stride(tensors.positions)
    return call, keep


def _batch_stride(x: Tensor) -> int:
    """Of x [N] or [B, N], once contiguous."""
    return x.shape[-1] if x.dim() == 2 and x.shape[0] > 1 else 0
