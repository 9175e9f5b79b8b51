"""The keywords of a transformers model's attention call: what each is to us."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from longattn.errors import Unsupported

__all__ = ["HONOURED", "WITHOUT_EFFECT", "refuse_unknown"]

# The parameters of `attention_forward`, position_ids and use_cache included: they say whether a row is packed.
HONOURED = frozenset(
    {
        "attention_mask",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "dropout",
        "is_causal",
        "key",
        "module",
        "output_attentions",
        "position_bias",
        "position_ids",
        "query",
        "s_aux",
        "scaling",
        "sliding_window",
        "softcap",
        "use_cache",
        "value",
    }
)

# Keywords that modules pass through to their attention and that change nothing there, whatever their value.
WITHOUT_EFFECT = frozenset(
    {
        "cache_params",
        "cache_position",
        "decoder_attention_mask",
        "decoder_input_ids",
        "decoder_inputs_embeds",
        "decoder_position_ids",
        "deterministic",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "encoder_outputs",
        "grid_thw",
        "input_ids",
        "inputs_embeds",
        "labels",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_logits",
        "output_router_logits",
        "output_scores",
        "past_key_values",
        "position_embeddings",
        "return_dict",
        "return_loss",
        "seq_idx",
        "shift_labels",
        "token_type_ids",
    }
)


def refuse_unknown(module: nn.Module, others: Mapping[str, Any]) -> None:
    """Raise Unsupported for a keyword of an attention call that could change the scores in a way unknown to us."""
    for name, value in others.items():
        if value is not None and name not in WITHOUT_EFFECT:
            call = f"{type(module).__name__} with the keyword {name}"
            raise Unsupported(call, {"every backend": [f"{name} is not implemented; use another attn_implementation"]})
