"""The contenders of the rotation: ours, eager PyTorch with tables of cosines and sines, and the same compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import longattn.functional
from longattn.bench.cases import RopeCase, RopeInputs
from longattn.bench.contenders import Contender, Prepared, compiled, refuse_reference

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [B, H, N, D], cos and sin [N, D / 2 or D] -> like x


def contenders(case: RopeCase) -> list[Contender]:
    """Ours makes its angles in the call; the peers have theirs as tables."""
    return [
        Contender("longattn", "ours", _ours),
        Contender("eager, rotate_half", "peer", partial(_with_tables, rotate_half, full=True)),
        Contender("eager, addcmul", "peer", partial(_with_tables, addcmul)),
        Contender("torch.compile", "peer", _compiled, compiled=True),
        Contender("plain copy", "baseline", _plain_copy),
    ]


def tables(case: RopeCase, full: bool = False) -> tuple[Tensor, Tensor]:
    """cos and sin [N, D / 2] in the dtype of x; twice side by side if `full`."""
    cos, sin = case.rope.tables(torch.arange(case.n, device=case.device), dtype=case.torch_dtype)
    return (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)) if full else (cos, sin)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in Hugging Face transformers."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def addcmul(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """With fewer passes over memory, the quickest of the eager forms that were tried."""
    first, second = x.chunk(2, -1)
    rotated = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(rotated, -1)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The form that torch.compile makes most of."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _ours(case: RopeCase, inputs: RopeInputs) -> Prepared:
    x, rope = inputs.x, case.rope
    refuse_reference(x, x, x, rope=rope)
    return Prepared(lambda: longattn.functional.apply_rope(x, rope))


def _with_tables(rotate: Rotate, case: RopeCase, inputs: RopeInputs, full: bool = False) -> Prepared:
    cos, sin = tables(case, full)
    return Prepared(lambda: rotate(inputs.x, cos, sin), (cos, sin))


def _compiled(case: RopeCase, inputs: RopeInputs) -> Prepared:
    return _with_tables(compiled(halves), case, inputs)


class _Copy(torch.autograd.Function):
    """A copy whose backward copies, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return dout.clone()


def _plain_copy(case: RopeCase, inputs: RopeInputs) -> Prepared:
    return Prepared(lambda: _Copy.apply(inputs.x))
