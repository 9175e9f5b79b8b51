"""The names under which transformers finds us."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.integrations.huggingface.visibility import visibility

NAME = "longattn"

_outside_of_graphs = torch.compiler.disable(
    visibility, reason="the functions that describe a mask cannot be read while torch.compile traces a graph"
)


def register() -> None:
    """Make attn_implementation="longattn" known to transformers, for every model that uses its AttentionInterface.

    Call it once, before a model is made with that name or switched to it with `model.set_attn_implementation`.

    Raises:
        ImportError: transformers is not installed, or older than 5.17.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.utils.versions import require_version

    require_version("transformers>=5.17", "pip install longattn[hf]")

    from longattn.integrations.huggingface.attention import attention_forward
    from longattn.integrations.huggingface.saving import name_attention_in_configs

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, _made_mask)
    name_attention_in_configs(NAME)


def _made_mask(**call: Any) -> Tensor:
    """Return the mask of a forward pass: a Visibility, made outside of the graph of torch.compile.

    torch.export(strict=True) has no outside: its mask is dense, as in transformers' own exports.
    """
    if torch.compiler.is_dynamo_compiling() and torch.compiler._is_exporting_flag:
        from transformers.masking_utils import sdpa_mask

        mask = sdpa_mask(**{**call, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        assert mask is not None
        return mask
    return _outside_of_graphs(**call)
