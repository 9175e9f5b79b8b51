"""Llama-style checkpoints of Hugging Face in our reference decoder, and back.

The two name the same weights differently and compute the same: grouped heads, rotary positions, RMSNorm, SwiGLU, no
biases. What our decoder cannot compute is an error, never left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.models import Decoder, TransformerConfig
from longattn.rope import Rope
from longattn.scaling import NTK, DynamicNTK

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["config_from_hf", "config_to_hf", "from_hf", "load_pretrained", "to_hf"]

_MODEL_TYPES = ("llama", "mistral")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_INDEX = "model.safetensors.index.json"

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


def load_pretrained(folder: str | Path, *, dtype: torch.dtype | None = None) -> Decoder:
    """The decoder of a folder with config.json and safetensors, in one file or in shards; on the CPU, in eval mode.

    Args:
        folder: as `save_pretrained` of transformers writes it, and as model hubs hold it.
        dtype: of the weights; the checkpoint's by default.

    Raises:
        InvalidInput: no such checkpoint, a truncated or missing file, missing or unexpected weights, or a model that
            our decoder cannot compute.
    """
    from transformers import AutoConfig

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InvalidInput("folder", "a folder with a config.json", folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return _decoder(config_from_hf(config), _read_weights(folder), dtype)


def from_hf(model: PreTrainedModel) -> Decoder:
    """A copy of a transformers model as our decoder, in eval mode.

    Args:
        model: a LlamaForCausalLM or MistralForCausalLM.

    Raises:
        InvalidInput: as `load_pretrained`.
    """
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    return _decoder(config_from_hf(model.config), state, None)


def to_hf(decoder: Decoder) -> PreTrainedModel:
    """A copy of our decoder as a transformers model, in eval mode; its save_pretrained writes a checkpoint for others.

    Returns:
        A LlamaForCausalLM, or a MistralForCausalLM if all layers are sliding.

    Raises:
        InvalidInput: what Hugging Face's models cannot compute: mixed layers, sinks, or a scaling they do not know.
    """
    from transformers import AutoModelForCausalLM

    config = config_to_hf(decoder.config)
    ours = decoder.state_dict()
    state = {theirs: ours[name].clone() for name, theirs in _names(decoder.config).items()}
    config.dtype = decoder.embedding.weight.dtype
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state, strict=not decoder.config.tie_embeddings, assign=True)
    model.tie_weights()
    return model.eval()


def config_from_hf(config: PreTrainedConfig) -> TransformerConfig:
    """Our config of a Llama or Mistral config.

    Raises:
        InvalidInput: another model, or options that our decoder does not have.
    """
    if config.model_type not in _MODEL_TYPES:
        raise InvalidInput("config", f"model_type {' or '.join(_MODEL_TYPES)}", config.model_type)
    for name, expected in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if getattr(config, name, expected) != expected:
            raise InvalidInput("config", f"{name} {expected!r}", repr(getattr(config, name)))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = Rope.from_hf(config)
    if rope.dim != head_dim or rope.interleaved:
        raise InvalidInput("config", f"rotation of all {head_dim} entries of a head, in halves", rope)
    window = getattr(config, "sliding_window", None)
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
        tie_embeddings=config.tie_word_embeddings,
    )


def config_to_hf(config: TransformerConfig) -> PreTrainedConfig:
    """The Llama config of our config, or the Mistral config if all layers are sliding.

    Raises:
        InvalidInput: as `to_hf`.
    """
    from transformers import LlamaConfig, MistralConfig

    sliding = {config.is_sliding(layer) for layer in range(config.layers)}
    if len(sliding) > 1 or config.sinks:
        got = f"pattern {config.pattern!r} with {config.sinks} sinks"
        raise InvalidInput("config", "all layers full or all sliding, without sinks", got)
    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": _rope_parameters(config),
    }
    made = MistralConfig(**shape, sliding_window=config.window) if True in sliding else LlamaConfig(**shape)
    if Rope.from_hf(made) != _without_ntk(config.rope):
        raise InvalidInput("config", "a rotation that Hugging Face's models have", config.rope)
    return made


def _rope_parameters(config: TransformerConfig) -> dict[str, Any]:
    rope = _without_ntk(config.rope)
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.base}
    if rope.scaling is None:
        return parameters
    values = rope.scaling.to_dict()
    parameters["rope_type"] = values.pop("type")
    if isinstance(rope.scaling, DynamicNTK) and rope.scaling.original_max_position != config.max_length:
        raise InvalidInput(
            "config", f"max_length {rope.scaling.original_max_position} as its DynamicNTK", config.max_length
        )
    theirs = {"original_max_position": "original_max_position_embeddings", "proportion": "partial_rotary_factor"}
    return parameters | {theirs.get(name, name): value for name, value in values.items() if value is not None}


def _without_ntk(rope: Rope) -> Rope:
    """NTK scaling is another base, and Hugging Face has no name for it."""
    if not isinstance(rope.scaling, NTK):
        return rope
    return Rope(rope.dim, rope.base * rope.scaling.factor ** (rope.dim / (rope.dim - 2)), None, rope.interleaved)


def _names(config: TransformerConfig) -> dict[str, str]:
    """Their name of each of our weights."""
    names = {"embedding.weight": _EMBEDDING, "norm.weight": "model.norm.weight"}
    for layer in range(config.layers):
        for ours, theirs in _LAYER_NAMES:
            names[f"blocks.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    if not config.tie_embeddings:
        names["head.weight"] = _HEAD
    return names


def _decoder(config: TransformerConfig, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> Decoder:
    """The decoder with these weights, by Hugging Face's names."""
    with torch.device("meta"):
        decoder = Decoder(config)
    names = _names(config)
    state = _without_derived(state, config)
    missing, unexpected = names.values() - state.keys(), state.keys() - set(names.values())
    problems = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in unexpected]
    for ours, weight in decoder.state_dict().items():
        given = state.get(names[ours])
        if given is not None and given.shape != weight.shape:
            problems.append(f"{names[ours]} of shape {tuple(given.shape)} for {tuple(weight.shape)}")
    if problems:
        listing = "; ".join(sorted(problems)[:8]) + (f"; {len(problems) - 8} more" if len(problems) > 8 else "")
        raise InvalidInput("checkpoint", "the weights that its config asks for", listing)
    decoder.load_state_dict({ours: state[theirs] for ours, theirs in names.items()}, assign=True)
    return decoder.to(dtype).eval()


def _without_derived(state: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """Without what follows from the rest: the rotation's frequencies (old checkpoints), and the tied projection."""
    kept = {name: weight for name, weight in state.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings and _HEAD in kept:
        head = kept.pop(_HEAD)
        if _EMBEDDING in kept and not torch.equal(head, kept[_EMBEDDING]):
            raise InvalidInput("checkpoint", f"{_HEAD} equal to {_EMBEDDING}, as its config ties them", "other weights")
    return kept


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's safetensors files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = ["model.safetensors"]
    if (folder / _INDEX).is_file():
        files = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise InvalidInput("folder", f"a folder with {name}", folder)
        try:
            weights |= load_file(folder / name)
        except SafetensorError as error:
            raise InvalidInput("checkpoint", "complete safetensors files", f"{name}: {error}") from error
    return weights
