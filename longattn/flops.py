"""Floating-point operations of a call, and formulas for torch.utils.flop_counter.

Counts are those of the matrix products: 2 for a multiplication and an addition, for each pair of a query and a key that
see each other. Softmax, rotations and masks are not counted, as PyTorch's own formulas do not count them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longattn.problem import Problem, Tensors


class Products(NamedTuple):
    """How many rows as wide as a key, and as wide as a value, a pair multiplies."""

    keys: int
    values: int


FORWARD = Products(1, 1)  # q k', p v
BACKWARD = Products(3, 2)  # q k', dout v', p' dout, ds k, ds' q
JVP = Products(3, 2)  # q k' and its two tangents; p v and its two
DOUBLE_BACKWARD = Products(7, 5)


def operations(problem: Problem, pairs: int, products: Products) -> int:
    """Return the operations of all heads, given the (query, key) pairs of one head in all sequences."""
    return 2 * problem.q_heads * pairs * (products.keys * problem.head_dim + products.values * problem.v_head_dim)


def visible_pairs(problem: Problem, tensors: Tensors | None = None) -> int:
    """Count the pairs of one head that causal, window, sinks and alignment let see each other, in all sequences.

    What tensors hide (key_mask, key_lens, bounds, bias) counts as visible. Offsets in a tensor are not read either:
    each query then counts as many keys as its window may hold. Packed sequences have the lengths that cu_seqlens hold
    if those are on the CPU, and max_seqlen each if they are elsewhere, fake or without data.

    Args:
        tensors: of the call; None for a call on a cache.
    """
    mask = problem.mask
    if tensors is not None and tensors.offset is not None:
        longest = problem.max_seqlen_k if problem.varlen else problem.nk
        if mask.left is not None and mask.right is not None:
            longest = min(longest, mask.left + mask.right + 1 + mask.sinks)
        return longest * problem.nq * (1 if problem.varlen else problem.batch)
    if tensors is None or not problem.varlen:
        return problem.batch * mask.visible_pairs(problem.nq, problem.nk)
    lengths = [_lengths(x) for x in (tensors.cu_seqlens_q, tensors.cu_seqlens_k)]
    if lengths[0] is None or lengths[1] is None:
        return problem.batch * mask.visible_pairs(problem.max_seqlen_q, problem.max_seqlen_k)
    return sum(mask.visible_pairs(lq, lk) for lq, lk in zip(*lengths, strict=True))


def _lengths(cu_seqlens: Tensor | None) -> list[int] | None:
    if cu_seqlens is None or type(cu_seqlens) is not Tensor or cu_seqlens.device.type != "cpu":
        return None
    return cu_seqlens.diff().tolist()


Formula = Callable[..., int]


def offer(formulas: Mapping[Any, Formula]) -> None:
    """Make the formulas known to torch.utils.flop_counter, if it is loaded, and to the counters that are on.

    A counter copies the table of all formulas when it is made, which may be before ours exist.

    Args:
        formulas: by operator, on its arguments and `out_val`.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    modes = [torch._C._get_dispatch_stack_at(at) for at in range(torch._C._len_torch_dispatch_stack())]
    counters = [getattr(mode, "counter", None) for mode in modes]
    tables = [counter.flop_registry for counter in counters if isinstance(counter, module.FlopCounterMode)]
    for table in (module.flop_registry, *tables):
        for operator, formula in formulas.items():
            table.setdefault(operator, formula)
