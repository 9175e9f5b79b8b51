"""The entry of a saved config that names the attention it needs."""

from __future__ import annotations

from functools import wraps
from typing import Any

from longattn.integrations.huggingface.methods import KEY

__all__ = ["name_attention_in_configs"]

_ENTRY = "attn_implementation"


def name_attention_in_configs(name: str) -> None:
    """Have every config that lists methods say attn_implementation=`name` where it is saved.

    transformers reads the entry when it loads a model, and refuses a name that is not registered, but writes none. It
    is written for a config whose layers, or whose text model's, have methods that no other attention computes.
    """
    from transformers import PreTrainedConfig

    to_dict = PreTrainedConfig.to_dict
    if getattr(to_dict, "names_attention", False):
        return

    @wraps(to_dict)
    def named(self: PreTrainedConfig) -> dict[str, Any]:
        saved = to_dict(self)
        inner = [value for value in saved.values() if isinstance(value, dict)]
        if any(values.get(KEY) for values in (saved, *inner)):
            saved[_ENTRY] = name
        return saved

    named.names_attention = True  # type: ignore[attr-defined]
    PreTrainedConfig.to_dict = named  # type: ignore[method-assign]
