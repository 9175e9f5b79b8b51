"""Tiny random models of many architectures, and inputs with padding."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor

VOCABULARY = 99
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_BERT = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
_BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_LLAMA4 = {
    "head_dim": 16,
    "attention_chunk_size": 5,
    "num_local_experts": 2,
    "intermediate_size_mlp": 48,
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [1, 0],
}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_GPT_OSS = {
    "head_dim": 16,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
_GEMMA2 = {"head_dim": 16, "sliding_window": 5, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 128}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

DECODERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (hf.GPT2Config, {**_GPT2, **_SPECIAL, "scale_attn_by_inverse_layer_idx": True}),
    "opt": (hf.OPTConfig, {**_BERT, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi": (hf.PhiConfig, _LLAMA),
    "llama": (hf.LlamaConfig, _LLAMA),
    "mistral": (hf.MistralConfig, {**_LLAMA, "sliding_window": 5}),
    "qwen2": (hf.Qwen2Config, _LLAMA),
    "qwen3": (hf.Qwen3Config, {**_LLAMA, "head_dim": 16}),
    "gemma2": (hf.Gemma2Config, {**_LLAMA, **_GEMMA2}),
    "gemma3": (hf.Gemma3TextConfig, {**_LLAMA, **_MIXED, "head_dim": 256}),
    "gpt_oss": (hf.GptOssConfig, {**_LLAMA, **_MIXED, **_GPT_OSS}),
    "llama4": (hf.Llama4TextConfig, {**_LLAMA, **_LLAMA4}),
    "deepseek_v3": (hf.DeepseekV3Config, {**_LLAMA, **_DEEPSEEK}),
}
ENCODERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (hf.BertConfig, _BERT),
    "distilbert": (
        hf.DistilBertConfig,
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY, "pad_token_id": 0},
    ),
    "modernbert": (
        hf.ModernBertConfig,
        {**_BERT, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 8},
    ),
    "vit": (
        hf.ViTConfig,
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 16,
            "patch_size": 4,
        },
    ),
}
SEQ2SEQ: dict[str, tuple[Any, dict[str, Any]]] = {
    "t5": (
        hf.T5Config,
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": (hf.BartConfig, {**_BART, "max_position_embeddings": 128, "forced_eos_token_id": None}),
    "whisper": (
        hf.WhisperConfig,
        {
            **_BART,
            "max_target_positions": 128,
            "max_source_positions": 30,
            "num_mel_bins": 8,
            "begin_suppress_tokens": None,
        },
    ),
}
ALL = {**DECODERS, **ENCODERS, **SEQ2SEQ}
_SEQ2SEQ_CLASSES = {
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
}


def tiny(name: str, **options: Any) -> hf.PreTrainedModel:
    """The model, in eval mode, with weights wide enough that attention is far from uniform."""
    make, shape = ALL[name]
    config = make(**{**shape, **options})
    torch.manual_seed(0)
    if name in SEQ2SEQ:
        model = getattr(hf, _SEQ2SEQ_CLASSES[name])(config)
    else:
        model = (hf.AutoModel if name in ENCODERS else hf.AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for label, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(0, 0.15)
            elif "sinks" in label or "bias" in label:
                weight.normal_(0, 0.5)
    if model.can_generate():
        model.generation_config.eos_token_id = None
    return model.eval()


def inputs(name: str, padding: str | None) -> tuple[dict[str, Tensor], Tensor]:
    """Keywords of a forward call with 2 rows of 13 tokens, the first with 4 of padding, and which outputs are real."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (2, 13), generator=generator)
    real = torch.ones_like(ids)
    if padding is not None:
        place = slice(0, 4) if padding == "left" else slice(9, 13)
        real[0, place] = ids[0, place] = 0
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}, torch.ones(2, 17)
    if name == "whisper":
        features = torch.randn(2, 8, 60, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids, "decoder_attention_mask": real}, real
    keywords = {"input_ids": ids} if padding is None else {"input_ids": ids, "attention_mask": real}
    if name in SEQ2SEQ:
        keywords["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
        return keywords, torch.ones(2, 7)
    return keywords, real
