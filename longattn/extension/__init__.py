"""Methods that make a trained model read further, beside scalings of its rotation, and attention under them."""

from longattn.extension.groups import attend_in_shifted_groups
from longattn.extension.methods import (
    BaseChange,
    DualChunk,
    LayerPattern,
    LearnedPositions,
    LogN,
    Method,
    Remapping,
    SelfExtend,
    ShiftedGroups,
    StreamingLLM,
    check_layer_methods,
)
from longattn.extension.parts import Part, attend_in_parts, window_parts
from longattn.extension.places import Places

__all__ = [
    "BaseChange",
    "DualChunk",
    "LayerPattern",
    "LearnedPositions",
    "LogN",
    "Method",
    "Part",
    "Places",
    "Remapping",
    "SelfExtend",
    "ShiftedGroups",
    "StreamingLLM",
    "attend_in_parts",
    "attend_in_shifted_groups",
    "check_layer_methods",
    "window_parts",
]
