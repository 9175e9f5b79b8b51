"""GPT-2: learned positions, pre-norm LayerNorm, GELU, biases; q, k and v in one matrix, and matrices transposed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from longattn.errors import InvalidInput
from longattn.integrations.huggingface.options import require, require_no_methods, require_style
from longattn.integrations.huggingface.weights import Names, Weight
from longattn.models import TransformerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["config_from_hf", "config_to_hf", "derived", "names", "normalised"]

_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_LAYER_NORMS = (("attention_norm", "ln_1"), ("feed_forward_norm", "ln_2"))
_LAYER_MATRICES = (
    ("attention.o_proj", "attn.c_proj"),
    ("feed_forward.up_proj", "mlp.c_fc"),
    ("feed_forward.down_proj", "mlp.c_proj"),
)


def config_from_hf(config: PreTrainedConfig) -> TransformerConfig:
    """Our config of a GPT-2 config.

    Raises:
        InvalidInput: options that our decoder does not have.
    """
    require(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    require(config, embd_pdrop=config.resid_pdrop)
    if config.activation_function not in _ACTIVATIONS:
        expected = f"activation_function {' or '.join(_ACTIVATIONS)}"
        raise InvalidInput("config", expected, repr(config.activation_function))
    return TransformerConfig.style(
        "gpt2",
        vocab_size=config.vocab_size,
        dim=config.n_embd,
        layers=config.n_layer,
        heads=config.n_head,
        hidden=config.n_inner or 4 * config.n_embd,
        max_length=config.n_positions,
        feed_forward=_ACTIVATIONS[config.activation_function],
        dropout=config.resid_pdrop,
        attention_dropout=config.attn_pdrop,
        norm_eps=config.layer_norm_epsilon,
        tie_embeddings=config.tie_word_embeddings,
    )


def config_to_hf(config: TransformerConfig) -> PreTrainedConfig:
    """The GPT-2 config of our config.

    Raises:
        InvalidInput: what GPT-2 cannot compute: grouped heads, windows, another structure.
    """
    from transformers import GPT2Config

    require_style(config, "gpt2", ("feed_forward", "norm_eps", "tie_embeddings"))
    require_no_methods(config)
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    if config.feed_forward not in activations:
        raise InvalidInput("config", f"feed_forward {' or '.join(activations)}", repr(config.feed_forward))
    if config.kv_heads != config.heads or config.head_dim * config.heads != config.dim or "S" in config.pattern:
        got = f"{config.kv_heads} kv_heads, head_dim {config.head_dim}, pattern {config.pattern!r}"
        raise InvalidInput("config", f"{config.heads} kv_heads, head_dim dim / heads, pattern 'L'", got)
    return GPT2Config(
        vocab_size=config.vocab_size,
        n_embd=config.dim,
        n_layer=config.layers,
        n_head=config.heads,
        n_inner=config.hidden,
        n_positions=config.max_length,
        activation_function=activations[config.feed_forward],
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.attention_dropout,
        layer_norm_epsilon=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )


def names(model: Any) -> Names:
    """Where GPT-2 keeps each of our weights."""
    config = model.config
    found = {
        "embedding.weight": Weight(_EMBEDDING),
        "position_embedding.weight": Weight("transformer.wpe.weight"),
        "norm.weight": Weight("transformer.ln_f.weight"),
        "norm.bias": Weight("transformer.ln_f.bias"),
    }
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        for kind, transposed in (("weight", True), ("bias", False)):
            for name, norm in _LAYER_NORMS:
                found[f"{ours}.{name}.{kind}"] = Weight(f"{theirs}.{norm}.{kind}")
            for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
                found[f"{ours}.attention.{name}.{kind}"] = Weight(f"{theirs}.attn.c_attn.{kind}", transposed, part)
            for name, matrix in _LAYER_MATRICES:
                found[f"{ours}.{name}.{kind}"] = Weight(f"{theirs}.{matrix}.{kind}", transposed)
    if not config.tie_embeddings:
        found["head.weight"] = Weight(_HEAD)
    return found


def derived(model: Any) -> Mapping[str, str]:
    """The tied projection."""
    return {_HEAD: _EMBEDDING} if model.config.tie_embeddings else {}


def normalised(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Under the prefix that the first checkpoints lack, and without their causal masks."""
    prefix = "" if any(name.startswith("transformer.") for name in state) else "transformer."
    return {
        name if name == _HEAD else prefix + name: weight
        for name, weight in state.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
