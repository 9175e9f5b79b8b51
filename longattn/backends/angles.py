"""Where each token stands when rope turns it, for kernels that read tables of angles."""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.problem import Problem, Tensors


def rotation_positions(problem: Problem, tensors: Tensors) -> tuple[Tensor | None, Tensor, int]:
    """(for q, for k, start), both float32 [N] or [B, N]; for q None: query i stands where key start + i stands.

    Packed sequences count from the start of each. Queries that stand outside the keys, and see none of them, may get
    any position.
    """
    mask, device = problem.mask, tensors.q.device
    if problem.varlen:
        return _packed_positions(problem, tensors)
    for_k = tensors.positions_k
    if for_k is None:
        for_k = torch.arange(problem.nk, dtype=torch.float32, device=device)
    if tensors.positions_q is not None:
        return tensors.positions_q, for_k, 0
    if tensors.offset is None and (tensors.key_lens is None or not mask.from_end):
        start = mask.position(0, problem.nq, problem.nk)
        if 0 <= start and start + problem.nq <= problem.nk:
            return None, for_k, start
        shift = torch.full((1,), start, device=device)
    else:
        shift = _shift(problem, tensors, problem.nq, problem.nk)
    stands = shift[:, None] + torch.arange(problem.nq, device=device)
    return _look_up(stands, tensors.positions_k), for_k, 0


def _packed_positions(problem: Problem, tensors: Tensors) -> tuple[Tensor, Tensor, int]:
    cu_q, cu_k = tensors.cu_seqlens_q, tensors.cu_seqlens_k
    assert cu_q is not None and cu_k is not None
    sequence_q, local_q = _locate(cu_q, problem.nq)
    _, local_k = _locate(cu_k, problem.nk)
    for_k = local_k.float() if tensors.positions_k is None else tensors.positions_k
    if tensors.positions_q is not None:
        return tensors.positions_q, for_k, 0
    if problem.batch == 0:
        return torch.zeros(problem.nq, device=cu_q.device), for_k, 0
    lq, lk = cu_q.diff(), cu_k.diff()
    stands = local_q + _shift(problem, tensors, lq, lk)[sequence_q]
    if tensors.positions_k is not None:
        stands = (stands.clamp(min=0).minimum(lk[sequence_q] - 1) + cu_k[sequence_q]).clamp(min=0)
    return _look_up(stands, tensors.positions_k), for_k, 0


def _shift(problem: Problem, tensors: Tensors, lq: int | Tensor, lk: int | Tensor) -> Tensor:
    """The position of each sequence's first query: int64 [batch] or [1]."""
    mask, device = problem.mask, tensors.q.device
    if tensors.offset is not None:
        return tensors.offset.long()
    keys = lk if tensors.key_lens is None else tensors.key_lens.long()
    shift = keys - lq + mask.offset if mask.from_end else mask.offset
    return shift if isinstance(shift, Tensor) else torch.full((problem.batch,), shift, device=device)


def _locate(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(sequence, place in it) of each packed token; tokens outside all sequences count as of the nearest."""
    index = torch.arange(tokens, device=cu_seqlens.device)
    sequence = (torch.searchsorted(cu_seqlens, index, right=True, out_int32=False) - 1).clamp(
        0, max(0, len(cu_seqlens) - 2)
    )
    return sequence, index - cu_seqlens[sequence]


def _look_up(stands: Tensor, table: Tensor | None) -> Tensor:
    """Position p as a number, or entry p of the table given for keys."""
    if table is None:
        return stands.float()
    if table.shape[-1] == 0:
        return torch.zeros_like(stands, dtype=torch.float32)
    stands = stands.clamp(0, table.shape[-1] - 1)
    if stands.dim() == 1:
        return table[stands]
    rows = max(stands.shape[0], table.shape[0] if table.dim() == 2 else 1)
    return table.expand(rows, -1).gather(1, stands.expand(rows, -1))
