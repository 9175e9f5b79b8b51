"""The reference Transformers on our attention: decoder, encoder, encoder-decoder, their heads and losses."""

from longattn.models.blocks import Block, FeedForward, SwiGLU
from longattn.models.build import build
from longattn.models.config import STYLES, TransformerConfig
from longattn.models.decoder import Decoder
from longattn.models.distillation import Distillation
from longattn.models.encoder import Encoder
from longattn.models.encoder_decoder import EncoderDecoder
from longattn.models.extending import check_sense, extend, extended_config, with_method
from longattn.models.generation import (
    GREEDY,
    Beam,
    Generation,
    GenerationConfig,
    Piece,
    Sampling,
    beam_search,
    decode_bytes,
    generate,
    make_caches,
    stream,
)
from longattn.models.heads import MaskedLM, SentenceEncoder, SequenceClassifier, TokenClassifier, mean_pool
from longattn.models.losses import (
    chunked_cross_entropy,
    chunked_distillation,
    hidden_state_loss,
    info_nce,
    triplet_loss,
)
from longattn.models.precision import autocast, matmul_dtype
from longattn.models.stack import sinusoids

__all__ = [
    "Beam",
    "Block",
    "Decoder",
    "Distillation",
    "Encoder",
    "EncoderDecoder",
    "FeedForward",
    "GREEDY",
    "Generation",
    "GenerationConfig",
    "MaskedLM",
    "Piece",
    "STYLES",
    "Sampling",
    "SentenceEncoder",
    "SequenceClassifier",
    "SwiGLU",
    "TokenClassifier",
    "TransformerConfig",
    "autocast",
    "beam_search",
    "build",
    "check_sense",
    "chunked_cross_entropy",
    "chunked_distillation",
    "decode_bytes",
    "extend",
    "extended_config",
    "generate",
    "hidden_state_loss",
    "info_nce",
    "make_caches",
    "matmul_dtype",
    "mean_pool",
    "sinusoids",
    "stream",
    "triplet_loss",
    "with_method",
]
