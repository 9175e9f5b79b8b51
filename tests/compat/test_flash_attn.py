"""flash-attn's attention functions against their documentation, in float64."""

from __future__ import annotations

import inspect
import math
import random
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import longattn
from compat.flash_oracle import sequence
from longattn.compat import flash_attn

SEEDS = range(10)


def draw(seed: int, batch: int) -> tuple[dict[str, Any], int, int]:
    """Keywords that all functions take, and the numbers of heads."""
    rng = random.Random(seed)
    heads_k = rng.choice([1, 2])
    heads = heads_k * rng.choice([1, 3])
    keywords: dict[str, Any] = {"causal": rng.random() < 0.5, "deterministic": rng.random() < 0.5}
    if rng.random() < 0.6:
        window = rng.choice([(3, 4), (0, -1), (-1, 2), (5, 0)])
        keywords["window_size"] = torch.tensor(window) if rng.random() < 0.5 else window
    if rng.random() < 0.4:
        keywords["softcap"] = 1.5
    if rng.random() < 0.4:
        keywords["softmax_scale"] = 0.7
    if rng.random() < 0.4:
        shape = (heads,) if rng.random() < 0.5 else (batch, heads)
        keywords["alibi_slopes"] = torch.rand(shape)
    if rng.random() < 0.4:
        keywords["dropout_p"] = 0.4
    return keywords, heads, heads_k


def exact(qs: list[Tensor], ks: list[Tensor], vs: list[Tensor], masks: Any, **keywords: Any) -> list[Any]:
    """The oracle per sequence; what was dropped is read off S_dmask."""
    keywords.pop("deterministic", None)
    slopes = keywords.pop("alibi_slopes", None)
    results = []
    for b, (q, k, v) in enumerate(zip(qs, ks, vs, strict=True)):
        slope = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
        keep = None if masks is None else masks[b, :, : q.shape[0], : k.shape[0]] >= 0
        results.append(sequence(q, k, v, slope, keep=keep, **keywords))
    return results


def check_mask(mask: Tensor | None, weights: list[Tensor], dropout_p: float) -> None:
    """The magnitudes of S_dmask are the weights over their row's largest, and signs were drawn with dropout_p."""
    assert (mask is None) == (not dropout_p)
    if mask is None:
        return
    dropped = entries = 0
    for got, weight in zip(mask, weights, strict=True):
        got = got[:, : weight.shape[1], : weight.shape[2]]
        if not got.numel():
            continue
        largest = weight.amax(-1, keepdim=True)
        torch.testing.assert_close(got.abs(), weight / torch.where(largest > 0, largest, 1.0))
        dropped += int((got < 0).sum())
        entries += int((weight > 0).sum())
    deviation = math.sqrt(dropout_p * (1 - dropout_p) * entries)
    assert abs(dropped - dropout_p * entries) <= 4 * deviation


def gradients(out: Tensor, lse: Tensor, inputs: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * dout).sum() + lse[lse.isfinite()].sin().sum(), inputs)


@pytest.mark.parametrize("seed", SEEDS)
def test_dense(seed: int) -> None:
    batch, rng = 2, random.Random(seed)
    keywords, heads, heads_k = draw(seed, batch)
    nq, nk = rng.choice([(7, 7), (5, 11), (11, 5), (1, 9)])
    form = rng.choice(["separate", "kvpacked", "qkvpacked"])
    inputs: list[Tensor]
    if form == "qkvpacked":
        inputs = [torch.randn(batch, nq, 3, heads, 6, dtype=torch.float64, requires_grad=True)]
        out, lse, mask = flash_attn.flash_attn_qkvpacked_func(*inputs, return_attn_probs=True, **keywords)
        q, k, v = inputs[0].unbind(2)
    elif form == "kvpacked":
        inputs = [torch.randn(batch, nq, heads, 6), torch.randn(batch, nk, 2, heads_k, 6)]
        inputs = [x.double().requires_grad_() for x in inputs]
        out, lse, mask = flash_attn.flash_attn_kvpacked_func(*inputs, return_attn_probs=True, **keywords)
        q, (k, v) = inputs[0], inputs[1].unbind(2)
    else:
        shapes = [(batch, nq, heads, 6), (batch, nk, heads_k, 6), (batch, nk, heads_k, 6)]
        inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        out, lse, mask = flash_attn.flash_attn_func(*inputs, return_attn_probs=True, **keywords)
        q, k, v = inputs
    assert out.is_contiguous()
    results = exact(list(q), list(k), list(v), mask, **keywords)
    want, want_lse = (torch.stack(parts) for parts in list(zip(*results, strict=True))[:2])
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    check_mask(mask, [weights for _, _, weights in results], keywords.get("dropout_p", 0.0))
    dout = torch.randn_like(out)
    for got, grad in zip(gradients(out, lse, inputs, dout), gradients(want, want_lse, inputs, dout), strict=True):
        torch.testing.assert_close(got, grad)


