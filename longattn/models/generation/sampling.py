"""From logits to the next token: penalty, temperature, top-k, top-p, and a draw that a generator repeats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.scaling import finite_number

__all__ = ["GREEDY", "Sampling", "draw", "uniform"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution that the next token is drawn from. Applied in this order.

    Args:
        repetition_penalty: the logit of a token that the text has, prompt included, is divided by this if positive and
            multiplied if negative (after Keskar et al., CTRL, arXiv 1909.05858, section 4.1); 1: off.
        temperature: logits are divided by it; 0: always the likeliest token, the first of equals.
        top_k: only the k likeliest tokens (Fan et al., arXiv 1805.04833); None: all.
        top_p: only the smallest set of likeliest tokens that together reach p (Holtzman et al., arXiv 1904.09751).

    Raises:
        InvalidInput: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        finite_number("temperature", self.temperature, at_least=0.0)
        if self.top_k is not None and (
            isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1
        ):
            raise InvalidInput("top_k", "an int >= 1 or None", repr(self.top_k))
        finite_number("top_p", self.top_p, above=0.0, at_most=1.0)
        finite_number("repetition_penalty", self.repetition_penalty, above=0.0)

    @property
    def penalises(self) -> bool:
        """Whether `probabilities` needs to know the tokens of the text."""
        return self.repetition_penalty != 1.0

    def penalised(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Logits after the repetition penalty; seen: bool, of the logits' shape."""
        if seen is None or not self.penalises:
            return logits
        penalty = self.repetition_penalty
        return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The distribution over token ids.

        Args:
            logits: [..., V], any floating dtype.
            seen: bool [..., V], which tokens the text has; needed with a repetition penalty.

        Returns:
            [..., V], float32 (float64 for float64 logits).

        Raises:
            FloatingPointError: logits without a finite maximum.
        """
        logits = self.penalised(logits if logits.dtype == torch.float64 else logits.float(), seen)
        top = logits.amax(-1, keepdim=True)
        if not top.isfinite().all():
            raise FloatingPointError("the model's logits are not finite")
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = (logits - top) / self.temperature  # a tiny temperature overflows on the safe side
        if self.top_k is None and self.top_p == 1.0:
            return logits.softmax(-1)
        count = logits.shape[-1]
        values, places = logits.topk(count if self.top_k is None else min(self.top_k, count), dim=-1)
        kept = values.softmax(-1)
        kept = kept.masked_fill(kept.cumsum(-1) - kept >= self.top_p, 0.0)
        kept = kept / kept.sum(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, places, kept)


GREEDY = Sampling(temperature=0.0)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """One index per row, by inverting the distribution function: the same numbers give the same indices.

    Args:
        weights: [..., V], not negative, proportional to the probabilities.
        uniform: float64 [...], in [0, 1).

    Returns:
        int64 [...], never one of weight 0.
    """
    sums = weights.double().cumsum(-1)
    total = sums[..., -1:]
    below = torch.minimum(uniform[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, below, right=True)[..., 0]


def uniform(rows: int, columns: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """float64 [rows, columns] in [0, 1), on `device`; from torch's default generator without one."""
    drawn_on = device if generator is None else generator.device
    return torch.rand(rows, columns, generator=generator, dtype=torch.float64, device=drawn_on).to(device)
