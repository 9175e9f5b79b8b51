"""The reference Transformer: a decoder of RMSNorm, SwiGLU, grouped heads and rotary positions on our attention."""

from longattn.models.blocks import Block, SwiGLU
from longattn.models.config import TransformerConfig
from longattn.models.decoder import Decoder
from longattn.models.losses import chunked_cross_entropy
from longattn.models.precision import autocast, matmul_dtype

__all__ = [
    "Block",
    "Decoder",
    "SwiGLU",
    "TransformerConfig",
    "autocast",
    "chunked_cross_entropy",
    "matmul_dtype",
]
