"""GPT-2 and BERT checkpoints in our models and back: the same logits as transformers' own, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from longattn import InvalidInput
from longattn.integrations.huggingface import config_from_hf, config_to_hf, from_hf, load_pretrained, to_hf
from longattn.models import Decoder, EncoderDecoder, MaskedLM, TransformerConfig

GPT2: dict[str, Any] = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 24,
    "bos_token_id": None,
    "eos_token_id": None,
}
BERT: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
OURS: dict[str, Any] = {"vocab_size": 61, "dim": 32, "layers": 2, "heads": 4, "max_length": 24}
TOKENS = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))
TYPES = (torch.arange(20) > 8).long().expand(2, 20)
MASK = torch.arange(20) < torch.tensor([[20], [13]])


def drawn(model: Any) -> Any:
    """With biases and norms that are not 0 and 1, so that a mixed-up name shows."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    return model.eval()


def gpt2(**options: Any) -> Any:
    return drawn(hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2 | options)))


def bert(cls: Any, **options: Any) -> Any:
    return drawn(cls(hf.BertConfig(**BERT | options)))


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Equal within float32 rounding of sums in another order."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False, "activation_function": "relu", "n_inner": 56}])
def test_gpt2(tmp_path: Path, options: dict[str, Any]) -> None:
    theirs = gpt2(**options)
    ours = from_hf(theirs)
    assert isinstance(ours, Decoder) and all(weight.requires_grad for weight in ours.parameters())
    assert config_from_hf(config_to_hf(ours.config)) == ours.config
    to_hf(ours).save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = theirs(TOKENS).logits
        assert_same(ours(TOKENS), wanted)
        assert_same(to_hf(ours)(TOKENS).logits, wanted)
        assert_same(load_pretrained(tmp_path)(TOKENS), wanted)
        assert_same(hf.GPT2LMHeadModel.from_pretrained(tmp_path).eval()(TOKENS).logits, wanted)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (hf.BertModel, {}),
        (hf.BertForMaskedLM, {}),
        (hf.BertForMaskedLM, {"tie_word_embeddings": False}),
        (hf.BertForPreTraining, {}),
        (hf.BertForSequenceClassification, {"num_labels": 3}),
        (hf.BertForTokenClassification, {"num_labels": 5}),
    ],
)
def test_bert(tmp_path: Path, cls: Any, options: dict[str, Any]) -> None:
    theirs = bert(cls, **options)
    ours = from_hf(theirs)
    to_hf(ours).save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    with torch.no_grad():
        wanted = theirs(TOKENS, attention_mask=MASK.long(), token_type_ids=TYPES)[0]
        back = to_hf(ours)(TOKENS, attention_mask=MASK.long(), token_type_ids=TYPES)[0]
        for got in (ours(TOKENS, token_types=TYPES, key_mask=MASK), back):
            seen = MASK if wanted.dim() == 3 else slice(None)
            assert_same(got[seen], wanted[seen])
        assert_same(again(TOKENS), ours(TOKENS))


def test_bert_pretraining_logits_of_pairs() -> None:
    theirs = bert(hf.BertForPreTraining)
    ours = from_hf(theirs)
    assert isinstance(ours, MaskedLM)
    with torch.no_grad():
        wanted = theirs(TOKENS, token_type_ids=TYPES).seq_relationship_logits
        assert_same(ours.next_sentence_logits(ours.encoder(TOKENS, token_types=TYPES)), wanted)


def test_old_names_and_other_architectures(tmp_path: Path) -> None:
    theirs = bert(hf.BertForPreTraining)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in [name for name in state if "LayerNorm" in name]:
        state[name.replace("weight", "gamma").replace("bias", "beta")] = state.pop(name)
    state["bert.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(state, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(InvalidInput, match=r"unexpected bert\.pooler\.dense\.bias"):
        load_pretrained(tmp_path)
    ours = load_pretrained(tmp_path, architecture="BertForPreTraining")
    with torch.no_grad():
        assert_same(ours(TOKENS), theirs(TOKENS).prediction_logits)
    with pytest.raises(InvalidInput, match="architecture"):
        load_pretrained(tmp_path, architecture="BertForQuestionAnswering")


def test_first_gpt2_checkpoints(tmp_path: Path) -> None:
    theirs = gpt2()
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): weight for name, weight in state.items()}
    old["h.0.attn.bias"] = torch.ones(24, 24).tril()
    save_file(old, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert_same(load_pretrained(tmp_path)(TOKENS), theirs(TOKENS).logits)
    del old["h.1.attn.c_attn.bias"]
    old["h.0.mlp.c_fc.weight"] = torch.zeros(32, 64)
    save_file(old, tmp_path / "model.safetensors")
    with pytest.raises(InvalidInput, match=r"missing transformer\.h\.1\.attn\.c_attn\.bias.*c_fc\.weight of shape"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (hf.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (hf.GPT2Config(**GPT2, embd_pdrop=0.3), "embd_pdrop"),
        (hf.GPT2Config(**GPT2, activation_function="silu"), "activation_function"),
        (hf.BertConfig(**BERT, hidden_act="relu"), "hidden_act"),
        (hf.BertConfig(**BERT, is_decoder=True), "is_decoder"),
    ],
)
def test_models_that_ours_are_not(config: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        config_from_hf(config)


@pytest.mark.parametrize(
    ("style", "options"),
    [
        ("gpt2", {"kv_heads": 2}),
        ("gpt2", {"pattern": "S", "window": 4}),
        ("gpt2", {"norm": "rms"}),
        ("gpt2", {"feed_forward": "swiglu"}),
        ("bert", {"norm_first": True}),
        ("bert", {"token_types": 0}),
        ("modern-encoder", {}),
        ("transformer", {}),
    ],
)
def test_models_that_hugging_face_has_not(style: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="config"):
        config_to_hf(TransformerConfig.style(style, **OURS | options))


def test_a_model_without_counterpart() -> None:
    with pytest.raises(InvalidInput, match="EncoderDecoder"):
        to_hf(EncoderDecoder(TransformerConfig.style("transformer", **OURS)))
