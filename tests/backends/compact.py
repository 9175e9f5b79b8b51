"""Two hundred small calls of the CPU backend against the oracle, for one process: `python compact.py [expected ISA]`.

The instruction set is chosen once per process, so test_cpu.py runs this file once for each, with LONGATTN_CPU_ISA set.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import longattn
from helpers import DTYPES, check_attention, check_varlen, laid_out, random_packed, random_qkv, run
from longattn import Rope
from longattn.backends.cpu import native

WIDTHS = (1, 3, 8, 31, 64, 80, 128, (48, 33), (200, 256), 512)
# Lengths within one tile, and beyond it.
LENGTHS = ((1, 1), (5, 17), (37, 70), (150, 131))


def calls() -> Iterator[dict[str, Any]]:
    """Keywords of attention on 2 sequences, for lengths (Nq, Nk)."""
    yield {"causal": True}
    yield {"window": (9, 5), "sinks": 2, "align": "start"}
    yield {"causal": True, "window": 12, "sinks": 3, "align": 7, "scale": 0.3}
    yield {"key_lens": torch.tensor([11, 3]), "causal": True}
    yield {"align": torch.tensor([4, -6]), "window": (20, 1), "rope": Rope(6, interleaved=True)}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    if len(sys.argv) > 1:
        assert native().isa() == sys.argv[1], f"runs on {native().isa()}"
    for dtype in DTYPES:
        for widths in WIDTHS:
            q, k, v = random_qkv(1, (2, 1), (37, 70), widths, dtype)
            check_attention(q, k, v, backend="cpu", causal=True, rope=None if widths == 1 else Rope(2))
        for lengths in LENGTHS:
            for keywords in calls():
                q, k, v = (laid_out(x, "bnhd") for x in random_qkv(2, (4, 2), lengths, 24, dtype))
                check_attention(q, k, v, backend="cpu", **keywords)
        q, k, v = random_qkv(2, (2, 1), (70, 90), 16, dtype)
        bounds = torch.randint(0, 40, (2, 70)), torch.randint(30, 100, (2, 70))
        check_attention(q, k, v, backend="cpu", bounds=bounds, key_mask=torch.rand(2, 90) < 0.5)
        scores = {"softcap": 4.0, "alibi_slopes": torch.rand(2), "sink_logits": torch.randn(2)}
        check_attention(q, k, v, backend="cpu", causal=True, bias=torch.randn(70, 90), **scores)
        few = random_qkv(1, (2, 1), (9, 40), 8, dtype)
        check_attention(*few, backend="cpu", bias=torch.rand(9, 40) < 0.7, dropout_p=0.3, seed=5, **scores)
        check_varlen(random_packed((0, 70, 3), (5, 40, 0), dtype=dtype), backend="cpu", causal=True, rope=Rope(16))
        spread = 30.0 * q.float()  # peaked weights, whatever exp is made of
        check_attention(spread.to(dtype), k, v, backend="cpu", window=30)
        far = run(longattn.attention, (200.0 * q, k, v), torch.randn_like(q), backend="cpu")
        assert all(x.isfinite().all() for x in far.values())
        turned = longattn.apply_rope(q, Rope(16), backend="cpu")
        assert (turned.float().norm() / q.float().norm() - 1).abs() < 0.01


if __name__ == "__main__":
    main()
