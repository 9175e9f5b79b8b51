"""Losses over long sequences, in memory that does not grow with N x vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longattn.errors import InvalidInput

__all__ = ["IGNORED", "chunked_cross_entropy"]

IGNORED = -100  # PyTorch's ignore_index


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean", chunk: int = 1024
) -> Tensor:
    """The cross-entropy of hidden @ weight.T, a chunk of tokens at a time, forward and backward.

    The backward computes each chunk's logits again (Chen et al., Sublinear Memory Cost, arXiv 1604.06174).

    Args:
        hidden: [B, N, C], floating.
        weight: [V, C], the output projection.
        targets: int64 [B, N], ids below V; -100 is left out.
        reduction: "mean" over the targets that count (0 if none do), or "none".
        chunk: how many tokens' logits are held at once, at least 1.

    Returns:
        A scalar, or [B, N] with 0 where left out; in float32 (float64 for float64 inputs).

    Raises:
        InvalidInput: shapes that do not fit, or a target out of range.
    """
    if hidden.dim() != 3 or targets.shape != hidden.shape[:2] or targets.dtype != torch.int64:
        got = f"{targets.dtype} of shape {tuple(targets.shape)} beside hidden {tuple(hidden.shape)}"
        raise InvalidInput("targets", "an int64 tensor [B, N] beside hidden [B, N, C]", got)
    if reduction not in ("mean", "none"):
        raise InvalidInput("reduction", "'mean' or 'none'", repr(reduction))
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise InvalidInput("chunk", "an int >= 1", repr(chunk))
    _check_targets(targets, weight.shape[0])

    # split, not slices: the gradients of its parts are joined once, in place of one full-length sum a chunk.
    hidden_chunks = hidden.flatten(0, 1).split(chunk)
    target_chunks = targets.flatten().split(chunk)
    losses = []
    for tokens, wanted in zip(hidden_chunks, target_chunks, strict=True):
        losses.append(checkpoint(_token_losses, tokens, weight, wanted, use_reentrant=False))
    token_losses = torch.cat(losses).view(targets.shape)
    if reduction == "none":
        return token_losses
    return token_losses.sum() / (targets != IGNORED).sum().clamp(min=1)


def _token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    if torch.compiler.is_compiling() or not targets.numel():
        return
    valid = ((targets >= 0) & (targets < vocabulary)) | (targets == IGNORED)
    if not valid.all():
        bad = targets[~valid][0].item()
        raise InvalidInput("targets", f"ids in [0, {vocabulary}), or {IGNORED} to leave one out", bad)
