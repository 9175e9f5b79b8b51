"""The oracle: the contract in eager float64. Slow, and never wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.backends import eager, eager_cache
from longattn.backends.base import Backend, Gradients
from longattn.problem import CacheTensors, Problem, Slots, Tensors


class ReferenceBackend(Backend):
    """Eager PyTorch in float64 on the tensors' own device; on "meta", operators return shapes and call no backend."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def reasons(self, problem: Problem) -> list[str]:
        if problem.device not in ("cpu", "cuda", "xpu", "meta"):
            return [f"device {problem.device} has no float64 PyTorch kernels to run on"]
        return []

    def forward(self, problem: Problem, tensors: Tensors, out: Tensor, lse: Tensor) -> None:
        eager.forward(problem, tensors, out, lse, torch.float64)

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
        eager.backward(problem, tensors, out, lse, dout, dlse, grads, torch.float64)

    def append(self, problem: Problem, tensors: CacheTensors, slots: Slots) -> None:
        eager_cache.append(problem, tensors, slots)

    def decode(self, problem: Problem, tensors: CacheTensors, slots: Slots, out: Tensor, lse: Tensor) -> None:
        eager_cache.decode(problem, tensors, slots, out, lse)

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
        out.copy_(eager.rotate(x.double(), inv_freq, positions, factor, interleaved, inverse))
