"""How far a result may stand from the exact one: a budget that comes from data, not from taste.

    |result - exact| <= 2 * max |eager - exact| + terms

`exact` is computed in float64, `eager` by plain PyTorch in the dtype of the call (FlashAttention's tests use the same
rule). Where eager happens to be lucky (one key, round numbers), its error says nothing about what rounding may do, so a
floor stands beside it: the rounding unit times the terms of each sum before they cancel. tests/oracle.py derives the
terms; for the output they are eps * sum_j p_ij |v_j|, and a score's own rounding on top.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0
_UNIT_FLOAT64 = 2.0**-40  # 1e-12: here the exact result has rounding errors itself, of the same kind


def rounding_unit(dtype: torch.dtype) -> float:
    """What one rounding to `dtype` may change, relatively, and then a bit: eps is two units in the last place."""
    return _UNIT_FLOAT64 if dtype == torch.float64 else torch.finfo(dtype).eps


def accumulation_unit(dtype: torch.dtype) -> float:
    """The rounding unit of sums: float32 for all but float64."""
    return rounding_unit(torch.promote_types(dtype, torch.float32))


def exponential_unit(dtype: torch.dtype) -> float:
    """How exact the exponentials are that lse sums up. Those of narrow dtypes become weights of 8 or 11 bits."""
    return 2.0**-16 if dtype in (torch.bfloat16, torch.float16) else rounding_unit(dtype)


def assert_within_budget(
    got: Tensor, exact: Tensor, eager: Tensor | None = None, terms: Tensor | float = 0.0, name: str = "result"
) -> None:
    """Compare `got` with `exact`, by the rule above.

    Args:
        got: in any dtype; exact: float64, of its shape. Infinite entries must be the same in both; NaN is an error.
        eager: what PyTorch gives in got's dtype; None where it has nothing to say.
        terms: the floor, broadcastable to exact.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if not got.numel():
        return
    info = torch.finfo(got.dtype)
    got, subnormal = got.detach().double(), info.smallest_normal * info.eps
    finite = exact.isfinite()
    misfits = int((got.isfinite() != finite).sum())
    assert not misfits, f"{name}: {misfits} entries are finite and should not be, or the other way round"
    assert torch.equal(got[~finite], exact[~finite]), f"{name}: wrong infinity"
    error = (got - exact)[finite].abs()
    budget = torch.as_tensor(terms, dtype=torch.float64).expand(exact.shape)[finite] + subnormal
    if eager is not None:
        eager_error = (eager.detach().double() - exact)[finite].abs()
        budget = budget + FACTOR * (eager_error.max() if eager_error.numel() else 0.0)
    over = error > budget
    if over.any():
        worst = (error - budget).argmax()
        place = tuple(finite.nonzero()[worst].tolist())
        raise AssertionError(
            f"{name}: {int(over.sum())} of {got.numel()} entries outside their budget; "
            f"worst at {place}: error {error[worst]:.3e}, budget {budget[worst]:.3e}"
        )
