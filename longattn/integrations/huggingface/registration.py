"""The names under which transformers finds us."""

from __future__ import annotations

import torch

NAME = "longattn"


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
    from longattn.integrations.huggingface.visibility import visibility

    AttentionInterface.register(NAME, attention_forward)
    # The closures that describe a mask cannot be read while a graph is traced.
    AttentionMaskInterface.register(NAME, torch.compiler.disable(visibility, reason="masks are made outside of graphs"))
