"""A Rope as the rope_parameters of a Hugging Face config."""

from __future__ import annotations

from typing import Any

from longattn.errors import InvalidInput
from longattn.rope import Rope
from longattn.scaling import NTK, DynamicNTK, Llama3, Proportional, Scaling, YaRN

__all__ = ["longest_position", "rope_parameters", "without_ntk"]

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
    # transformers warns of entries that it does not read, and of lists that are tuples.
    if isinstance(rope.scaling, DynamicNTK):
        del values["original_max_position"]
    if isinstance(rope.scaling, Proportional) and rope.scaling.factor == 1:
        del values["factor"]
    for name, value in values.items():
        if value is not None:
            parameters[_THEIRS.get(name, name)] = list(value) if isinstance(value, tuple) else value
    return parameters


def longest_position(scaling: Scaling | None, max_length: int) -> int:
    """Return the max_position_embeddings of a config with a scaling, of a model whose config says max_length.

    It stays as it is, unless transformers would warn that it contradicts the scaling: Llama 3's must be above the
    original length, YaRN's the original length or `factor` times that.
    """
    if isinstance(scaling, Llama3) and max_length <= scaling.original_max_position:
        return int(scaling.factor * scaling.original_max_position)
    if isinstance(scaling, YaRN) and max_length / scaling.original_max_position not in (1.0, scaling.factor):
        return int(scaling.factor * scaling.original_max_position)
    return max_length


def without_ntk(rope: Rope) -> Rope:
    """NTK scaling is another base, and Hugging Face has no name for it."""
    if not isinstance(rope.scaling, NTK):
        return rope
    return Rope(rope.dim, rope.base * rope.scaling.factor ** (rope.dim / (rope.dim - 2)), None, rope.interleaved)
