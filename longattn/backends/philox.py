"""Dropout's counter-based generator, Philox4x32-10.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011. The key is the 64-bit seed (low word, high word).
The counter of entry (b, h, i, j) is (j // 4, i, h, b), and its random number is word j % 4 of the output; the entry is
dropped if that is below p * 2^32. Every backend draws the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on 32-bit words held in int64 tensors; `seed` is an int64 tensor with one entry."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform_bits(seed: Tensor, b: Tensor, h: Tensor, i: Tensor, keys: slice) -> Tensor:
    """The random numbers of [0, 2^32) of a range of keys: int64 [*broadcast(b, h, i), keys]."""
    first = keys.start // 4
    quads = torch.arange(first, (keys.stop + 3) // 4, device=i.device)
    counter = torch.broadcast_tensors(quads, i[..., None], h[..., None], b[..., None])
    words = torch.stack(philox4x32(counter, seed), -1)  # [..., quads, 4]
    return words.flatten(-2)[..., keys.start - 4 * first : keys.stop - 4 * first]


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) words of a 32 x 32 bit product, by 16-bit halves so that int64 never overflows."""
    low, high = factor * (x & 0xFFFF), factor * (x >> 16)  # each below 2^48
    mid = (low >> 16) + high  # below 2^49
    return mid >> 16, ((mid & 0xFFFF) << 16) | (low & 0xFFFF)
