"""Denoising: text with parts left out, and what an encoder-decoder shall write.

Infilling: Lewis et al., BART, arXiv 1910.13461, section 2.2. Spans: Raffel et al., T5, arXiv 1910.10683, section 3.1.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.scaling import finite_number

__all__ = ["Denoised", "corrupt_spans", "infill_text"]


class Denoised(NamedTuple):
    """One example, int64: what the encoder reads, and what the decoder shall write (without a start token)."""

    source: Tensor
    target: Tensor


def infill_text(
    tokens: Tensor, *, mask_id: int, rng: np.random.Generator, share: float = 0.3, mean_length: float = 3.0
) -> Denoised:
    """BART's infilling: spans of Poisson-drawn lengths become one mask each; the target is the whole text.

    A span of length 0 puts a mask in where nothing is missing. Spans do not overlap.

    Args:
        tokens: int64 [N], at least one token.
        share: of the tokens to leave out, in (0, 1); met to within a token.
        mean_length: of the Poisson distribution, > 0.

    Raises:
        InvalidInput: no tokens, or numbers out of range.
    """
    _check(tokens, share)
    finite_number("mean_length", mean_length, above=0.0)
    count = len(tokens)
    budget = min(count, max(1, round(share * count)))
    lengths: list[int] = []
    while budget:
        lengths.append(min(int(rng.poisson(mean_length)), budget))
        budget -= lengths[-1]
    kept = count - sum(lengths)
    # Where among the kept tokens each span stands: all orders of spans and kept tokens are equally likely.
    units = np.concatenate((np.arange(len(lengths)), np.full(kept, -1)))
    source: list[int] = []
    place = 0
    for unit in rng.permutation(units):
        if unit < 0:
            source.append(int(tokens[place]))
            place += 1
        else:
            source.append(mask_id)
            place += lengths[unit]
    return Denoised(torch.tensor(source, device="cpu"), tokens.clone())


def corrupt_spans(
    tokens: Tensor,
    *,
    sentinel_ids: Sequence[int],
    rng: np.random.Generator,
    share: float = 0.15,
    mean_length: float = 3.0,
) -> Denoised:
    """T5's spans: each becomes a sentinel of its own in the source; the target is each sentinel and what it stands for.

    Spans are at least one token apart, and the source starts with a token that is kept. The target ends with the next
    sentinel.

    Args:
        tokens: int64 [N], at least two tokens.
        sentinel_ids: in the order in which they are used; one more than spans are needed.
        share: of the tokens to leave out, in (0, 1).
        mean_length: of the spans, >= 1.

    Raises:
        InvalidInput: too few tokens or sentinels, or numbers out of range.
    """
    _check(tokens, share, least=2)
    finite_number("mean_length", mean_length, at_least=1.0)
    count = len(tokens)
    hidden = min(max(1, round(share * count)), count - 1)
    spans = max(1, min(round(hidden / mean_length), hidden, count - hidden))
    if len(sentinel_ids) < spans + 1:
        raise InvalidInput("sentinel_ids", f"at least {spans + 1} for {count} tokens", len(sentinel_ids))
    gaps, lengths = _partition(count - hidden, spans, rng), _partition(hidden, spans, rng)
    source: list[int] = []
    target: list[int] = []
    place = 0
    for sentinel, gap, length in zip(sentinel_ids, gaps, lengths, strict=False):
        source += [*tokens[place : place + gap].tolist(), sentinel]
        target += [sentinel, *tokens[place + gap : place + gap + length].tolist()]
        place += gap + length
    return Denoised(torch.tensor(source, device="cpu"), torch.tensor([*target, sentinel_ids[spans]], device="cpu"))


def _partition(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """`total` as a sum of `parts` numbers >= 1, every such sum equally likely."""
    cuts = np.sort(rng.choice(np.arange(1, total), parts - 1, replace=False)) if parts > 1 else np.array([], int)
    return np.diff(np.concatenate(([0], cuts, [total]))).astype(int).tolist()


def _check(tokens: Tensor, share: float, least: int = 1) -> None:
    if tokens.dtype != torch.int64 or tokens.dim() != 1 or len(tokens) < least:
        got = f"{tokens.dtype} of shape {tuple(tokens.shape)}"
        raise InvalidInput("tokens", f"an int64 tensor [N] of at least {least} tokens", got)
    finite_number("share", share, above=0.0, at_most=1.0)
