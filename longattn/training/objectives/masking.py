"""Masked language modelling (Devlin et al., BERT, arXiv 1810.04805, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.models.losses import IGNORED
from longattn.scaling import finite_number

__all__ = ["mask_tokens"]

_MASKED, _REPLACED = 0.8, 0.1  # of the chosen tokens; the remaining tenth stays as it is


def mask_tokens(
    tokens: Tensor,
    *,
    mask_id: int,
    vocab_size: int,
    special_ids: Sequence[int] = (),
    probability: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose tokens to be predicted: of these 80 % become the mask, 10 % another token, and 10 % stay.

    Args:
        tokens: int64, any shape, on the CPU; left as it is.
        mask_id: the mask's token id.
        vocab_size: V; the other token is drawn from all ids below it that are not special.
        special_ids: never chosen: padding, separators and so on. The mask is one of them.
        probability: of being chosen, in (0, 1).
        generator: torch's default one by default.

    Returns:
        (tokens with masks, targets: what stood at the chosen places and -100 elsewhere), both of tokens' shape.

    Raises:
        InvalidInput: ids out of range, or nothing left to choose from.
    """
    if tokens.dtype != torch.int64:
        raise InvalidInput("tokens", "an int64 tensor", str(tokens.dtype))
    if tokens.numel() and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise InvalidInput("tokens", f"ids in [0, {vocab_size})", f"{int(tokens.min())}..{int(tokens.max())}")
    if not 0 <= mask_id < vocab_size:
        raise InvalidInput("mask_id", f"an id in [0, {vocab_size})", mask_id)
    finite_number("probability", probability, above=0.0, at_most=1.0)
    special = torch.tensor(sorted({mask_id, *special_ids}), device="cpu")
    if special.min() < 0 or special.max() >= vocab_size:
        raise InvalidInput("special_ids", f"ids in [0, {vocab_size})", special.tolist())
    is_special = torch.zeros(vocab_size, dtype=torch.bool, device="cpu").index_fill_(0, special, True)
    ordinary = (~is_special).nonzero().flatten()
    if not len(ordinary):
        raise InvalidInput("special_ids", "at least one id that is not special", f"all {vocab_size}")

    chosen = (torch.rand(tokens.shape, generator=generator, device="cpu") < probability) & ~is_special[tokens]
    fate = torch.rand(tokens.shape, generator=generator, device="cpu")
    others = ordinary[torch.randint(len(ordinary), tokens.shape, generator=generator, device="cpu")]
    masked = torch.where(chosen & (fate < _MASKED), mask_id, tokens)
    replaced = chosen & (fate >= _MASKED) & (fate < _MASKED + _REPLACED)
    return torch.where(replaced, others, masked), torch.where(chosen, tokens, IGNORED)
