"""What a backend is: reasons why it cannot run a call, and the functions that run it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from longattn.problem import CacheTensors, Problem, Slots, Tensors


class Gradients(NamedTuple):
    """Gradients of one call by the name of the argument, None where not asked for."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sink_logits: Tensor | None = None


class Backend(ABC):
    """One way to compute attention. Backends never call each other; the registry chooses one per call."""

    name: ClassVar[str]

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this backend cannot run at all on this machine, or None."""

    @abstractmethod
    def reasons(self, problem: Problem) -> list[str]:
        """Why this backend cannot run the call; empty if it can. Looks at metadata only."""

    def passed_over(self) -> str | None:
        """Why "auto" leaves calls to other backends that this one could run when asked by name, or None."""
        return None

    @abstractmethod
    def forward(self, problem: Problem, tensors: Tensors, out: Tensor, lse: Tensor) -> None:
        """Fill out [B, Hq, Nq, Dv] and lse [B, Hq, Nq] (accumulation dtype, contiguous)."""

    @abstractmethod
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
        """Fill the tensors of `grads`; None where a gradient is not needed.

        Args:
            out, lse: what `forward` gave; or of an attention that this call is a block of, the results over all its
                keys: the gradients are then the block's part of those of the whole.
            dout: the gradient of out, unit stride in Dv; dlse: that of lse, or None for zero.
        """

    @abstractmethod
    def append(self, problem: Problem, tensors: CacheTensors, slots: Slots) -> None:
        """Write the new keys, rotated unless that is left to the reader, and values into the slots of a cache."""

    @abstractmethod
    def decode(self, problem: Problem, tensors: CacheTensors, slots: Slots, out: Tensor, lse: Tensor) -> None:
        """`append`, if there are new keys, then attend to all: fill out and lse as `forward`.

        Rows past a sequence's queries get 0 and -inf.
        """

    @abstractmethod
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
        """Fill out with x [B, H, N, D], its first 2 * len(inv_freq) entries rotated and scaled by `factor`.

        Args:
            inv_freq: float32, radians per position; positions: float32 [N] or [B, N].
            interleaved: pairs are (2i, 2i + 1) in place of (i, i + dim / 2).
            inverse: turn the other way.
        """
