"""BERT: learned positions, token types, post-norm LayerNorm, GELU, biases; alone or with a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from longattn.errors import InvalidInput
from longattn.integrations.huggingface.options import require, require_no_methods, require_style
from longattn.integrations.huggingface.weights import Names, Weight
from longattn.models import Encoder, MaskedLM, SequenceClassifier, TransformerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["config_from_hf", "config_to_hf", "derived", "names", "normalised"]

_EMBEDDING = "bert.embeddings.word_embeddings.weight"
_HEAD, _HEAD_BIAS = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"
_OUTPUT_BIAS = "cls.predictions.bias"
_LAYER_NAMES = (
    ("attention.q_proj", "attention.self.query"),
    ("attention.k_proj", "attention.self.key"),
    ("attention.v_proj", "attention.self.value"),
    ("attention.o_proj", "attention.output.dense"),
    ("attention_norm", "attention.output.LayerNorm"),
    ("feed_forward.up_proj", "intermediate.dense"),
    ("feed_forward.down_proj", "output.dense"),
    ("feed_forward_norm", "output.LayerNorm"),
)


def config_from_hf(config: PreTrainedConfig) -> TransformerConfig:
    """Our config of a BERT config.

    Raises:
        InvalidInput: options that our encoder does not have.
    """
    require(config, hidden_act="gelu", is_decoder=False, position_embedding_type="absolute")
    if getattr(config, "classifier_dropout", None) is not None:
        require(config, classifier_dropout=config.hidden_dropout_prob)
    return TransformerConfig.style(
        "bert",
        vocab_size=config.vocab_size,
        dim=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        hidden=config.intermediate_size,
        max_length=config.max_position_embeddings,
        token_types=config.type_vocab_size,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        norm_eps=config.layer_norm_eps,
        tie_embeddings=config.tie_word_embeddings,
    )


def config_to_hf(config: TransformerConfig) -> PreTrainedConfig:
    """The BERT config of our config.

    Raises:
        InvalidInput: what BERT cannot compute: grouped heads, windows, another structure.
    """
    from transformers import BertConfig

    require_style(config, "bert", ("norm_eps", "tie_embeddings"))
    require_no_methods(config)
    if (
        config.kv_heads != config.heads
        or config.head_dim * config.heads != config.dim
        or "S" in config.pattern
        or not config.token_types
    ):
        got = (
            f"{config.kv_heads} kv_heads, head_dim {config.head_dim}, pattern {config.pattern!r}, "
            f"{config.token_types} token_types"
        )
        raise InvalidInput("config", f"{config.heads} kv_heads, head_dim dim / heads, pattern 'L', token_types", got)
    return BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.hidden,
        max_position_embeddings=config.max_length,
        type_vocab_size=config.token_types,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        layer_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
    )


def names(model: Any) -> Names:
    """Where BERT, with the head that our model has, keeps each of our weights."""
    found = {
        "embedding.weight": "embeddings.word_embeddings.weight",
        "position_embedding.weight": "embeddings.position_embeddings.weight",
        "type_embedding.weight": "embeddings.token_type_embeddings.weight",
    }
    kinds = ("weight", "bias")
    found |= {f"embedding_norm.{kind}": f"embeddings.LayerNorm.{kind}" for kind in kinds}
    for layer in range(model.config.layers):
        for ours, theirs in _LAYER_NAMES:
            found |= {f"blocks.{layer}.{ours}.{kind}": f"encoder.layer.{layer}.{theirs}.{kind}" for kind in kinds}
    if isinstance(model, Encoder):
        return {ours: Weight(theirs) for ours, theirs in found.items()}
    found = {f"encoder.{ours}": f"bert.{theirs}" for ours, theirs in found.items()}
    heads: tuple[tuple[str, str], ...] = (("head", "classifier"),)
    if isinstance(model, MaskedLM):
        tied = model.config.tie_embeddings
        found |= {"output_bias": _OUTPUT_BIAS} if tied else {"head.weight": _HEAD, "output_bias": _HEAD_BIAS}
        heads = (("dense", "cls.predictions.transform.dense"), ("norm", "cls.predictions.transform.LayerNorm"))
        if model.pooler is not None:
            heads += (("pooler.dense", "bert.pooler.dense"), ("next_sentence", "cls.seq_relationship"))
    elif isinstance(model, SequenceClassifier):
        heads += (("pooler.dense", "bert.pooler.dense"),)
    found |= {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in heads for kind in kinds}
    return {ours: Weight(theirs) for ours, theirs in found.items()}


def derived(model: Any) -> Mapping[str, str]:
    """The tied projection of a masked language model, and the second name of its bias."""
    if not isinstance(model, MaskedLM):
        return {}
    return {_HEAD_BIAS: _OUTPUT_BIAS, _HEAD: _EMBEDDING} if model.config.tie_embeddings else {_OUTPUT_BIAS: _HEAD_BIAS}


def normalised(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """What our model has, by the names of today.

    Without the places that old checkpoints hold; for an `Encoder` a BertModel's weights but its pooler, which reads the
    encoder's output; and of an untied projection only the bias that BERT uses then.
    """
    kept = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): weight
        for name, weight in state.items()
        if not name.endswith("embeddings.position_ids")
    }
    if isinstance(model, Encoder):
        own = {name.removeprefix("bert."): weight for name, weight in kept.items()}
        return {name: weight for name, weight in own.items() if not name.startswith("pooler.")}
    if isinstance(model, MaskedLM) and not model.config.tie_embeddings and _HEAD_BIAS in kept:
        kept.pop(_OUTPUT_BIAS, None)
    return kept