@pytest.mark.parametrize("seed", SEEDS)
def test_packed(seed: int) -> None:
    batch, rng = 3, random.Random(seed)
    keywords, heads, heads_k = draw(seed, batch)
    form = rng.choice(["separate", "kvpacked", "qkvpacked", "paged"])
    lengths_k = [rng.randint(0, 9) for _ in range(batch)]
    lengths_q = lengths_k if form == "qkvpacked" else [rng.randint(0, 9) for _ in range(batch)]
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    total_q, total_k = int(cu_q[-1]), int(cu_k[-1])
    inputs: list[Tensor]
    sequences = (cu_q, cu_k, max(lengths_q), max(lengths_k) + 1)
    if form == "qkvpacked":
        inputs = [torch.randn(total_q, 3, heads, 6)]
    elif form == "kvpacked":
        inputs = [torch.randn(total_q, heads, 6), torch.randn(total_k, 2, heads_k, 6)]
    elif form == "paged":
        inputs = [torch.randn(total_q, heads, 6), torch.randn(7, 4, heads_k, 6), torch.randn(7, 4, heads_k, 6)]
        keywords["block_table"] = table = torch.randperm(7)[:6].view(2, 3).int()[[0, 1, 0]]
    else:
        inputs = [torch.randn(total_q, heads, 6), torch.randn(total_k, heads_k, 6), torch.randn(total_k, heads_k, 6)]
    inputs = [x.double().requires_grad_() for x in inputs]
    if form == "qkvpacked":
        out, lse, mask = flash_attn.flash_attn_varlen_qkvpacked_func(
            *inputs, cu_q, max(lengths_q), return_attn_probs=True, **keywords
        )
        q, k, v = inputs[0].unbind(1)
    else:
        kvpacked = form == "kvpacked"
        function = flash_attn.flash_attn_varlen_kvpacked_func if kvpacked else flash_attn.flash_attn_varlen_func
        out, lse, mask = function(*inputs, *sequences, return_attn_probs=True, **keywords)
        q, k, v = (inputs[0], *inputs[1].unbind(1)) if kvpacked else inputs
    qs = list(q.split(lengths_q))
    if form == "paged":
        del keywords["block_table"]
        ks, vs = ([x[table[b]].flatten(0, 1)[:n] for b, n in enumerate(lengths_k)] for x in (k, v))
    else:
        ks, vs = (list(x.split(lengths_k)) for x in (k, v))
    results = exact(qs, ks, vs, mask, **keywords)
    want = torch.cat([out for out, _, _ in results])
    want_lse = torch.cat([lse for _, lse, _ in results], 1)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    check_mask(mask, [weights for _, _, weights in results], keywords.get("dropout_p", 0.0))
    dout = torch.randn_like(out)
    for got, grad in zip(gradients(out, lse, inputs, dout), gradients(want, want_lse, inputs, dout), strict=True):
        torch.testing.assert_close(got, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 40, 4, 64, dtype=dtype) for _ in range(3))
    out, lse, mask = flash_attn.flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)
    assert (out.dtype, lse.dtype, mask.dtype) == (dtype, torch.float32, dtype)
    want = sequence(*(x[0].double() for x in (q, k, v)), causal=True, keep=mask[0] >= 0, dropout_p=0.3)[0]
    torch.testing.assert_close(out[0].double(), want, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)


def test_what_is_dropped_does_not_depend_on_what_is_returned() -> None:
    q, k, v = (torch.randn(2, 9, 2, 8) for _ in range(3))
    torch.manual_seed(3)
    alone = flash_attn.flash_attn_func(q, k, v, 0.5)
    torch.manual_seed(3)
    out, _, _ = flash_attn.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
    assert torch.equal(alone, out)
    assert not torch.equal(flash_attn.flash_attn_func(q, k, v, 0.5), out)


def test_a_dropped_weight_is_negative_however_small() -> None:
    q, k = torch.full((1, 1, 1, 8), 9.0), torch.zeros(1, 300, 1, 8)
    k[0, ::2] = -1.0  # weights of e^-25, below what float16 can hold
    _, _, mask = flash_attn.flash_attn_func(q.half(), k.half(), k.half(), 0.5, return_attn_probs=True)
    assert 50 < int((mask[..., ::2] < 0).sum()) < 100


