"""The CUDA kernels on a Hopper GPU: `python -m pytest tests/gpu -m hopper`. They have not been there yet."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longattn
import oracle
from helpers import _compare, drawn, one_thread, run
from longattn import KVCache, PagedKVCache, Rope, attention_with_cache
from longattn.backends import registry

pytestmark = [
    pytest.mark.hopper,
    pytest.mark.skipif(registry.get("cuda").unavailable() is not None, reason="no CUDA kernels, or no GPU"),
]

DEVICE = "cuda"
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


def moved(x: Any, device: str) -> Any:
    """x, and what is in it, on another device."""
    if isinstance(x, Tensor):
        return x.to(device)
    return type(x)(moved(item, device) for item in x) if type(x) is tuple else x


def on_gpu(*arguments: Any, **keywords: Any) -> Any:
    """longattn.attention, or attention_varlen if there is more than q, k and v, on the GPU, from the CPU and back."""
    function = longattn.attention if len(arguments) == 3 else longattn.attention_varlen
    keywords = {name: moved(x, DEVICE) for name, x in keywords.items()}
    return moved(function(*(moved(x, DEVICE) for x in arguments), backend="cuda", **keywords), "cpu")


def check(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> None:
    """Forward and backward against the oracle: off by twice what the formula in q's dtype is off, and rounding."""
    dout, dlse = torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype), torch.randn(q.shape[:3])
    got = run(on_gpu, (q, k, v), dout, dlse, **keywords)
    with one_thread():
        exact = oracle.results(q, k, v, dout, dlse, **keywords)
        eager = oracle.results(q, k, v, dout, dlse, dtype=q.dtype, **keywords)
        terms = oracle.rounding_terms(q, k, v, dout, dlse, dtype=q.dtype, **keywords)
        _compare(got, exact, eager, terms, q)


@pytest.mark.parametrize(
    ("lengths", "mask", "heads", "width", "dtype"),
    drawn(LENGTHS, MASKS, ((2, 2), (4, 1)), (64, 96, 128, 192, 256), (torch.bfloat16, torch.float16), rounds=4),
)
def test_random_calls(
    lengths: tuple[int, int], mask: dict[str, Any], heads: tuple[int, int], width: int, dtype: torch.dtype
) -> None:
    q = torch.randn(2, heads[0], lengths[0], width).to(dtype)
    k, v = (torch.randn(2, heads[1], lengths[1], width).to(dtype) for _ in range(2))
    check(q, k, v, **mask)


def ints(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape).int()


B, HQ, NQ, NK = 2, 4, 145, 301
FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "offsets": lambda: {"causal": True, "align": ints(-40, 200, B)},
    "key_mask": lambda: {"key_mask": torch.rand(B, NK) < 0.4, "causal": True},
    "key_lens": lambda: {"key_lens": ints(0, NK + 1, B), "window": 90},
    "bounds": lambda: {"bounds": (ints(0, 150, B, NQ), ints(100, NK, B, NQ)), "sinks": 2, "window": (110, -1)},
    "softcap": lambda: {"softcap": 1.5, "causal": True},
    "sink_logits": lambda: {"sink_logits": torch.randn(HQ), "causal": True, "align": -40},
    "rope": lambda: {"rope": Rope(40, interleaved=True), "positions": ints(0, 10**5, B, NK), "causal": True},
    "negative scale": lambda: {"scale": -0.3, "window": 50},
}


@pytest.mark.parametrize(
    ("feature", "widths"), drawn(FEATURES, ((64, 64), (96, 128), (192, 128), (256, 256)), rounds=2)
)
def test_features(feature: str, widths: tuple[int, int]) -> None:
    shapes = ((HQ, NQ, widths[0]), (2, NK, widths[0]), (2, NK, widths[1]))
    q, k, v = (torch.randn(B, *shape).bfloat16() for shape in shapes)
    check(q, k, v, **FEATURES[feature]())


@pytest.mark.parametrize("width", [64, 128, 256])
def test_packed(width: int) -> None:
    lengths = ((5, 9), (0, 4), (190, 301), (1, 1), (70, 70))
    cu_q, cu_k = (torch.tensor([0, *(pair[side] for pair in lengths)]).cumsum(0).int() for side in (0, 1))
    q, k, v = (torch.randn(n, h, width).bfloat16() for n, h in ((266, 4), (385, 2), (385, 2)))
    for keywords in ({"causal": True}, {"causal": True, "window": 40, "sinks": 3, "rope": Rope(64)}):
        arguments = (q, k, v, cu_q, cu_k, 190, 301)
        dout, dlse = torch.randn_like(q), torch.randn(4, 266)
        got = run(on_gpu, arguments, dout, dlse, **keywords)
        wide = [x.float() if x.is_floating_point() else x for x in arguments[:5]]
        exact = run(longattn.attention_varlen, (*wide, 190, 301), dout.float(), dlse, backend="reference", **keywords)
        for name, x in got.items():
            scale = float(exact[name].abs().max())
            torch.testing.assert_close(x.float(), exact[name].float(), atol=2e-2 * scale, rtol=2e-2, msg=name)


def test_hidden_keys_never_matter() -> None:
    q, k, v = (torch.randn(2, 2, n, 128, device=DEVICE).bfloat16() for n in (90, 400, 400))
    hidden = torch.arange(400, device=DEVICE).repeat(2, 1) % 3 > 0
    clean = longattn.attention(q, k, v, key_mask=~hidden, backend="cuda")
    bad = [x.masked_fill(hidden[:, None, :, None], torch.nan) for x in (k, v)]
    assert torch.equal(longattn.attention(q, *bad, key_mask=~hidden, backend="cuda"), clean)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("page_size", [0, 5, 16, 128])
def test_caches(page_size: int, width: int) -> None:
    """A prompt, single tokens and pieces, against the reference backend on a cache of its own; 0: contiguous."""

    def cache() -> KVCache | PagedKVCache:
        common: dict[str, Any] = {"dtype": torch.bfloat16, "device": DEVICE}
        if not page_size:
            return KVCache(2, 2, width, capacity=1700, **common)
        return PagedKVCache(2, 2, width, num_pages=2 * (1700 // page_size + 1), page_size=page_size, **common)

    caches, sinks = [cache(), cache()], torch.randn(8, device=DEVICE)
    for new, lengths in ((1500, None), (1, None), (33, [33, 5]), (1, None)):
        q, k, v = (torch.randn(2, heads, new, width, device=DEVICE).bfloat16() for heads in (8, 2, 2))
        call = {"lengths": lengths, "rope": Rope(64), "sink_logits": sinks, "return_lse": True}
        got, expected = (
            attention_with_cache(q, k, v, cache, backend=backend, **call)
            for cache, backend in zip(caches, ("cuda", "reference"), strict=True)
        )
        torch.testing.assert_close(got[0].float(), expected[0].float(), atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(got[1], expected[1], atol=1e-2, rtol=1e-2)


def test_rope() -> None:
    x = torch.randn(2, 5, 777, 96, device=DEVICE, dtype=torch.bfloat16)
    for rope in (Rope(96), Rope(64, interleaved=True)):
        for places in (None, ints(0, 10**6, 2, 777).to(DEVICE)):
            got = longattn.apply_rope(x, rope, places, backend="cuda")
            expected = longattn.apply_rope(x.double(), rope, places, backend="reference")
            torch.testing.assert_close(got.double(), expected, atol=2e-2, rtol=1e-2)


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
