"""Where the tokens of a call stand: among the keys, and in their own sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longattn.redirection import token_places


class Places(NamedTuple):
    """Queries and keys of one causal call.

    queries: int64 [Nq] or [B, Nq], which key each query stands at.
    starts: of that shape, the first key of each query's sequence.
    keys: int64 [Nk] or [B, Nk], where each key stands in its own sequence.
    """

    queries: Tensor
    starts: Tensor
    keys: Tensor

    @property
    def in_sequence(self) -> Tensor:
        """Where each query stands in its own sequence."""
        return self.queries - self.starts

    @classmethod
    def at_end(cls, queries: int, keys: int, device: torch.device) -> Places:
        """Return the places of one sequence, whose last query is at its last key.

        Where tokens are a shard of a sequence, places are those in the whole sequence.
        """
        at = token_places(keys, device)
        places = at[keys - queries :]
        return cls(places, torch.zeros_like(places), at)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, tokens: int) -> Places:
        """Return the places of sequences one after another; tokens past the last are one more."""
        places = token_places(tokens, cu_seqlens.device)
        index = torch.searchsorted(cu_seqlens.to(torch.int64), places, right=True) - 1
        starts = cu_seqlens.to(torch.int64)[index]
        return cls(places, starts, places - starts)
