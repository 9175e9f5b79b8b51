"""What a contender is: one way to do the computation of a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import longattn.functional
from longattn.bench.cases import Case, Inputs

Role = Literal["ours", "peer", "baseline"]

# Bytes that a contender may spend on something of Nq * Nk entries; what needs more is refused, not run.
QUADRATIC_LIMIT = {"cpu": 2**27, "cuda": 2**31}


class Refused(Exception):
    """The contender cannot do this case, and why."""


class Prepared(NamedTuple):
    """A contender that is ready to run: `forward` gives the output, differentiable in the inputs that require grad.

    `held` are the tensors that it needs beside the inputs, such as a mask: they count as its memory.
    """

    forward: Callable[[], Tensor]
    held: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Contender:
    """One way to do a computation.

    Args:
        role: "ours", a "peer" to compare with, or a "baseline" that does less, such as only reading the input.
        prepare: from the case and its inputs; raises Refused. Whatever is done once per shape happens here, untimed:
            compiling, masks, tables of angles.
        compiled: whether preparing takes a compiler, and so seconds.
    """

    name: str
    role: Role
    prepare: Callable[[Any, Any], Prepared]
    compiled: bool = False


Outputs = tuple[Tensor, ...]  # what a case computes: the output, and the gradients if it wants them


def runnable(prepared: Prepared, inputs: Inputs) -> Callable[[], Outputs]:
    """The call that is measured."""
    if inputs.dout is None:
        return lambda: (prepared.forward(),)

    def forward_and_backward() -> Outputs:
        out = prepared.forward()
        return out.detach(), *torch.autograd.grad(out, inputs.wanted, inputs.dout)

    return forward_and_backward


def warmed_up(contender: Contender, case: Case, inputs: Inputs) -> tuple[Callable[[], Outputs], Outputs]:
    """The call that is measured, and what it gave the first time.

    Raises:
        Refused: the contender cannot do the case; or it is not ours, and fails.
    """
    try:
        call = runnable(contender.prepare(case, inputs), inputs)
        return call, call()
    except Refused:
        raise
    except Exception as error:
        if contender.role == "ours":
            raise
        lines = str(error).strip().splitlines() or [""]
        raise Refused(f"{type(error).__name__}: {lines[0]}"[:200]) from error


def refuse_quadratic(case: Case, what: str, size: int) -> None:
    """Refused if `size` bytes are more than the limit."""
    limit = QUADRATIC_LIMIT[case.device]
    if size > limit:
        raise Refused(f"its {what} would take {size / 1e6:.0f} MB; left out above {limit / 1e6:.0f} MB")


def refuse_reference(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> None:
    """Refused if our call would run on the float64 reference backend, which is written to be right."""
    explanation = longattn.functional.explain(q, k, v, **keywords)
    if explanation.backend in (None, "reference"):
        why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in explanation.reasons.items() if reasons)
        raise Refused(f"would run on the reference backend ({why})")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one fixed shape."""
    return torch.compile(function, dynamic=False, fullgraph=True)
