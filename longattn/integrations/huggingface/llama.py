"""Llama and Mistral: grouped heads, rotary positions, RMSNorm, SwiGLU, no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from longattn.errors import InvalidInput
from longattn.integrations.huggingface.options import require, require_no_methods, require_style
from longattn.integrations.huggingface.rotation import longest_position, rope_parameters, without_ntk
from longattn.integrations.huggingface.weights import Names, Weight
from longattn.models import TransformerConfig
from longattn.rope import Rope

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["config_from_hf", "config_to_hf", "derived", "names", "normalised"]

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Where a layer keeps its weights: ours, theirs.
_LAYER_NAMES = (
    ("attention_norm", "input_layernorm"),
    ("attention.q_proj", "self_attn.q_proj"),
    ("attention.k_proj", "self_attn.k_proj"),
    ("attention.v_proj", "self_attn.v_proj"),
    ("attention.o_proj", "self_attn.o_proj"),
    ("feed_forward_norm", "post_attention_layernorm"),
    ("feed_forward.gate_proj", "mlp.gate_proj"),
    ("feed_forward.up_proj", "mlp.up_proj"),
    ("feed_forward.down_proj", "mlp.down_proj"),
)


def config_from_hf(config: PreTrainedConfig) -> TransformerConfig:
    """Our config of a Llama or Mistral config.

    Raises:
        InvalidInput: options that our decoder does not have.
    """
    require(config, hidden_act="silu", attention_bias=False, mlp_bias=False)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = Rope.from_hf(config)
    if rope.dim != head_dim or rope.interleaved:
        raise InvalidInput("config", f"rotation of all {head_dim} entries of a head, in halves", rope)
    window = getattr(config, "sliding_window", None)
    if window is not None and not (type(window) is int and window >= 1):
        raise InvalidInput("config", "sliding_window None or an int >= 1", window)
    return TransformerConfig(
        vocab_size=config.vocab_size,
        dim=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        hidden=config.intermediate_size,
        max_length=config.max_position_embeddings,
        pattern="L" if window is None else "S",
        window=window,
        rope_base=rope.base,
        rope_scaling=rope.scaling,
        norm_eps=config.rms_norm_eps,
        attention_dropout=config.attention_dropout,
        tie_embeddings=config.tie_word_embeddings,
    )


def config_to_hf(config: TransformerConfig) -> PreTrainedConfig:
    """The Llama config of our config, or the Mistral config if all layers are sliding.

    Raises:
        InvalidInput: what Hugging Face's models cannot compute: mixed layers, sinks, or a scaling they do not know.
    """
    from transformers import LlamaConfig, MistralConfig

    require_style(config, "llama", ("tie_embeddings", "norm_eps"))
    if config.dropout:
        raise InvalidInput("config", "dropout 0 (attention_dropout may be more)", config.dropout)
    sliding = {config.is_sliding(layer) for layer in range(config.layers)}
    require_no_methods(config)
    if len(sliding) > 1 or config.sinks:
        got = f"pattern {config.pattern!r} with {config.sinks} sinks"
        raise InvalidInput("config", "all layers full or all sliding, without sinks", got)
    rope = config.rope
    assert rope is not None
    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "max_position_embeddings": longest_position(config.rope_scaling, config.max_length),
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": rope_parameters(rope, config.max_length),
    }
    made = MistralConfig(**shape, sliding_window=config.window) if True in sliding else LlamaConfig(**shape)
    if Rope.from_hf(made) != without_ntk(rope):
        raise InvalidInput("config", "a rotation that Hugging Face's models have", rope)
    return made


def names(model: Any) -> Names:
    """Their name of each of our weights."""
    config = model.config
    found = {"embedding.weight": _EMBEDDING, "norm.weight": "model.norm.weight"}
    for layer in range(config.layers):
        for ours, theirs in _LAYER_NAMES:
            found[f"blocks.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    if not config.tie_embeddings:
        found["head.weight"] = _HEAD
    return {ours: Weight(theirs) for ours, theirs in found.items()}


def derived(model: Any) -> Mapping[str, str]:
    """The tied projection."""
    return {_HEAD: _EMBEDDING} if model.config.tie_embeddings else {}


def normalised(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Without the rotation's frequencies, which old checkpoints hold."""
    return {name: weight for name, weight in state.items() if not name.endswith("rotary_emb.inv_freq")}
