"""Which GPUs the kernels are proven on, and the check that runs once on all others."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path

import torch

_PROVEN = Path(__file__).with_name("proven.json")
_OLDEST = 80
_TOLERANCE = 2e-2  # of a float16 result against float64; a wrong kernel is off by its whole size


def of(device: torch.device) -> int:
    """A GPU's compute capability, 10 * major + minor; the oldest supported for what is none."""
    return _capability(device.index) if device.type == "cuda" else _OLDEST


def proven() -> dict[str, str]:
    """Architectures ("sm_90") that passed every GPU test, with the release of the kernels that did."""
    return dict(json.loads(_PROVEN.read_text(encoding="utf-8")))


def fault() -> str | None:
    """Why the kernels must not run on the current GPU, or None."""
    return _fault(torch.cuda.current_device())


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _fault(device: int) -> str | None:
    name = torch.cuda.get_device_name(device)
    if torch.version.cuda is not None:
        capability = _capability(device)
        if capability < _OLDEST:
            return f"{name} is older than compute capability 8.0"
        if f"sm_{capability}" in proven():
            return None
    wrong = self_check(torch.device("cuda", device))
    if wrong is None:
        warnings.warn(
            f"longattn's Triton kernels are not yet proven on {name}: they passed a short check against the reference",
            RuntimeWarning,
            stacklevel=6,
        )
        return None
    return f"a check of the kernels on {name} failed: {wrong}"


def self_check(device: torch.device) -> str | None:
    """Run a small call forward and backward on `device` and compare with plain attention; what is wrong, or None."""
    from longattn.backends.base import Gradients
    from longattn.backends.triton import attention
    from longattn.mask import Mask
    from longattn.problem import Problem, Tensors

    batch, q_heads, kv_heads, n, width, left = 1, 2, 1, 260, 64, 150
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        return (
            torch.randn(batch, heads, n, width, generator=generator, dtype=torch.float64, device="cpu")
            .half()
            .to(device)
        )

    q, k, v, dout = draw(q_heads), draw(kv_heads), draw(kv_heads), draw(q_heads)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    age = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)
    hidden = (age < 0) | (age > left)
    with torch.enable_grad():
        grouped = [exact[0], *(x.repeat_interleave(q_heads // kv_heads, 1) for x in exact[1:])]
        scores = (grouped[0] @ grouped[1].mT * width**-0.5).masked_fill(hidden, -torch.inf)
        exact_out = scores.softmax(-1) @ grouped[2]
        expected = [exact_out.detach(), *torch.autograd.grad(exact_out, exact, dout.double())]

    problem = Problem(
        batch, q_heads, kv_heads, n, n, width, width, q.dtype, device.type, Mask(left, 0), width**-0.5
    )  # fmt: skip
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=device)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    try:
        with torch.cuda.device_of(q):
            call = attention.Call(problem, Tensors(q, k, v), of(q.device), device.type == "cpu")
            call.forward(out, lse)
            call.backward(out, lse, dout, None, Gradients(dq, dk, dv))
    except Exception as error:  # whatever a compiler or driver may throw: the call then goes to another backend
        return f"{type(error).__name__}: {error}"[:300]
    for name, got, right in zip(("out", "dq", "dk", "dv"), (out, dq, dk, dv), expected, strict=True):
        off = float((got.double() - right).abs().max() / right.abs().max())
        if not off < _TOLERANCE:
            return f"{name} is off by {off:.1e} of its largest entry"
    return None
