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

    Raises:
        InvalidInput: a model that has no use for the method.
    """
    if isinstance(model, Decoder | Encoder | EncoderDecoder):
        return models.extend(model, method)
    from longattn.integrations import huggingface

    return huggingface.extend(model, method)