def test_no_keys() -> None:
    q, k = torch.randn(2, 3, 2, 8), torch.randn(2, 0, 2, 8)
    out, lse, mask = flash_attn.flash_attn_func(q, k, k, 0.1, return_attn_probs=True)
    assert not out.any() and (lse == torch.inf).all() and mask.shape == (2, 2, 3, 0)


def test_compiles_whole() -> None:
    q, k, v = (torch.randn(2, 9, 2, 8, requires_grad=True) for _ in range(3))

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(4, 0), return_attn_probs=True)
        return out.sum() + lse.sum()

    results = []
    for function in (torch.compile(block, fullgraph=True, backend="aot_eager"), block):
        result = function(q, k, v)
        results.append((result, *torch.autograd.grad(result, (q, k, v))))
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


SIGNATURES = {
    "flash_attn_func": "q k v dropout_p=0.0 softmax_scale=None causal=False window_size=(-1, -1) softcap=0.0 "
    "alibi_slopes=None deterministic=False return_attn_probs=False",
    "flash_attn_kvpacked_func": "q kv dropout_p=0.0 softmax_scale=None causal=False window_size=(-1, -1) softcap=0.0 "
    "alibi_slopes=None deterministic=False return_attn_probs=False",
    "flash_attn_qkvpacked_func": "qkv dropout_p=0.0 softmax_scale=None causal=False window_size=(-1, -1) softcap=0.0 "
    "alibi_slopes=None deterministic=False return_attn_probs=False",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p=0.0 "
    "softmax_scale=None causal=False window_size=(-1, -1) softcap=0.0 alibi_slopes=None deterministic=False "
    "return_attn_probs=False block_table=None",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p=0.0 "
    "softmax_scale=None causal=False window_size=(-1, -1) softcap=0.0 alibi_slopes=None deterministic=False "
    "return_attn_probs=False",
    "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen dropout_p=0.0 softmax_scale=None causal=False "
    "window_size=(-1, -1) softcap=0.0 alibi_slopes=None deterministic=False return_attn_probs=False",
    "flash_attn_with_kvcache": "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None "
    "cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None causal=False window_size=(-1, -1) "
    "softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False",
    "apply_rotary_emb": "x cos sin interleaved=False inplace=False seqlen_offsets=0 cu_seqlens=None max_seqlen=None",
    "apply_rotary_emb_qkv_": "qkv cos sin cos_k=None sin_k=None interleaved=False seqlen_offsets=0 num_heads_q=None",
    "apply_rotary_emb_kv_": "kv cos sin interleaved=False seqlen_offsets=0",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attn(name: str) -> None:
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    got = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert " ".join(got) == SIGNATURES[name]


def test_import_paths() -> None:
    from longattn.compat.flash_attn import flash_attn_func as at_top
    from longattn.compat.flash_attn.bert_padding import index_first_axis, pad_input, unpad_input  # noqa: F401
    from longattn.compat.flash_attn.flash_attn_interface import flash_attn_func as in_interface
    from longattn.compat.flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_func

    assert at_top is in_interface is longattn.compat.flash_attn.flash_attn_func
    assert apply_rotary_emb is apply_rotary_emb_func


def test_a_program_that_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    for submodule in ("bert_padding", "flash_attn_interface", "layers"):
        monkeypatch.setattr(flash_attn, submodule, getattr(flash_attn, submodule))  # the imports bind these names anew
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    known = set(sys.modules)
    names: dict[str, Any] = {}
    exec(
        "from flash_attn import flash_attn_func\n"
        "from flash_attn.flash_attn_interface import flash_attn_varlen_func\n"
        "from flash_attn.layers.rotary import apply_rotary_emb\n"
        "from flash_attn.bert_padding import unpad_input\n",
        names,
    )
    assert names["flash_attn_func"] is flash_attn.flash_attn_func
    q = torch.randn(1, 3, 2, 8)
    tokens, _, cu_seqlens, longest, _ = names["unpad_input"](q, torch.ones(1, 3, dtype=torch.bool))
    out = names["flash_attn_varlen_func"](tokens, tokens, tokens, cu_seqlens, cu_seqlens, longest, longest)
    torch.testing.assert_close(out[None], flash_attn.flash_attn_func(q, q, q))
    for name in set(sys.modules) - known:
        if name.startswith("flash_attn."):
            del sys.modules[name]
