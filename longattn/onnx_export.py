"""Calls in the words of ONNX: what `torch.onnx.export(..., dynamo=True)` writes in place of our operators."""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.backends.angles import rotation_positions
from longattn.errors import Unsupported
from longattn.problem import Problem, Tensors
from longattn.rope import turn_pairs

_UNTRANSLATED = ("alibi_slopes", "sink_logits", "dropout", "varlen")


def exporting() -> bool:
    """Return whether torch.onnx.export traces this call."""
    return torch.onnx.is_in_onnx_export()


# Dynamo, by which the exporter tries again, would say False. This is torch.compiler.assume_constant_result, which
# would import Dynamo here.
exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attention(tensors: Tensors, problem: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) by PyTorch's own attention, which the exporter writes as ONNX's Attention from opset 23 on.

    Before that opset it becomes products and a softmax; so does softcap always, as ONNX caps the sum of scores and
    mask, and a hidden key would count. lse has no values, as none may ask for it (see `refuse_lse`).
    """
    refuse_tracing(f"attention ({problem})")
    found = [feature for feature in problem.features if feature in _UNTRANSLATED]
    if found:
        raise _unsupported(f"attention ({problem})", f"ONNX's Attention has no {' and no '.join(found)}")
    q, k, v = tensors[:3]
    if tensors.inv_freq is not None:
        for_q, for_k, start = rotation_positions(problem, tensors)
        if for_q is None:
            for_q = for_k[..., start : start + problem.nq]
        q, k = (
            rotate(x, tensors.inv_freq, at, problem.rope_factor, problem.interleaved)
            for x, at in ((q, for_q), (k, for_k))
        )
    causal = _is_their_causal(tensors, problem)
    bias = None if causal else _bias(tensors, problem)
    blind = None
    if bias is not None:
        blind = ~bias.any(-1, keepdim=True) if bias.dtype == torch.bool else (bias == -torch.inf).all(-1, keepdim=True)
        bias = bias | blind if bias.dtype == torch.bool else bias.masked_fill(blind, 0.0)
    if problem.softcap:
        out = _capped(q, k, v, problem, _bias(tensors, problem) if causal else bias)
    else:  # PyTorch's operator, not its function, which compat.use() brings back to us
        out = torch.ops.aten.scaled_dot_product_attention.default(
            q, k, v, bias, 0.0, causal, scale=problem.scale, enable_gqa=problem.group > 1
        )
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
    return out, q.new_empty(())


def refuse_lse() -> None:
    """
    Raises:
        Unsupported: a model under export asks for lse, which ONNX's Attention does not return.
    """
    if exporting():
        raise _unsupported("attention with return_lse", "ONNX's Attention returns no lse")


def refuse_tracing(call: str) -> None:
    """
    Raises:
        Unsupported: the exporter is the older one, on TorchScript, which knows no Attention.
    """
    if torch._C._get_tracing_state() is not None:
        raise _unsupported(call, "only torch.onnx.export(..., dynamo=True) can write attention")


def refuse(call: str) -> None:
    """
    Raises:
        Unsupported: torch.onnx.export traces a call that ONNX has no words for.
    """
    if exporting():
        raise _unsupported(call, "ONNX has no such operator; export the model without a cache")


def rotate(x: Tensor, inv_freq: Tensor, positions: Tensor, factor: float, interleaved: bool) -> Tensor:
    """x [B, H, N, D] with its first 2 * len(inv_freq) entries rotated, in PyTorch's operators."""
    refuse_tracing("apply_rope")
    width, compute = 2 * inv_freq.shape[0], torch.promote_types(x.dtype, torch.float32)
    angle = (positions[..., None] * inv_freq).to(compute)
    if angle.dim() == 3:
        angle = angle[:, None]  # the same for all heads
    turned = turn_pairs(x[..., :width].to(compute), angle.cos(), angle.sin(), interleaved) * factor
    return torch.cat((turned.to(x.dtype), x[..., width:]), -1)


def running_max(x: Tensor) -> Tensor:
    """The largest int so far along the last dimension. ONNX has no cummax, and looks at all pairs."""
    if not exporting():
        return x.cummax(-1).values
    index = torch.arange(x.shape[-1], device=x.device)
    return x[..., None, :].masked_fill(index > index[:, None], torch.iinfo(x.dtype).min).amax(-1)


def _is_their_causal(tensors: Tensors, problem: Problem) -> bool:
    """Return whether the mask is ONNX's is_causal: query i sees keys 0..i, and every query a key."""
    mask = problem.mask
    terms = (tensors.key_mask, tensors.key_lens, tensors.lo, tensors.offset, tensors.bias)
    if mask.right != 0 or mask.left is not None or mask.offset != 0 or any(term is not None for term in terms):
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return not mask.from_end or statically_known_true(problem.nq == problem.nk)


def _bias(tensors: Tensors, problem: Problem) -> Tensor | None:
    """What is added to the scores, or bool, True = visible, [1 or B, 1 or Hq, 1 or Nq, Nk]; None: nothing."""
    mask, bias = problem.mask, tensors.bias
    terms = (tensors.key_mask, tensors.key_lens, tensors.lo)
    if mask.left is not None or mask.right is not None or any(term is not None for term in terms):
        bounds = None if tensors.lo is None or tensors.hi is None else (tensors.lo, tensors.hi)
        visible = mask.materialize(
            problem.nq,
            problem.nk,
            offset=tensors.offset,
            key_mask=tensors.key_mask,
            key_lens=tensors.key_lens,
            bounds=bounds,
            device=tensors.q.device,
        )[:, None]
        if bias is None:
            return visible
        if bias.dtype == torch.bool:
            return visible & bias
        return torch.where(visible, bias, -torch.inf).to(tensors.q.dtype)
    return bias if bias is None or bias.dtype == torch.bool else bias.to(tensors.q.dtype)


def _capped(q: Tensor, k: Tensor, v: Tensor, problem: Problem, bias: Tensor | None) -> Tensor:
    group = problem.group
    k, v = (x if group == 1 else x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.tanh((q @ k.mT) * (problem.scale / problem.softcap)) * problem.softcap
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, -torch.inf)
    elif bias is not None:
        scores = scores + bias
    return torch.softmax(scores, -1) @ v


def _unsupported(call: str, reason: str) -> Unsupported:
    return Unsupported(call, {"ONNX": [reason]})
