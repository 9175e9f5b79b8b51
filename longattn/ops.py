"""The PyTorch operators: schemas, fakes, autograd. One op per public computation, of fixed arity.

`attention` carries the fields of Tensors and then the scalars of a Problem, flat, as schemas demand; the backend
chosen above travels by name, and the backward runs on it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.backends import registry
from longattn.backends.base import Gradients
from longattn.errors import Unsupported
from longattn.mask import Mask
from longattn.problem import Problem, Tensors, check_sequences, present_features

_REQUIRED = ("q", "k", "v")
_TENSORS = ", ".join(f"Tensor{'' if name in _REQUIRED else '?'} {name}" for name in Tensors._fields)
_SCALARS = (
    "str backend, SymInt left, SymInt right, SymInt sinks, SymInt shift, bool from_end, float scale, float softcap, "
    "float rope_factor, bool interleaved, float dropout_p, bool deterministic, SymInt max_seqlen_q, SymInt max_seqlen_k"
)
_DIFFERENTIABLE = Gradients._fields  # arguments of `attention` that have gradients, by name
_DIFFERENTIABLE_AT = tuple(Tensors._fields.index(name) for name in _DIFFERENTIABLE)
_NUM_TENSORS = len(Tensors._fields)

_library = torch.library.Library("longattn", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(f"attention({_TENSORS}, {_SCALARS}) -> (Tensor out, Tensor lse)", tags=_TAGS)
_library.define(
    f"attention_backward({_TENSORS}, {_SCALARS}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, bool[] wanted) "
    f"-> ({', '.join(['Tensor'] * len(_DIFFERENTIABLE))})",
    tags=_TAGS,
)
_library.define(
    "rope(Tensor x, Tensor inv_freq, Tensor positions, float factor, bool interleaved, bool inverse, str backend) "
    "-> Tensor",
    tags=_TAGS,
)


def attention(tensors: Tensors, problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Nq, Dv], lse [B, Hq, Nq]) on the named backend; differentiable."""
    mask = problem.mask
    out, lse = torch.ops.longattn.attention.default(
        *tensors,
        backend,
        -1 if mask.left is None else mask.left,
        -1 if mask.right is None else mask.right,
        mask.sinks,
        mask.offset,
        mask.from_end,
        problem.scale,
        problem.softcap,
        problem.rope_factor,
        problem.interleaved,
        problem.dropout_p,
        problem.deterministic,
        problem.max_seqlen_q,
        problem.max_seqlen_k,
    )
    return out, lse


def rope(x: Tensor, inv_freq: Tensor, positions: Tensor, factor: float, interleaved: bool, backend: str) -> Tensor:
    """x [B, H, N, D] rotated by positions (float32 [N] or [B, N]); differentiable in x."""
    return torch.ops.longattn.rope.default(x, inv_freq, positions, factor, interleaved, False, backend)


def _unflatten(args: tuple[Any, ...]) -> tuple[Tensors, Problem, str]:
    """The inverse of `attention`'s flattening."""
    tensors = Tensors(*args[:_NUM_TENSORS])
    (
        backend,
        left,
        right,
        sinks,
        shift,
        from_end,
        scale,
        softcap,
        rope_factor,
        interleaved,
        dropout_p,
        deterministic,
        max_seqlen_q,
        max_seqlen_k,
    ) = args[_NUM_TENSORS:]
    q, k, v = tensors.q, tensors.k, tensors.v
    problem = Problem(
        batch=q.shape[0] if tensors.cu_seqlens_q is None else tensors.cu_seqlens_q.shape[0] - 1,
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        nq=q.shape[2],
        nk=k.shape[2],
        head_dim=q.shape[3],
        v_head_dim=v.shape[3],
        dtype=q.dtype,
        device=q.device.type,
        mask=Mask(None if left < 0 else left, None if right < 0 else right, sinks, shift, from_end),
        scale=scale,
        softcap=softcap,
        rope_factor=rope_factor,
        interleaved=interleaved,
        dropout_p=dropout_p,
        deterministic=deterministic,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        features=present_features(tensors, softcap, dropout_p),
    )
    return tensors, problem, backend


def _empty_laid_out_as(x: Tensor, width: int) -> Tensor:
    """An empty tensor of x's shape but for the last dimension, its dimensions in memory in x's order."""
    strides = x.stride()
    order = sorted(range(3), key=lambda dim: -strides[dim])
    return torch.empty_permuted((*x.shape[:3], width), (*order, 3), dtype=x.dtype, device=x.device)


