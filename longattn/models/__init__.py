"""The reference Transformer: a decoder of RMSNorm, SwiGLU, grouped heads and rotary positions on our attention."""

from longattn.models.blocks import Block, SwiGLU
from longattn.models.config import TransformerConfig
from longattn.models.decoder import Decoder
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
from longattn.models.losses import chunked_cross_entropy
from longattn.models.precision import autocast, matmul_dtype

__all__ = [
    "GREEDY",
    "Beam",
    "Block",
    "Decoder",
    "Generation",
    "GenerationConfig",
    "Piece",
    "Sampling",
    "SwiGLU",
    "TransformerConfig",
    "autocast",
    "beam_search",
    "chunked_cross_entropy",
    "decode_bytes",
    "generate",
    "make_caches",
    "matmul_dtype",
    "stream",
]
