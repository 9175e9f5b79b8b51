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
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import packed_sequence_compatibility_function, sdpa_mask  # noqa: F401
    except ImportError as missing:
        raise ImportError(
            "longattn in Hugging Face models needs transformers >= 5.17: pip install longattn[hf]"
        ) from missing

    from longattn.integrations.huggingface.attention import attention_forward
    from longattn.integrations.huggingface.visibility import visibility

    AttentionInterface.register(NAME, attention_forward)
    # The closures that describe a mask cannot be read while a graph is traced.
    AttentionMaskInterface.register(NAME, torch.compiler.disable(visibility, reason="masks are made outside of graphs"))
