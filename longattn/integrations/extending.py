"""One function that makes any model read further."""

from __future__ import annotations

from typing import Any

from torch import nn

from longattn import models
from longattn.extension import Method
from longattn.models import Decoder, Encoder, EncoderDecoder
from longattn.scaling import Scaling

__all__ = ["extend"]


def extend(model: nn.Module, method: Scaling | Method) -> Any:
    """A model over these very weights (not copies) that reads further; training it trains this one.

    Args:
        model: a Decoder, Encoder or EncoderDecoder of `longattn.models`, or a Hugging Face model with
            attn_implementation="longattn".
        method: one of `longattn.scaling` or of `longattn.extension`. It takes the place of one of its kind; calls for
            several kinds add up.

    Returns:
        Of the model's class. What is saved with it says the method; weights are new for learned positions only.

    Warns:
        UserWarning: the method replaces a scaling that the model had, or the model reads less far with it than before.

    Raises:
        InvalidInput: a model that has no use for the method; sizes that make no sense for it, such as a window that is
            not below the length that it reads; a method that a Hugging Face model's config class does not save.
    """
    if isinstance(model, Decoder | Encoder | EncoderDecoder):
        return models.extend(model, method)
    from longattn.integrations import huggingface

    return huggingface.extend(model, method)
