"""The Triton backend: says what it can run, and starts the kernels. Loads Triton on first use."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from longattn.backends.base import Backend, Gradients
from longattn.backends.triton import architecture
from longattn.problem import CacheTensors, Problem, Slots, Tensors

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INSTALLED = importlib.util.find_spec("triton") is not None
_LONGEST = 1 << 29  # positions and window sides are summed in 32 bits


class TritonBackend(Backend):
    """Kernels in Triton; on CPU tensors in its interpreter, if TRITON_INTERPRET=1 was set before Triton was loaded."""

    name = "triton"

    def unavailable(self) -> str | None:
        if not _INSTALLED:
            return "Triton is not installed"
        if not _finds_gpu() and not _interpreted():
            return "there is no GPU that torch can use"
        return None

    def reasons(self, problem: Problem) -> list[str]:
        if problem.device == "cpu":
            if not _interpreted():
                return ["runs on GPUs; on the cpu only in Triton's interpreter (TRITON_INTERPRET=1)"]
        elif problem.device != "cuda":
            return [f"runs on cuda, not on {problem.device}"]
        found = []
        if problem.dtype not in _DTYPES:
            found.append(f"runs float16, bfloat16 and float32, not {str(problem.dtype)[6:]}")
        if problem.storage == torch.float64:
            found.append("reads caches of float32, bfloat16, float16 and int8, not float64")
        for name, width in (("head_dim", problem.head_dim), ("v_head_dim", problem.v_head_dim)):
            if width > 512:
                found.append(f"{name} is at most 512, not {width}")
        if max(problem.nq, problem.nk, abs(problem.mask.offset)) >= _LONGEST:
            found.append(f"positions are below {_LONGEST}")
        if not found and problem.device == "cuda" and not torch.compiler.is_compiling():
            fault = architecture.fault()
            if fault is not None:
                found.append(fault)
        return found

    def forward(self, problem: Problem, tensors: Tensors, out: Tensor, lse: Tensor) -> None:
        with _device_of(out):
            _attention().Call(problem, tensors, architecture.of(out.device), _interpreted()).forward(out, lse)

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
        with _device_of(out):
            call = _attention().Call(problem, tensors, architecture.of(out.device), _interpreted())
            call.backward(out, lse, dout, dlse, grads)

    def append(self, problem: Problem, tensors: CacheTensors, slots: Slots) -> None:
        with _device_of(slots.k):
            _cached().append(problem, tensors, slots)

    def decode(self, problem: Problem, tensors: CacheTensors, slots: Slots, out: Tensor, lse: Tensor) -> None:
        with _device_of(out):
            _cached().decode(problem, tensors, slots, out, lse, _interpreted())

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
        with _device_of(out):
            attention = _attention()
            attention.rope([attention.Turn(x, positions, out)], inv_freq, factor, interleaved, inverse)


@functools.cache
def _finds_gpu() -> bool:
    return torch.cuda.is_available()


@functools.cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _attention() -> ModuleType:
    from longattn.backends.triton import attention

    return attention


def _cached() -> ModuleType:
    from longattn.backends.triton import cached

    return cached


def _device_of(x: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device; a no-op for tensors of the cpu."""
    return torch.cuda.device_of(x)
