"""Bad arguments of flash-attn's functions: each is named in an InvalidInput."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longattn import InvalidInput
from longattn.compat import flash_attn as fa
from longattn.compat.flash_attn import bert_padding

Q, K, V = torch.zeros(2, 5, 4, 8), torch.zeros(2, 7, 2, 8), torch.zeros(2, 7, 2, 8)
CU_Q, CU_K = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 3, 7], dtype=torch.int32)
PACKED = {"q": Q[0], "k": K[0], "v": V[0], "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
PACKED |= {"max_seqlen_q": 3, "max_seqlen_k": 4}
PAGES = {**PACKED, "k": torch.zeros(6, 2, 2, 8), "v": torch.zeros(6, 2, 2, 8)}
PAGES["block_table"] = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
COS = torch.zeros(16, 2)


def ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


DENSE: list[tuple[str, dict[str, Any]]] = [
    ("q", {"q": 1.0}),
    ("q", {"q": Q[0]}),
    ("q", {"q": Q.to_sparse()}),
    ("q", {"q": torch.nested.nested_tensor([Q[0], Q[1, :3]], layout=torch.jagged)}),
    ("q", {"q": Q.int(), "k": K.int(), "v": V.int()}),
    ("q", {"q": Q[:, :, :3]}),
    ("k", {"k": K[:1], "v": V[:1]}),
    ("k", {"k": K[..., :6], "v": V[..., :6]}),
    ("k", {"k": K.double()}),
    ("k", {"k": K.to("meta")}),
    ("v", {"v": V[:, :6]}),
    ("v", {"v": None}),
    ("dropout_p", {"dropout_p": 1.0}),
    ("dropout_p", {"dropout_p": -0.5}),
    ("dropout_p", {"dropout_p": "0.5"}),
    ("softmax_scale", {"softmax_scale": float("inf")}),
    ("softmax_scale", {"softmax_scale": "1"}),
    ("causal", {"causal": 1}),
    ("window_size", {"window_size": 3}),
    ("window_size", {"window_size": None}),
    ("window_size", {"window_size": (1, 2, 3)}),
    ("window_size", {"window_size": (1.5, 2)}),
    ("window_size", {"window_size": (2**40, 0)}),
    ("softcap", {"softcap": "1"}),
    ("softcap", {"softcap": float("nan")}),
    ("alibi_slopes", {"alibi_slopes": torch.zeros(3)}),
    ("alibi_slopes", {"alibi_slopes": [0.1] * 4}),
    ("deterministic", {"deterministic": None}),
    ("return_attn_probs", {"return_attn_probs": 1}),
]
VARLEN: list[tuple[str, dict[str, Any]]] = [
    ("q", {"q": Q}),
    ("v", {"v": V[0, :6]}),
    ("cu_seqlens_q", {"cu_seqlens_q": [0, 2, 5]}),
    ("cu_seqlens_q", {"cu_seqlens_q": ints(0, 2, 6)}),
    ("cu_seqlens_k", {"cu_seqlens_k": ints(0, 5, 4)}),
    ("cu_seqlens_k", {"cu_seqlens_k": ints(0, 7)}),
    ("cu_seqlens_k", {"cu_seqlens_k": CU_K.float()}),
    ("max_seqlen_q", {"max_seqlen_q": 2}),
    ("max_seqlen_k", {"max_seqlen_k": "4"}),
    ("softmax_scale", {"softmax_scale": float("nan")}),
    ("window_size", {"window_size": (1,)}),
    ("block_table", {**PAGES, "block_table": [[0]]}),
    ("block_table", {**PAGES, "block_table": ints([0, 1])}),
    ("block_table", {**PAGES, "block_table": ints([0, 6], [2, 3])}),
    ("block_table", {**PAGES, "block_table": ints([0, 1], [-1, 3])}),
    ("block_table", {**PAGES, "block_table": torch.zeros(2, 2)}),
    ("k", {**PAGES, "k": K[0]}),
    ("v", {**PAGES, "v": PAGES["v"][:5]}),
    ("cu_seqlens_k", {**PAGES, "cu_seqlens_k": ints(0, 3, 8)}),
    ("cu_seqlens_k", {**PAGES, "cu_seqlens_k": None}),
]
CACHE: list[tuple[str, dict[str, Any]]] = [
    ("q", {"q": Q[0]}),
    ("q", {"q": Q.clone().requires_grad_()}),
    ("k_cache", {"k_cache": K[0]}),
    ("k_cache", {"k_cache": K[:1], "v_cache": V[:1]}),
    ("k_cache", {"k_cache": K.double()}),
    ("v_cache", {"v_cache": V[:, :6]}),
    ("v", {"v": None}),
    ("k", {"k": None}),
    ("k", {"k": K[:, :1, :1]}),
    ("k", {"k": K[:, :1].double()}),
    ("v", {"v": V[:, :2]}),
    ("cache_seqlens", {"cache_seqlens": None}),
    ("cache_seqlens", {"cache_seqlens": 7}),
    ("cache_seqlens", {"cache_seqlens": 2**70}),
    ("cache_seqlens", {"cache_seqlens": -1}),
    ("cache_seqlens", {"cache_seqlens": True}),
    ("cache_seqlens", {"cache_seqlens": ints(1, 7)}),
    ("cache_seqlens", {"cache_seqlens": ints(1, -1)}),
    ("cache_seqlens", {"cache_seqlens": ints(1)}),
    ("cache_seqlens", {"cache_seqlens": torch.ones(2)}),
    ("cache_batch_idx", {"cache_batch_idx": ints(0, 2)}),
    ("cache_batch_idx", {"cache_batch_idx": ints(0)}),
    ("cache_batch_idx", {"cache_batch_idx": [0, 1]}),
    ("cache_leftpad", {"cache_leftpad": ints(0, -1)}),
    ("cache_leftpad", {"cache_leftpad": ints(0)}),
    ("block_table", {"block_table": ints(0, 1)}),
    ("block_table", {"block_table": ints([0], [2])}),
    ("cache_seqlens", {"block_table": ints([0], [1]), "cache_seqlens": 7}),
    ("cache_batch_idx", {"block_table": ints([0], [1]), "cache_batch_idx": ints(0, 1)}),
    ("cache_leftpad", {"block_table": ints([0], [1]), "cache_leftpad": ints(0, 0)}),
    ("rotary_cos", {"rotary_sin": COS}),
    ("rotary_sin", {"rotary_cos": COS}),
    ("rotary_sin", {"rotary_cos": COS, "rotary_sin": COS[:, :1]}),
    ("rotary_cos", {"rotary_cos": COS.int(), "rotary_sin": COS}),
    ("rotary_cos", {"rotary_cos": torch.zeros(16, 5), "rotary_sin": torch.zeros(16, 5)}),
    ("rotary_cos", {"rotary_cos": COS[:3], "rotary_sin": COS[:3]}),
    ("rotary_cos", {"rotary_cos": COS[:5], "rotary_sin": COS[:5], "causal": True}),
    ("rotary_cos", {"rotary_cos": COS, "rotary_sin": COS, "k": None, "v": None}),
    ("rotary_interleaved", {"rotary_cos": COS, "rotary_sin": COS, "rotary_interleaved": 1}),
    ("num_splits", {"num_splits": -1}),
    ("num_splits", {"num_splits": 1.5}),
    ("softmax_scale", {"softmax_scale": "1"}),
    ("window_size", {"window_size": "ab"}),
    ("return_softmax_lse", {"return_softmax_lse": 1}),
]
ROTARY: list[tuple[str, dict[str, Any]]] = [
    ("x", {"x": 1.0}),
    ("x", {"x": Q[0]}),
    ("x", {"x": Q.int()}),
    ("cos", {"cos": [[1.0]]}),
    ("cos", {"cos": COS[0]}),
    ("cos", {"cos": COS.int()}),
    ("cos", {"cos": torch.zeros(16, 5), "sin": torch.zeros(16, 5)}),
    ("cos", {"cos": COS.to("meta")}),
    ("sin", {"sin": COS[:5]}),
    ("sin", {"sin": None}),
    ("interleaved", {"interleaved": 1}),
    ("inplace", {"inplace": None}),
    ("seqlen_offsets", {"seqlen_offsets": 12}),
    ("seqlen_offsets", {"seqlen_offsets": -1}),
    ("seqlen_offsets", {"seqlen_offsets": 1.0}),
    ("seqlen_offsets", {"seqlen_offsets": ints(0, 12)}),
    ("seqlen_offsets", {"seqlen_offsets": ints(0)}),
    ("seqlen_offsets", {"cos": COS[:4], "sin": COS[:4]}),
    ("x", {"cu_seqlens": CU_Q, "max_seqlen": 3}),
    ("cu_seqlens", {"x": Q[0], "cu_seqlens": [0, 5], "max_seqlen": 3}),
    ("cu_seqlens", {"x": Q[0], "cu_seqlens": ints(0, 6), "max_seqlen": 6}),
    ("cu_seqlens", {"x": Q[0], "cu_seqlens": CU_Q, "max_seqlen": 2}),
    ("max_seqlen", {"x": Q[0], "cu_seqlens": CU_Q}),
]


def refuses(function: Any, argument: str, keywords: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        function(**keywords)
    assert caught.value.argument == argument, caught.value


@pytest.mark.parametrize(("argument", "changes"), DENSE)
def test_dense(argument: str, changes: dict[str, Any]) -> None:
    refuses(fa.flash_attn_func, argument, {"q": Q, "k": K, "v": V, **changes})


@pytest.mark.parametrize(("argument", "changes"), VARLEN)
def test_packed(argument: str, changes: dict[str, Any]) -> None:
    refuses(fa.flash_attn_varlen_func, argument, {**PACKED, **changes})


def test_stacked() -> None:
    refuses(fa.flash_attn_qkvpacked_func, "qkv", {"qkv": Q})
    refuses(fa.flash_attn_qkvpacked_func, "qkv", {"qkv": torch.zeros(2, 5, 3, 4, 8).int()})
    refuses(fa.flash_attn_kvpacked_func, "kv", {"q": Q, "kv": torch.zeros(2, 7, 3, 2, 8)})
    refuses(fa.flash_attn_kvpacked_func, "kv", {"q": Q, "kv": torch.zeros(2, 7, 2, 2, 6)})
    sequences = {"cu_seqlens": CU_Q, "max_seqlen": 2}
    refuses(fa.flash_attn_varlen_qkvpacked_func, "max_seqlen", {"qkv": torch.zeros(5, 3, 4, 8), **sequences})
    kv = {name: PACKED[name] for name in PACKED if name not in ("k", "v")}
    refuses(fa.flash_attn_varlen_kvpacked_func, "kv", {"kv": torch.zeros(7, 2, 2, 6), **kv})


@pytest.mark.parametrize(("argument", "changes"), CACHE)
def test_cache(argument: str, changes: dict[str, Any]) -> None:
    caches = {"k_cache": K.clone(), "v_cache": V.clone()}
    new = {"k": torch.ones(2, 1, 2, 8), "v": torch.ones(2, 1, 2, 8), "cache_seqlens": 3}
    refuses(fa.flash_attn_with_kvcache, argument, {"q": Q, **caches, **new, **changes})


@pytest.mark.parametrize(("argument", "changes"), ROTARY)
def test_rotary(argument: str, changes: dict[str, Any]) -> None:
    refuses(fa.apply_rotary_emb, argument, {"x": Q, "cos": COS, "sin": COS, **changes})


def test_rotary_of_stacks() -> None:
    tables = {"cos": COS, "sin": COS}
    refuses(fa.apply_rotary_emb_kv_, "kv", {"kv": torch.zeros(2, 5, 3, 2, 8), **tables})
    refuses(fa.apply_rotary_emb_kv_, "kv", {"kv": torch.zeros(2, 5, 2, 2, 8).int(), **tables})
    refuses(fa.apply_rotary_emb_qkv_, "qkv", {"qkv": Q[0], **tables})
    refuses(fa.apply_rotary_emb_qkv_, "num_heads_q", {"qkv": Q, **tables})
    refuses(fa.apply_rotary_emb_qkv_, "num_heads_q", {"qkv": Q, **tables, "num_heads_q": 3})
    refuses(fa.apply_rotary_emb_qkv_, "sin_k", {"qkv": Q, **tables, "num_heads_q": 2, "cos_k": COS})
    refuses(fa.apply_rotary_emb_qkv_, "cos_k", {"qkv": Q, **tables, "num_heads_q": 2, "cos_k": 1, "sin_k": COS})


def test_padding() -> None:
    x, mask = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    refuses(bert_padding.unpad_input, "hidden_states", {"hidden_states": x[0, 0], "attention_mask": mask})
    refuses(bert_padding.unpad_input, "attention_mask", {"hidden_states": x, "attention_mask": mask.float()})
    refuses(bert_padding.unpad_input, "attention_mask", {"hidden_states": x, "attention_mask": mask[:1]})
    refuses(
        bert_padding.unpad_input_for_concatenated_sequences,
        "attention_mask_in_length",
        {"hidden_states": x, "attention_mask_in_length": torch.tensor([[2, 2, 0], [1, 0, 0]])},
    )
    refuses(bert_padding.index_first_axis, "indices", {"input": x, "indices": torch.tensor([2])})
    refuses(bert_padding.index_first_axis, "input", {"input": 3, "indices": torch.tensor([1])})
    tokens = {"hidden_states": x[0], "batch": 2, "seqlen": 3}
    refuses(bert_padding.pad_input, "indices", {**tokens, "indices": torch.tensor([0, 1, 6])})
    refuses(bert_padding.pad_input, "values", {**tokens, "indices": torch.tensor([0, 1])})
