"""The public calls: validate once, choose a backend, run one operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from longattn import arguments, dtensors, onnx_export, ops, redirection, tracing
from longattn.arguments import Positions, Window
from longattn.backends import registry
from longattn.explanation import Explanation, explanation
from longattn.forked import on_one_thread
from longattn.problem import Problem, Tensors
from longattn.rope import Rope
from longattn.tracing import leaf


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    sinks: int = 0,
    align: str | int | Tensor = "end",
    key_mask: Tensor | None = None,
    key_lens: Tensor | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    rope: Rope | None = None,
    positions: Positions = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention in memory linear in the sequence length.

    Query i stands at position p_i = i + offset and sees key j if `j <= p_i + right` and (`j >= p_i - left` or
    `j < sinks`), and if key_mask, key_lens and bounds all allow it. A query that sees nothing gives 0 with lse -inf.

    DTensors may be sharded along the batch and along heads (see docs/autograd.md).

    Args:
        q: [B, Hq, Nq, D], float32, float64, bfloat16 or float16; any strides.
        k: [B, Hkv, Nk, D]; v: [B, Hkv, Nk, Dv]. Hq is a multiple of Hkv: query head h reads head h // (Hq // Hkv).
        causal: right = 0.
        window: W: the W newest keys if causal, else W - 1 on both sides; or (left, right), -1 for unbounded.
        sinks: the first keys, that stay visible however far to the left.
        align: "end": offset = Nk - Nq (key_lens - Nq with key_lens); "start": 0; or the offset, an int or an int
            tensor [B].
        key_mask: bool [B, Nk], True = visible.
        key_lens: int32 [B], keys from there on are hidden.
        bounds: (lo, hi), int32 [Nq] or [B, Nq]: query i sees keys lo[i] <= j < hi[i] only.
        bias: broadcastable to [B, Hq, Nq, Nk]; floating (added to the scores) or bool (True = visible).
        scale: of the scores q . k; 1 / sqrt(D) by default.
        softcap: scores become softcap * tanh(scores / softcap).
        alibi_slopes: [Hq] or [B, Hq]; scores lose slope * |p_i - j| (Press et al. 2022).
        sink_logits: [Hq], a learned score without a value, counted in every query's softmax (gpt-oss).
        rope: rotates k_j at j and q_i at p_i inside the call.
        positions: in place of j in the rotation: [Nk] or [B, Nk] (queries read entry p_i), or a pair (for q, for k).
        dropout_p: probability of dropping a weight; seed: of the counter-based generator, an int or an int64 tensor.
        deterministic: bitwise the same result in every run.
        return_lse: return (out, lse), both differentiable.
        backend: "auto" takes the first that can run the call; a named one never falls back.

    Returns:
        out [B, Hq, Nq, Dv], laid out in memory as q; with return_lse also lse [B, Hq, Nq], the natural logarithm of
        each query's sum of exponentials, in float32 (float64 for float64 inputs).

    Raises:
        InvalidInput: an argument breaks the contract.
        Unsupported: no backend, or not the named one, can run the call.
    """
    if has_torch_function_variadic(q, k, v, bias):
        traced = tracing.node(attention, (q, k, v), _keywords(locals()))
        if traced is not None:
            return traced
    elsewhere = redirection.target()
    if elsewhere is not None:
        return elsewhere.attention(q, k, v, **_keywords(locals()))
    tensors, problem = arguments.dense(
        q,
        k,
        v,
        causal=causal,
        window=window,
        sinks=sinks,
        align=align,
        key_mask=key_mask,
        key_lens=key_lens,
        bounds=bounds,
        bias=bias,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sink_logits=sink_logits,
        rope=rope,
        positions=positions,
        dropout_p=dropout_p,
        seed=seed,
        deterministic=deterministic,
    )
    arguments.flag("return_lse", return_lse)
    if return_lse:
        onnx_export.refuse_lse()
    out, lse = _run(tensors, problem, backend)
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    sinks: int = 0,
    align: str | int | Tensor = "end",
    key_mask: Tensor | None = None,
    key_lens: Tensor | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    rope: Rope | None = None,
    positions: Positions = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over packed sequences: no padding, and no sequence sees another.

    Args:
        q: [Tq, Hq, D], k: [Tk, Hkv, D], v: [Tk, Hkv, Dv]: the sequences one after another.
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1], where each sequence starts and the last ends; sequence b of q
            attends to sequence b of k. Tokens outside all sequences give 0.
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence. A tensor is read, which waits for its
            device.
        positions: [Tk], or a pair ([Tq], [Tk]).
        key_mask, bounds, bias: must be None. All else as in `attention`, per sequence.

    Returns:
        out [Tq, Hq, Dv]; with return_lse also lse [Hq, Tq].

    Raises:
        InvalidInput, Unsupported: as `attention`; also cu_seqlens that decrease or exceed the tensors.
    """
    if has_torch_function_variadic(q, k, v, cu_seqlens_q):
        args = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        traced = tracing.node(attention_varlen, args, _keywords(locals()))
        if traced is not None:
            return traced
    elsewhere = redirection.target()
    if elsewhere is not None:
        return elsewhere.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **_keywords(locals()))
    tensors, problem = arguments.packed(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=causal,
        window=window,
        sinks=sinks,
        align=align,
        key_mask=key_mask,
        key_lens=key_lens,
        bounds=bounds,
        bias=bias,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sink_logits=sink_logits,
        rope=rope,
        positions=positions,
        dropout_p=dropout_p,
        seed=seed,
        deterministic=deterministic,
    )
    arguments.flag("return_lse", return_lse)
    if return_lse:
        onnx_export.refuse_lse()
    out, lse = _run(tensors, problem, backend)
    out = out.squeeze(0).transpose(0, 1)  # indexing would copy the gradient
    return (out, lse.squeeze(0)) if return_lse else out


def _run(tensors: Tensors, problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """Run a checked call, on DTensors as this rank's part of it."""
    if not dtensors.is_dtensor(tensors.q):
        return ops.attention(tensors, problem, registry.select(problem, backend).name)
    batch, heads = tensors.q.shape[:2]
    shards, tensors, problem = dtensors.local_call(tensors, problem)
    results = ops.attention(tensors, problem, registry.select(problem, backend).name)
    out, lse = (shards.whole(x, batch, heads) for x in results)
    return out, lse


