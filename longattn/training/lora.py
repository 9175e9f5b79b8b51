"""Low-rank adapters in one of our models, by peft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from longattn.errors import InvalidInput

__all__ = ["Lora"]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What is trained in place of all weights (Hu et al., arXiv 2106.09685).

    Args:
        rank: of the adapters. alpha: their output is scaled by alpha / rank.
        modules: the layers that get one, by the ends of their names.
        embeddings: train the token embeddings and norms as well, as LongLoRA does (arXiv 2309.12307, section 3.3).
    """

    rank: int = 8
    alpha: int = 16
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    embeddings: bool = False

    def attach(self, model: nn.Module) -> Merge:
        """Put adapters into a model, in place, and freeze what is not trained.

        Returns:
            what puts them into the weights again.

        Raises:
            ImportError: peft is not installed. InvalidInput: a rank below 1.
        """
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InvalidInput("rank", "an int >= 1", repr(self.rank))
        try:
            from peft import LoraConfig
            from peft.tuners.lora import LoraModel
        except ImportError as error:
            raise ImportError("LoRA needs peft: pip install longattn[lora]") from error
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.modules), lora_dropout=0.0)
        adapted = LoraModel(model, config, "default")
        if self.embeddings:
            for name, weight in model.named_parameters():
                if "embedding" in name or "norm" in name:
                    weight.requires_grad_(True)
        return Merge(adapted)


class Merge:
    """Adapters that can be put into the weights."""

    def __init__(self, adapted: Any) -> None:
        self._adapted = adapted

    def __call__(self) -> None:
        """Add the adapters to the weights and take them out; all weights train again."""
        model = self._adapted.merge_and_unload()
        for weight in model.parameters():
            weight.requires_grad_(True)
