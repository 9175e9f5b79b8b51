"""Llama-style checkpoints in our decoder and back: the same logits as transformers' own, and clear errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from longattn import InvalidInput
from longattn.integrations.huggingface import config_from_hf, config_to_hf, from_hf, load_pretrained, to_hf
from longattn.models import Decoder, TransformerConfig
from longattn.scaling import NTK, DynamicNTK, Linear, Llama3, LongRoPE, YaRN

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "attn_implementation": "eager",
}
OURS: dict[str, Any] = {"vocab_size": 61, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "max_length": 16}
TOKENS = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(0))


def llama(**options: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **options})).eval()


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Equal within float32 rounding of sums in another order."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: llama(), id="llama"),
        pytest.param(lambda: llama(tie_word_embeddings=True, head_dim=16, rms_norm_eps=1e-3), id="tied"),
        pytest.param(
            lambda: llama(
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8,
                }
            ),
            id="llama3",
        ),
        pytest.param(
            lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)).eval(),
            id="mistral",
        ),
    ],
)
def test_logits_are_those_of_transformers(model: Any) -> None:
    theirs = model()
    ours = from_hf(theirs)
    with torch.no_grad():
        assert_same(ours(TOKENS), theirs(TOKENS).logits)
        assert_same(to_hf(ours)(TOKENS).logits, theirs(TOKENS).logits)
    assert config_from_hf(config_to_hf(ours.config)) == ours.config


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        NTK(4.0),
        Linear(2.0),
        DynamicNTK(2.0, 16),
        YaRN(4.0, 8, beta_fast=16.0, truncate=False),
        Llama3(8.0, 8),
        LongRoPE(2.0, 8, (1.0, 1.0, 1.5, 2.0), (1.0, 2.0, 3.0, 4.0)),
    ],
)
def test_our_decoder_in_transformers(scaling: Any) -> None:
    ours = Decoder(TransformerConfig(**OURS, rope_base=1000.0, rope_scaling=scaling)).eval()
    with torch.no_grad():
        assert_same(to_hf(ours)(TOKENS, use_cache=False).logits, ours(TOKENS))


def test_a_copy_shares_nothing() -> None:
    theirs = llama()
    ours = from_hf(theirs)
    with torch.no_grad():
        ours.embedding.weight.zero_()
        ours.norm.weight.zero_()
    assert theirs.model.embed_tokens.weight.abs().sum() > 0 < theirs.model.norm.weight.sum()
    assert all(weight.requires_grad for weight in ours.parameters())


@pytest.mark.parametrize("shards", ["one file", "shards"])
def test_a_folder(tmp_path: Path, shards: str) -> None:
    theirs = llama(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path, max_shard_size="1GB" if shards == "one file" else "10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shards == "shards")
    ours = load_pretrained(tmp_path)
    with torch.no_grad():
        assert_same(ours(TOKENS), theirs(TOKENS).logits)
    assert load_pretrained(tmp_path, dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16


def test_a_training_step_and_back(tmp_path: Path) -> None:
    ours = from_hf(llama())
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours.loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    optimizer.step()
    to_hf(ours).save_pretrained(tmp_path)
    with torch.no_grad():
        assert_same(load_pretrained(tmp_path)(TOKENS), ours(TOKENS))
        assert_same(LlamaForCausalLM.from_pretrained(tmp_path).eval()(TOKENS).logits, ours(TOKENS))


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda state: state.pop("model.layers.1.mlp.up_proj.weight"), "missing model.layers.1.mlp.up_proj.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda state: state.update({"model.norm.weight": torch.ones(31)}), r"model.norm.weight of shape \(31,\)"),
    ],
)
def test_wrong_weights(tmp_path: Path, break_it: Any, says: str) -> None:
    llama().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    break_it(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InvalidInput, match=says):
        load_pretrained(tmp_path)


def test_an_untied_projection_under_a_tied_config(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(InvalidInput, match="lm_head.weight"):
        load_pretrained(tmp_path)


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"config\.json"):
        load_pretrained(tmp_path)
    llama().save_pretrained(tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InvalidInput, match=f"complete safetensors files, got {shard.name}"):
        load_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(InvalidInput, match=shard.name):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "no JSON",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"lm_head.weight": 3}}',
        '{"weight_map": {"lm_head.weight": "../model.safetensors"}}',
        '{"weight_map": {"lm_head.weight": "/model.safetensors"}}',
        '{"weight_map": {"lm_head.weight": "below/model.safetensors"}}',
        '{"weight_map": {"lm_head.weight": ".."}}',
        '{"weight_map": {"lm_head.weight": "config.json"}}',
        '{"weight_map": {"lm_head.weight": "model.safetensors"}}',
        '{"weight_map": {"other.weight": "model.safetensors"}}',
        "[" * 100_000,
    ],
    ids=range(13),
)
def test_indices_that_are_damaged_or_leave_the_folder(index: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    llama().save_pretrained(folder)
    (folder / "below").mkdir()
    for place in (tmp_path, folder / "below"):
        shutil.copy(folder / "model.safetensors", place)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InvalidInput, match=r"folder|checkpoint") as refused:
        load_pretrained(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"},
        {"hidden_size": 0},
        {"hidden_size": 10**30},
        {"num_attention_heads": 0},
        {"num_attention_heads": -4},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**18},
        {"vocab_size": -1},
        {"vocab_size": None},
        {"max_position_embeddings": 0},
        {"rms_norm_eps": "small"},
        {"architectures": 3},
        {"architectures": [["LlamaForCausalLM"]]},
        {"architectures": []} | {"model_type": "llama", "hidden_act": "silu", "head_dim": 10**9},
        {"model_type": ["llama"]},
        {"model_type": "../llama"},
        {"rope_parameters": {"rope_type": "yarn", "factor": "big"}},
        {"rope_parameters": {"rope_type": "unheard of", "rope_theta": 1e4}},
        {"rope_parameters": 3},
        {"longattn": 3},
        {"longattn": {"type": "log_n"}},
        {"longattn": [3]},
        {"longattn": [{"type": "log_n", "original_max_position": "x"}]},
        {"longattn": [{"type": "self_extend", "group": 10**40, "window": 1}]},
        {"longattn": "log_n"},
    ],
    ids=str,
)
def test_configs_that_are_damaged(change: dict[str, Any], tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InvalidInput) as refused:
        load_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '"text"', "{", "[" * 100_000, '{"model_type": NaN}'])
def test_configs_that_are_no_configs(text: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidInput, match="folder"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x.int(), "of torch.int32"),
        (lambda x: x * float("inf"), "is not finite"),
        (lambda x: x.bfloat16().to(torch.float8_e5m2), "of torch.float8_e5m2"),
        (lambda x: x[None], "of shape"),
        (lambda x: x[:0], "of shape"),
    ],
)
def test_weights_of_other_kinds(change: Any, says: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    llama().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: change(weights[name]).contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidInput, match=f"{name} {says}"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LlamaConfig(**SHAPE, attention_bias=True), "attention_bias"),
        (LlamaConfig(**SHAPE, mlp_bias=True), "mlp_bias"),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "hidden_act"),
        (Qwen2Config(**SHAPE), "model_type llama or mistral or gpt2 or bert"),
    ],
)
def test_models_that_our_decoder_is_not(config: PreTrainedConfig, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        config_from_hf(config)


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "SL", "window": 4},
        {"pattern": "S", "window": 4, "sinks": 2},
        {"rope_scaling": DynamicNTK(2.0, 8)},
        {"dropout": 0.1},
        {"positions": "sinusoidal"},
        {"positions": "learned"},
    ],
)
def test_decoders_that_hugging_face_has_no_model_for(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="config"):
        config_to_hf(TransformerConfig(**OURS, **options))
