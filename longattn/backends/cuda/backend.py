"""The CUDA backend: says what it can run, and calls the library."""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.backends.base import Backend, Gradients
from longattn.backends.cuda import architecture, attention, cached, native
from longattn.problem import CacheTensors, Problem, Slots, Tensors

_DTYPES = (torch.float16, torch.bfloat16)
_LONGEST = 1 << 29  # positions and window sides are summed in 32 bits
_REFUSED = ("bias", "alibi_slopes", "dropout", "ring", "int8", "tree", "rotate_on_read")


class CudaBackend(Backend):
    """Kernels for compute capability 9.0; in tests the same on CPU tensors, if the library is the host emulator's."""

    name = "cuda"

    def unavailable(self) -> str | None:
        if isinstance(native.found, str):
            return native.found
        if not native.found.emulated and not torch.cuda.is_available():
            return "there is no GPU that torch can use"
        return None

    def reasons(self, problem: Problem) -> list[str]:
        kernels = _library()
        device = "cpu" if kernels.emulated else "cuda"
        if problem.device != device:
            return [f"runs on {device}, not on {problem.device}"]
        found = []
        if problem.dtype not in _DTYPES:
            found.append(f"runs float16 and bfloat16, not {str(problem.dtype)[6:]}")
        found += [f"has no {name}" for name in _REFUSED if name in problem.features]
        for name, width in (("head_dim", problem.head_dim), ("v_head_dim", problem.v_head_dim)):
            if width > kernels.widest:
                found.append(f"{name} is at most {kernels.widest}, not {width}")
        if (
            problem.needs_grad
            and "bounds" in problem.features
            and ("softcap" in problem.features or not problem.scale > 0)
        ):
            found.append("has no gradients of bounds with softcap, or with a scale that is not positive")
        if "cache" in problem.features:
            if problem.storage not in (problem.dtype, torch.int8):  # int8 is refused above
                found.append(f"reads caches of the call's own {str(problem.dtype)[6:]}, not {str(problem.storage)[6:]}")
            if problem.head_dim % 8 or problem.v_head_dim % 8:
                found.append("reads caches whose heads are multiples of 8 wide")
        if max(problem.nq, problem.nk, abs(problem.mask.offset)) >= _LONGEST:
            found.append(f"positions are below {_LONGEST}")
        if not found and device == "cuda" and not torch.compiler.is_compiling():
            fault = architecture.fault()
            if fault is not None:
                found.append(fault)
        return found

    def passed_over(self) -> str | None:
        if _library().emulated:
            return "the emulator runs only what names it"
        return None if architecture.is_proven() else "the kernels are not yet proven on this GPU"

    def forward(self, problem: Problem, tensors: Tensors, out: Tensor, lse: Tensor) -> None:
        with torch.cuda.device_of(out):
            attention.forward(_library(), problem, tensors, out, lse)

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
        with torch.cuda.device_of(out):
            attention.backward(_library(), problem, tensors, out, lse, dout, dlse, grads)

    def append(self, problem: Problem, tensors: CacheTensors, slots: Slots) -> None:
        with torch.cuda.device_of(slots.k):
            cached.append(_library(), problem, tensors, slots)

    def decode(self, problem: Problem, tensors: CacheTensors, slots: Slots, out: Tensor, lse: Tensor) -> None:
        with torch.cuda.device_of(out):
            cached.decode(_library(), problem, tensors, slots, out, lse)

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
        with torch.cuda.device_of(out):
            attention.rope(_library(), x, inv_freq, positions, factor, interleaved, inverse, out)


def _library() -> native.Library:
    assert isinstance(native.found, native.Library)
    return native.found