def _empty_results(tensors: Tensors) -> tuple[Tensor, Tensor]:
    q = tensors.q
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _empty_laid_out_as(q, tensors.v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _empty_gradients(tensors: Tensors, wanted: list[bool]) -> Gradients:
    empty = [_empty_laid_out_as(x, x.shape[-1]) if flag else None for x, flag in zip(tensors[:3], wanted, strict=False)]
    for name, flag in zip(_DIFFERENTIABLE[3:], wanted[3:], strict=True):
        x = getattr(tensors, name)
        empty.append(torch.empty(x.shape, dtype=x.dtype, device=x.device) if flag else None)
    return Gradients(*empty)


def _fixed_arity(grads: Gradients, like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors only: an absent gradient is an empty one."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def _attention_impl(*args: Any) -> tuple[Tensor, Tensor]:
    tensors, problem, backend = _unflatten(args)
    if problem.varlen and problem.device == "cpu":
        check_sequences(tensors, problem)
    out, lse = _empty_results(tensors)
    registry.get(backend).forward(problem, tensors, out, lse)
    return out, lse


def _attention_fake(*args: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(Tensors(*args[:_NUM_TENSORS]))


def _backward_impl(*args: Any) -> tuple[Tensor, ...]:
    *call, out, lse, dout, dlse, wanted = args
    tensors, problem, backend = _unflatten(tuple(call))
    if dout.stride(-1) != 1 and dout.shape[-1] != 1:
        dout = dout.contiguous()
    grads = _empty_gradients(tensors, wanted)
    registry.get(backend).backward(problem, tensors, out, lse, dout, dlse, grads)
    return _fixed_arity(grads, tensors.q)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    tensors = Tensors(*args[:_NUM_TENSORS])
    return _fixed_arity(_empty_gradients(tensors, args[-1]), tensors.q)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.longattn.attention.default(*args)
        ctx.save_for_backward(*args[:_NUM_TENSORS], out, lse)
        ctx.scalars = args[_NUM_TENSORS:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        result: list[Tensor | None] = [None] * (_NUM_TENSORS + len(ctx.scalars))
        wanted = [ctx.needs_input_grad[at] for at in _DIFFERENTIABLE_AT]
        if dout is None and dlse is None:
            return tuple(result)
        if dout is None:
            dout = torch.zeros_like(out)
        grads = torch.ops.longattn.attention_backward.default(*tensors, *ctx.scalars, out, lse, dout, dlse, wanted)
        for at, flag, grad in zip(_DIFFERENTIABLE_AT, wanted, grads, strict=True):
            if flag:
                result[at] = grad
        return tuple(result)


class _AttentionBackward(torch.autograd.Function):
    """Gradients that can be computed, but not differentiated again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.longattn.attention_backward.default(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise Unsupported("second derivative of attention", {"every backend": ["double backward is not implemented"]})


class _Rope(torch.autograd.Function):
    """A rotation is linear, and its transpose is the rotation the other way: derivatives of every order."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out = torch.ops.longattn.rope.default(*args)
        _, *ctx.constants = args
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        inv_freq, positions, factor, interleaved, inverse, backend = ctx.constants
        dx = torch.ops.longattn.rope.default(dout, inv_freq, positions, factor, interleaved, not inverse, backend)
        return dx, None, None, None, None, None, None


def _autograd(function: type[torch.autograd.Function], op: Any) -> Any:
    """The kernel at the Autograd key: through `function` where a gradient may be asked for, straight down otherwise."""

    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return kernel


def _rope_impl(
    x: Tensor, inv_freq: Tensor, positions: Tensor, factor: float, interleaved: bool, inverse: bool, backend: str
) -> Tensor:
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    out = _empty_laid_out_as(x, x.shape[-1])
    registry.get(backend).rope(x, inv_freq, positions, factor, interleaved, inverse, out)
    return out


def _rope_fake(x: Tensor, *_: Any) -> Tensor:
    return _empty_laid_out_as(x, x.shape[-1])


for _name, _impl, _fake, _function in (
    ("attention", _attention_impl, _attention_fake, _Attention),
    ("attention_backward", _backward_impl, _backward_fake, _AttentionBackward),
    ("rope", _rope_impl, _rope_fake, _Rope),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"longattn::{_name}", _fake, lib=_library)
    _library.impl(_name, _autograd(_function, getattr(torch.ops.longattn, _name).default), "Autograd")
