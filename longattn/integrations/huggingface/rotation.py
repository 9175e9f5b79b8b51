"""A Rope as the rope_parameters of a Hugging Face config."""

from __future__ import annotations

from typing import Any

from longattn.errors import InvalidInput
from longattn.rope import Rope
from longattn.scaling import NTK, DynamicNTK

__all__ = ["rope_parameters", "without_ntk"]

_THEIRS = {"original_max_position": "original_max_position_embeddings", "proportion": "partial_rotary_factor"}


def rope_parameters(rope: Rope, max_length: int) -> dict[str, Any]:
    """What transformers makes the same rotation of.

    Args:
        max_length: the config's max_position_embeddings, which is DynamicNTK's trained length.

    Raises:
        InvalidInput: a DynamicNTK of another trained length.
    """
    rope = without_ntk(rope)
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.base}
    if rope.scaling is None:
        return parameters
    values = rope.scaling.to_dict()
    parameters["rope_type"] = values.pop("type")
    if isinstance(rope.scaling, DynamicNTK) and rope.scaling.original_max_position != max_length:
        raise InvalidInput("config", f"max_length {rope.scaling.original_max_position} as its DynamicNTK", max_length)
    return parameters | {_THEIRS.get(name, name): value for name, value in values.items() if value is not None}


def without_ntk(rope: Rope) -> Rope:
    """NTK scaling is another base, and Hugging Face has no name for it."""
    if not isinstance(rope.scaling, NTK):
        return rope
    return Rope(rope.dim, rope.base * rope.scaling.factor ** (rope.dim / (rope.dim - 2)), None, rope.interleaved)
