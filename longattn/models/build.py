"""The model that a config describes."""

from __future__ import annotations

from longattn.models.config import DECODER, ENCODER, ENCODER_DECODER, TransformerConfig
from longattn.models.decoder import Decoder
from longattn.models.encoder import Encoder
from longattn.models.encoder_decoder import EncoderDecoder

__all__ = ["build"]

_MODELS: dict[str, type[Decoder] | type[Encoder] | type[EncoderDecoder]] = {
    DECODER: Decoder,
    ENCODER: Encoder,
    ENCODER_DECODER: EncoderDecoder,
}


def build(config: TransformerConfig) -> Decoder | Encoder | EncoderDecoder:
    """A model of the config's architecture, without a head, freshly drawn."""
    return _MODELS[config.architecture](config)
