"""The CUDA kernels on a Hopper GPU: `python -m pytest tests/gpu -m hopper`. They have not been there yet."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longattn
import oracle
from helpers import _compare, drawn, one_thread, run
from longattn.backends import registry

pytestmark = [
    pytest.mark.hopper,
    pytest.mark.skipif(registry.get("cuda").unavailable() is not None, reason="no CUDA kernels, or no GPU"),
]

MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"causal": True, "window": 150, "sinks": 5},
    {"window": (20, 64)},
    {"softcap": 5.0, "causal": True},
)
LENGTHS = ((1, 1), (3, 513), (64, 128), (239, 1), (113, 203), (384, 256), (1023, 1024), (1024, 1023))
PROGRAM = """
import torch, longattn
for width in (64, 128, 256):
    q, k, v = (torch.randn(1, 2, 200, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    for keywords in ({}, {"causal": True, "window": 60, "sinks": 3, "deterministic": True}):
        longattn.attention(q, k, v, backend="cuda", **keywords).sum().backward()
torch.cuda.synchronize()
"""


def on_gpu(*arguments: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    moved = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in keywords.items()}
    out, lse = longattn.attention(*(x.cuda() for x in arguments), backend="cuda", **moved)
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize(
    ("lengths", "mask", "heads", "width", "dtype"),
    drawn(LENGTHS, MASKS, ((2, 2), (4, 1)), (64, 96, 128, 192, 256), (torch.bfloat16, torch.float16), rounds=4),
)
def test_random_calls(
    lengths: tuple[int, int], mask: dict[str, Any], heads: tuple[int, int], width: int, dtype: torch.dtype
) -> None:
    q = torch.randn(2, heads[0], lengths[0], width).to(dtype)
    k, v = (torch.randn(2, heads[1], lengths[1], width).to(dtype) for _ in range(2))
    dout, dlse = torch.randn_like(q), torch.randn(q.shape[:3])
    got = run(on_gpu, (q, k, v), dout, dlse, **mask)
    with one_thread():
        exact = oracle.results(q, k, v, dout, dlse, **mask)
        eager = oracle.results(q, k, v, dout, dlse, dtype=dtype, **mask)
        terms = oracle.rounding_terms(q, k, v, dout, dlse, dtype=dtype, **mask)
        _compare(got, exact, eager, terms, q)


def test_repeated_calls_give_the_same_bits() -> None:
    """All but dq, whose sums only a deterministic call orders."""
    q, k, v = (torch.randn(2, 8, 3000, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    for deterministic in (False, True):
        first: list[Tensor] | None = None
        for _ in range(20):
            out = longattn.attention(q, k, v, causal=True, backend="cuda", deterministic=deterministic)
            found = [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]
            first = first or found
            kept = range(4) if deterministic else (0, 2, 3)
            assert all(torch.equal(found[i], first[i]) for i in kept)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    root = Path(__file__).resolve().parents[2]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
