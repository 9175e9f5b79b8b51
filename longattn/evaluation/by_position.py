"""How well a model predicts a token, by how much text stands before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.models import Decoder, autocast

__all__ = ["Bucket", "LossByPosition", "loss_by_position", "loss_in_short_windows"]


@dataclass(frozen=True)
class Bucket:
    """The mean loss over positions [start, stop), in nats per token, and its standard error over the windows."""

    start: int
    stop: int
    loss: float
    standard_error: float


@dataclass(frozen=True)
class LossByPosition:
    """The loss of every token of the windows: losses [W, N] in nats, float32."""

    losses: Tensor

    def bucket(self, start: int, stop: int) -> Bucket:
        """The positions [start, stop)."""
        by_window = self.losses[:, start:stop].double().mean(1)
        count = len(by_window)
        error = by_window.std().item() / math.sqrt(count) if count > 1 else math.nan
        return Bucket(start, stop, by_window.mean().item(), error)

    def buckets(self, width: int) -> list[Bucket]:
        """All positions, `width` at a time."""
        length = self.losses.shape[1]
        return [self.bucket(start, min(start + width, length)) for start in range(0, length, width)]


@torch.no_grad()
def loss_by_position(
    model: Decoder, windows: Tensor, *, dtype: torch.dtype = torch.float32, batch_size: int = 4
) -> LossByPosition:
    """Read each window once from its start, and keep the loss of every token.

    Args:
        windows: int64 [W, N + 1].
        dtype: of the matrix products: float32, or bfloat16 (autocast).
        batch_size: windows read at once.

    Raises:
        InvalidInput: windows of another shape, or ids out of range.
    """
    _check_windows(windows)
    return LossByPosition(_token_losses(model, windows, dtype, batch_size))


@torch.no_grad()
def loss_in_short_windows(
    model: Decoder,
    windows: Tensor,
    length: int,
    stride: int,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 4,
) -> LossByPosition:
    """The loss of the same tokens when the model reads at most `length` at once: what it can do without extension.

    The windows are read again and again, `length` tokens from every `stride`-th on. A token counts where it stands
    latest, after length - stride to length - 1 others; the first `length` tokens count as read from the start.

    Args:
        windows: int64 [W, N + 1] with N >= length and N - length a multiple of stride.
        length, stride: in tokens, stride <= length.
        dtype, batch_size: as in `loss_by_position`.

    Raises:
        InvalidInput: a length or stride that does not fit.
    """
    _check_windows(windows)
    count, tokens = windows.shape[0], windows.shape[1] - 1
    if not 1 <= length <= tokens:
        raise InvalidInput("length", f"an int in [1, {tokens}], the windows' tokens", length)
    if not 1 <= stride <= length or (tokens - length) % stride:
        raise InvalidInput("stride", f"an int in [1, {length}] that divides {tokens - length}", stride)
    short = windows.unfold(1, length + 1, stride)  # [W, pieces, length + 1]
    losses = _token_losses(model, short.flatten(0, 1), dtype, batch_size * max(1, tokens // length))
    losses = losses.view(count, -1, length)
    return LossByPosition(torch.cat((losses[:, 0], losses[:, 1:, length - stride :].flatten(1)), dim=1))


def _token_losses(model: Decoder, windows: Tensor, dtype: torch.dtype, batch_size: int) -> Tensor:
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    losses = []
    for batch in windows.split(batch_size):
        batch = batch.to(device)
        with autocast(device, dtype):
            losses.append(model.loss(batch[:, :-1], batch[:, 1:], reduction="none").float().cpu())
    model.train(training)
    return torch.cat(losses)


def _check_windows(windows: Tensor) -> None:
    if windows.dim() != 2 or windows.dtype != torch.int64 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InvalidInput("windows", "an int64 tensor [W, N + 1]", f"{windows.dtype} of shape {tuple(windows.shape)}")
