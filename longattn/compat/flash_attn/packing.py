"""Where the tokens of packed sequences stand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """One entry per token, each [T]. Tokens outside all sequences have numbers that mean nothing."""

    sequence: Tensor  # int64
    place: Tensor  # int64, in the sequence
    inside: Tensor  # bool: of a sequence


def token_places(cu_seqlens: Tensor, tokens: int) -> Places:
    """The places of `tokens` tokens, the sequences starting and ending at cu_seqlens [batch + 1]."""
    batch = cu_seqlens.shape[0] - 1
    index = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens.to(torch.int64), index, right=True) - 1
    inside = (sequence >= 0) & (sequence < batch)
    sequence = sequence.clamp(0, max(batch - 1, 0))
    return Places(sequence, index - cu_seqlens[sequence], inside)