@leaf
@on_one_thread
def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over the union of disjoint key sets, from the attention over each: exact and differentiable.

        lse = log sum_n exp(lse_n),   out = sum_n exp(lse_n - lse) out_n

    A learned sink belongs to one of the parts only, as it is counted once.

    Args:
        outs: tensors [..., N, Dv] of one shape; lses: their lse, [..., N].

    Returns:
        (out in the dtype of the parts, lse in that of the lses).

    Raises:
        InvalidInput: no parts, or parts that do not fit each other.
    """
    outs, lses = arguments.parts(outs, lses)
    stacked = torch.stack(lses)
    largest = stacked.detach().amax(0)
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    weights = torch.exp(stacked - largest)
    total = weights.sum(0)
    seen = total > 0
    total = torch.where(seen, total, 1.0)
    lse = torch.where(seen, torch.log(total) + largest, -torch.inf)
    weights = (weights / total)[..., None]
    out = sum(
        (weight * out.to(weights.dtype) for weight, out in zip(weights, outs, strict=True)),
        start=torch.zeros((), device=stacked.device),
    )
    return out.to(outs[0].dtype), lse


@leaf
def apply_rope(x: Tensor, rope: Rope, positions: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x [..., N, D] with its first `rope.dim` entries rotated; out of place, differentiable in x.

    Args:
        positions: int or float32, [N], or [B, N] for x [B, H, N, D]; 0..N - 1 by default.

    Raises:
        InvalidInput: an argument breaks the contract.
    """
    x4, inv_freq, angles, factor = arguments.rotation(x, rope, positions)
    chosen = registry.select(arguments.rotation_problem(x4, rope), backend).name
    if not dtensors.is_dtensor(x4):
        return ops.rope(x4, inv_freq, angles, factor, rope.interleaved, chosen).view(x.shape)
    shards = dtensors.Shards.of(x=x4)
    local = shards.local("x", x4, 0, 1)
    angles = shards.local("positions", angles, 0 if angles.dim() == 2 else None, None)
    rotated = ops.rope(local, inv_freq, angles, factor, rope.interleaved, chosen)
    return shards.whole(rotated, *x4.shape[:2]).view(x.shape)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    **keywords: Any,
) -> Explanation:
    """What a query of this call sees, what that costs, which backend would run it, and why every other does not.

    Runs nothing and allocates nothing; q, k and v may be expanded from a single row. `print` shows a table.

    Args:
        q, k, v, keywords: as in `attention`; with cu_seqlens and max_seqlens, as in `attention_varlen`.

    Raises:
        InvalidInput: an argument breaks the contract.
    """
    backend = keywords.pop("backend", "auto")
    arguments.flag("return_lse", keywords.pop("return_lse", False))
    keywords = {**_DEFAULTS, **keywords}
    if all(x is None for x in (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)):
        return explanation(*arguments.dense(q, k, v, **keywords), backend)
    packed: Any = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return explanation(*arguments.packed(q, k, v, *packed, **keywords), backend)


def _keywords(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `attention` among local variables."""
    return {name: value for name, value in variables.items() if name in _KEYWORDS}


_KEYWORDS = frozenset(attention.__kwdefaults__ or {})
_DEFAULTS = {
    name: value for name, value in (attention.__kwdefaults__ or {}).items() if name not in ("return_lse", "backend")
}
