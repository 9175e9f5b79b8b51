"""Generation with a decoder: greedy, sampled, by beam search, and with a draft model; over caches of its layers."""

from longattn.models.generation.beam import Beam, beam_search
from longattn.models.generation.loop import Generation, GenerationConfig, Piece, generate, stream
from longattn.models.generation.reader import make_caches
from longattn.models.generation.sampling import GREEDY, Sampling
from longattn.models.generation.text import decode_bytes

__all__ = [
    "GREEDY",
    "Beam",
    "Generation",
    "GenerationConfig",
    "Piece",
    "Sampling",
    "beam_search",
    "decode_bytes",
    "generate",
    "make_caches",
    "stream",
]
