"""A window with sinks at growing lengths: the time of a token stays the same, and so does the extra memory.

python examples/sliding_window.py [longest]
"""

from __future__ import annotations

import sys
import time

import torch

import longattn


def main(longest: int = 65536) -> None:
    rope = longattn.Rope(64)
    length = 1024
    print(longattn.explain(*(torch.empty(1, 4, length, 64) for _ in range(3)), causal=True, window=512, rope=rope))
    while length <= longest:
        q, k, v = (torch.randn(1, 4, length, 64) for _ in range(3))
        start = time.perf_counter()
        longattn.attention(q, k, v, causal=True, window=512, sinks=4, rope=rope)
        seconds = time.perf_counter() - start
        print(f"{length:7} tokens: {seconds * 1e3:8.1f} ms, {seconds / length * 1e6:6.2f} us a token")
        length *= 4


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
