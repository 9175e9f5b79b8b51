"""Tensors of more than 2^31 elements, on the CPU backend: every index is of 64 bits, forward and backward.

Inputs are memory that nobody wrote but for a few rows, and takes no room; what counts is what a call writes.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor

import longattn
from helpers import check_attention, random_qkv
from longattn import Rope
from longattn.backends import cpu

WIDTH = 512
ROWS = 2**31 // WIDTH + 200
SEEN = 70  # the rows in the end that hold numbers
GB = 2**30
MISSING = cpu.CpuBackend().unavailable()
pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="this system has no memory that is not there"),
]


def need(gigabytes: int) -> None:
    """Skip where less memory is free."""
    if available() < gigabytes * GB:
        pytest.skip(f"needs {gigabytes} GB of memory, and {available() / GB:.0f} GB are free")


def available() -> float:
    """Bytes of memory that a process may still take; unlimited where the system does not tell."""
    table = Path("/proc/meminfo")
    lines = table.read_text().splitlines() if table.exists() else []
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), float("inf"))


def zeros(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take room where they are written."""
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype)


def ending_with(x: Tensor) -> Tensor:
    """[1, 1, ROWS, WIDTH], zero but for x [1, 1, SEEN, WIDTH] in the end."""
    huge = zeros(ROWS * WIDTH, x.dtype).view(1, 1, ROWS, WIDTH)
    assert huge.numel() > 2**31
    huge[:, :, -SEEN:] = x
    return huge


def assert_ends_with(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got[:, :, -expected.shape[2] :], expected)
    assert not got[:, :, : -SEEN - WINDOW : ROWS // 999].any()


WINDOW = 9


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last queries at the last keys. Of more queries than keys, all but the last see nothing and give 0."""
    out = longattn.attention(q, k, v, causal=True, window=WINDOW, backend="cpu")
    assert isinstance(out, Tensor)
    return out


def test_queries_and_outputs() -> None:
    need(6)
    q, k, v = random_qkv(1, (1, 1), (SEEN, SEEN), WIDTH, torch.bfloat16)
    assert_ends_with(attend(ending_with(q), k, v), attend(q, k, v))


def test_gradients_of_queries() -> None:
    need(15)  # with the sums in float32
    q, k, v = random_qkv(1, (1, 1), (SEEN, SEEN), (WIDTH, 8), torch.bfloat16)
    dout = torch.randn_like(v)
    (expected,) = torch.autograd.grad(attend(q.requires_grad_(), k, v), q, dout)
    huge = ending_with(q.detach()).requires_grad_()
    dout = torch.nn.functional.pad(dout, (0, 0, ROWS - SEEN, 0))
    assert_ends_with(torch.autograd.grad(attend(huge, k, v), huge, dout)[0], expected)


def test_keys_and_values() -> None:
    need(11)
    q, k, v = random_qkv(1, (1, 1), (SEEN - WINDOW, SEEN), WIDTH, torch.float16)
    dout = torch.randn_like(q)
    small = [x.clone().requires_grad_() for x in (q, k, v)]
    huge = [x.requires_grad_() for x in (q.clone(), ending_with(k), ending_with(v))]
    expected_out, out = attend(*small), attend(*huge)
    torch.testing.assert_close(out, expected_out)
    expected, got = (torch.autograd.grad(x, leaves, dout) for x, leaves in ((expected_out, small), (out, huge)))
    torch.testing.assert_close(got[0], expected[0])
    assert_ends_with(got[1], expected[1])
    assert_ends_with(got[2], expected[2])


def test_rope() -> None:
    need(6)
    x = torch.randn(1, 1, SEEN, WIDTH, dtype=torch.bfloat16)
    got = longattn.apply_rope(ending_with(x), Rope(2), backend="cpu")
    assert_ends_with(got, longattn.apply_rope(x, Rope(2), torch.arange(ROWS - SEEN, ROWS)))


def test_strides() -> None:
    """A few tokens, each so far from the next that the last stand past 2^31 elements."""
    stride = 2**31 // 30
    memory = zeros(40 * stride, torch.bfloat16)
    q, k, v = (memory[at:].as_strided((1, 2, 40, 16), (0, 64, stride, 1)) for at in (0, 1024, 2048))
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape))
    check_attention(q, k, v, backend="cpu", causal=True, rope=Rope(16))
    turned = longattn.apply_rope(k, Rope(16), backend="cpu")
    assert torch.equal(turned, longattn.apply_rope(k.contiguous(), Rope(16), backend="cpu"))
