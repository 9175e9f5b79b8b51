"""The PyTorch operators: schemas, fakes, autograd. One op per public computation, of fixed arity.

`attention` carries the fields of Tensors and then the scalars of a Problem, flat, as schemas demand; the backend
chosen above travels by name, and the backward runs on it again. The second derivative is one for all backends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from longattn import batching, flops, onnx_export, operands
from longattn.backends import eager, registry
from longattn.backends.base import Gradients
from longattn.errors import InvalidInput, Unsupported
from longattn.forked import on_one_thread
from longattn.mask import Mask
from longattn.problem import (
    CacheTensors,
    Origin,
    Problem,
    Slots,
    Tensors,
    cache_features,
    check_memory,
    check_places,
    check_sequences,
    checks_enabled,
    present_features,
)

_REQUIRED = ("q", "k", "v")
_TENSORS = ", ".join(f"Tensor{'' if name in _REQUIRED else '?'} {name}" for name in Tensors._fields)
_SCALARS = (
    "str backend, SymInt left, SymInt right, SymInt sinks, SymInt shift, bool from_end, float scale, float softcap, "
    "float rope_factor, bool interleaved, float dropout_p, SymInt[] origin, bool deterministic, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k"
)
_DIFFERENTIABLE = Gradients._fields  # arguments of `attention` that have gradients, by name
_DIFFERENTIABLE_AT = tuple(Tensors._fields.index(name) for name in _DIFFERENTIABLE)
_MAY_REQUIRE_GRAD = {*_DIFFERENTIABLE, "dout", "dlse", "x", *(f"{name}_tangent" for name in _DIFFERENTIABLE)}
_NUM_TENSORS = len(Tensors._fields)
_NUM_SCALARS = _SCALARS.count(",") + 1

_CACHE_REQUIRED = ("key_lens", "query_lens")
_CACHE_TENSORS = ", ".join(f"Tensor{'' if name in _CACHE_REQUIRED else '?'} {name}" for name in CacheTensors._fields)
_SLOTS = (
    "Tensor(a!) slots_k, Tensor(b!) slots_v, Tensor(c!)? k_scales, Tensor(d!)? v_scales, Tensor table, SymInt ring, "
    "SymInt ring_sinks"
)
_CACHE_SCALARS = (
    "str backend, ScalarType dtype, SymInt q_heads, SymInt nq, SymInt nk, SymInt left, SymInt right, SymInt sinks, "
    "float scale, float softcap, float rope_factor, bool interleaved, SymInt frame"
)
_NUM_CACHE_TENSORS, _NUM_SLOTS = len(CacheTensors._fields), len(Slots._fields)

_library = torch.library.Library("longattn", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(f"attention({_TENSORS}, {_SCALARS}) -> (Tensor out, Tensor lse)", tags=_TAGS)
_library.define(
    f"attention_backward({_TENSORS}, {_SCALARS}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, bool[] wanted) "
    f"-> ({', '.join(['Tensor'] * len(_DIFFERENTIABLE))})",
    tags=_TAGS,
)
_library.define(f"cache_append({_CACHE_TENSORS}, {_SLOTS}, {_CACHE_SCALARS}) -> ()", tags=_TAGS)
_library.define(
    f"attention_with_cache({_CACHE_TENSORS}, {_SLOTS}, {_CACHE_SCALARS}) -> (Tensor out, Tensor lse)",
    tags=_TAGS,
)
_library.define(
    "take_pages(Tensor pool, Tensor(a!) table, Tensor(b!) slots_k, Tensor(c!) slots_v, Tensor(d!)? k_scales, "
    "Tensor(e!)? v_scales, SymInt[] rows, SymInt[] lengths, SymInt[] counts) -> ()",
    tags=_TAGS,
)
_library.define(
    f"attention_double_backward({_TENSORS}, {_SCALARS}, Tensor dout, Tensor? dlse, "
    f"{', '.join(f'Tensor? {name}_tangent' for name in _DIFFERENTIABLE)}, bool[] wanted) "
    f"-> ({', '.join(['Tensor'] * (len(_DIFFERENTIABLE) + 2))})",
    tags=_TAGS,
)
_library.define(
    f"attention_jvp({_TENSORS}, {_SCALARS}, {', '.join(f'Tensor? {name}_tangent' for name in _DIFFERENTIABLE)}) "
    "-> (Tensor out_tangent, Tensor lse_tangent)",
    tags=_TAGS,
)
_library.define(
    "rope(Tensor x, Tensor inv_freq, Tensor positions, float factor, bool interleaved, bool inverse, str backend) "
    "-> Tensor",
    tags=_TAGS,
)


def attention(tensors: Tensors, problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Nq, Dv], lse [B, Hq, Nq]) on the named backend; differentiable."""
    if _is_kernel(*tensors):
        _check_memory(_REQUIRED, tensors)  # `arguments` looks at all others
        return _forward(tensors, problem, backend)
    if onnx_export.exporting():
        return onnx_export.attention(tensors, problem)
    _offer_formulas()
    out, lse = torch.ops.longattn.attention.default(*tensors, *_scalars(problem, backend))
    return out, lse


def attention_backward(
    tensors: Tensors,
    problem: Problem,
    backend: str,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    wanted: list[bool],
) -> Gradients:
    """The gradients that are wanted, in the order of Gradients; out and lse as in `Backend.backward`."""
    call = (*tensors, *_scalars(problem, backend), out, lse, dout, dlse, wanted)
    found = torch.ops.longattn.attention_backward.default(*call)
    return Gradients(*(grad if flag else None for grad, flag in zip(found, wanted, strict=True)))


# Dispatch keys, of tensors and of a thread, under which an operator without gradient is its kernel.
_KERNEL_KEYS = 0
for _key in "CPU CUDA AutogradCPU AutogradCUDA AutocastCPU AutocastCUDA ADInplaceOrView BackendSelect".split():
    _KERNEL_KEYS |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key)).raw_repr()
_OWN_TYPES = (Tensor, torch.nn.Parameter)


def _is_kernel(*arguments: Any) -> bool:
    """Whether an operator on these arguments is nothing but its kernel: it may then be called without the dispatcher.

    Which costs as much as all else of a short call, and is needed where there is a gradient, a compiler, a transform,
    a mode, a profiler, a subclass of Tensor or a lazily negated one.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._profiler_enabled() or torch._C._len_torch_function_stack():
        return False
    keys = torch._C._dispatch_tls_local_include_set().raw_repr()
    differentiable = torch.is_grad_enabled()
    for x in arguments:
        if isinstance(x, Tensor):
            if type(x) not in _OWN_TYPES or differentiable and x.requires_grad:
                return False
            keys |= torch._C._dispatch_keys(x).raw_repr()
    return not keys & ~_KERNEL_KEYS and forward_ad._current_level < 0


def _check_memory(names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    for name, x in zip(names, tensors, strict=False):
        if x is not None and not x.untyped_storage().nbytes():
            check_memory(name, x)


def _scalars(problem: Problem, backend: str) -> tuple[Any, ...]:
    mask = problem.mask
    return (
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
        problem.origin,
        problem.deterministic,
        problem.max_seqlen_q,
        problem.max_seqlen_k,
    )


def cache_append(tensors: CacheTensors, slots: Slots, problem: Problem, backend: str) -> None:
    """Write the new keys and values into the cache, on the named backend."""
    if _is_kernel(*tensors, *slots):
        return _append(tensors, slots, problem, backend)
    onnx_export.refuse("cache.append")
    torch.ops.longattn.cache_append.default(*tensors, *slots, backend, *_cache_scalars(problem))


def attention_with_cache(tensors: CacheTensors, slots: Slots, problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """`cache_append`, then (out [B, Hq, Nq, Dv], lse [B, Hq, Nq])."""
    if _is_kernel(*tensors, *slots):
        return _decode(tensors, slots, problem, backend)
    onnx_export.refuse("attention_with_cache")
    _offer_formulas()
    out, lse = torch.ops.longattn.attention_with_cache.default(*tensors, *slots, backend, *_cache_scalars(problem))
    return out, lse


class PagePool(Protocol):
    """A pool that gives pages to the sequences of a cache. No graph holds it, as its lists change from call to call."""

    def take_pages(
        self,
        table: Tensor,
        storage: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        rows: Sequence[int],
        lengths: Sequence[int],
        counts: Sequence[int],
    ) -> None: ...

    def check_pages(
        self,
        table: Tensor,
        storage: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        rows: Sequence[int],
        lengths: Sequence[int],
        counts: Sequence[int],
    ) -> None: ...


_pools: WeakValueDictionary[int, PagePool] = WeakValueDictionary()
_pool_numbers = itertools.count()


def stand_in(pool: PagePool) -> Tensor:
    """A tensor by which a graph, that holds tensors and numbers only, finds the pool when it runs."""
    number = next(_pool_numbers)
    _pools[number] = pool
    return torch.tensor([number], device="cpu")


def take_pages(
    pool: PagePool,
    name: Tensor,
    table: Tensor,
    storage: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    rows: list[int],
    lengths: list[int],
    counts: list[int],
) -> None:
    """`pool.take_pages`; in a graph it is one operator, and `name` is the pool's `stand_in`."""
    if _is_kernel(table, *storage):
        return pool.take_pages(table, storage, rows, lengths, counts)
    torch.ops.longattn.take_pages.default(name, table, *storage, rows, lengths, counts)


def rope(x: Tensor, inv_freq: Tensor, positions: Tensor, factor: float, interleaved: bool, backend: str) -> Tensor:
    """x [B, H, N, D] rotated by positions (float32 [N] or [B, N]); differentiable in x."""
    if _is_kernel(x, inv_freq, positions):
        _check_memory(("x",), (x,))
        return _rotate(x, inv_freq, positions, factor, interleaved, False, backend)
    if onnx_export.exporting():
        return onnx_export.rotate(x, inv_freq, positions, factor, interleaved)
    return torch.ops.longattn.rope.default(x, inv_freq, positions, factor, interleaved, False, backend)


def _cache_scalars(problem: Problem) -> tuple[Any, ...]:
    mask = problem.mask
    return (
        problem.dtype,
        problem.q_heads,
        problem.nq,
        problem.nk,
        -1 if mask.left is None else mask.left,
        -1 if mask.right is None else mask.right,
        mask.sinks,
        problem.scale,
        problem.softcap,
        problem.rope_factor,
        problem.interleaved,
        problem.frame,
    )


def _unflatten_cache(args: tuple[Any, ...]) -> tuple[CacheTensors, Slots, Problem, str]:
    """The inverse of the flattening of a call on a cache."""
    tensors = CacheTensors(*args[:_NUM_CACHE_TENSORS])
    slots = Slots(*args[_NUM_CACHE_TENSORS : _NUM_CACHE_TENSORS + _NUM_SLOTS])
    operands.check_dims((("slots_k", slots.k), ("slots_v", slots.v)), 4)
    operands.check_dims((("table", slots.table),), 2)
    (
        backend,
        dtype,
        q_heads,
        nq,
        nk,
        left,
        right,
        sinks,
        scale,
        softcap,
        rope_factor,
        interleaved,
        frame,
    ) = args[_NUM_CACHE_TENSORS + _NUM_SLOTS :]
    problem = Problem(
        batch=slots.table.shape[0],
        q_heads=q_heads,
        kv_heads=slots.k.shape[1],
        nq=nq,
        nk=nk,
        head_dim=slots.k.shape[3],
        v_head_dim=slots.v.shape[3],
        dtype=dtype,
        device=slots.k.device.type,
        mask=Mask(None if left < 0 else left, None if right < 0 else right, sinks),
        scale=scale,
        softcap=softcap,
        rope_factor=rope_factor,
        interleaved=interleaved,
        storage=slots.k.dtype,
        frame=frame,
        features=cache_features(tensors, softcap, slots.ring > 0, slots.k.dtype),
    )
    return tensors, slots, problem, backend


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
        origin,
        deterministic,
        max_seqlen_q,
        max_seqlen_k,
    ) = args[_NUM_TENSORS:]
    q, k, v = tensors.q, tensors.k, tensors.v
    operands.check_dims((("q", q), ("k", k), ("v", v)), 4)
    if tensors.cu_seqlens_q is not None:
        operands.check_dims((("cu_seqlens_q", tensors.cu_seqlens_q),), 1)
    if len(origin) != len(Origin._fields):
        raise InvalidInput("origin", f"{len(Origin._fields)} ints", list(origin))
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
        origin=Origin(*origin),
        deterministic=deterministic,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        features=present_features(tensors, softcap, dropout_p, Origin(*origin)),
    )
    return tensors, problem, backend


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_laid_out_as(x: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of x's shape but for the last dimension, its dimensions in memory in x's order."""
    batch, heads, tokens, _ = x.shape
    strides = x.stride()[:3]
    if strides[0] >= strides[1] >= strides[2]:
        return x.new_empty((batch, heads, tokens, width), dtype=dtype)
    order = sorted(range(3), key=lambda dim: -strides[dim])
    return torch.empty_permuted((batch, heads, tokens, width), (*order, 3), dtype=dtype or x.dtype, device=x.device)


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = empty_laid_out_as(q, v.shape[3])
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, torch.empty(q.shape[:3], dtype=lse_dtype, device=q.device)


def _empty_gradients(tensors: Tensors, wanted: list[bool]) -> Gradients:
    empty = [empty_laid_out_as(x, x.shape[-1]) if flag else None for x, flag in zip(tensors[:3], wanted, strict=False)]
    for name, flag in zip(_DIFFERENTIABLE[3:], wanted[3:], strict=True):
        x = getattr(tensors, name)
        empty.append(torch.empty(x.shape, dtype=x.dtype, device=x.device) if flag else None)
    return Gradients(*empty)


def _fixed_arity(grads: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors only: an absent gradient is an empty one."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def _attention_impl(*args: Any) -> tuple[Tensor, Tensor]:
    call = _unflatten(args)
    operands.check_attention(*call)
    return _forward(*call)


@on_one_thread
def _forward(tensors: Tensors, problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    if problem.device == "cpu" or checks_enabled():
        check_places(tensors)
        if problem.varlen:
            check_sequences(tensors, problem)
    out, lse = _empty_results(tensors.q, tensors.v)
    registry.get(backend).forward(problem, tensors, out, lse)
    return out, lse


def _attention_fake(*args: Any) -> tuple[Tensor, Tensor]:
    tensors = Tensors(*args[:_NUM_TENSORS])
    return _empty_results(tensors.q, tensors.v)


def _cache_append_impl(*args: Any) -> None:
    tensors, slots, problem, backend = _unflatten_cache(args)
    operands.check_cache(tensors, slots, problem, backend)
    if tensors.k is None:
        raise InvalidInput("k", "new keys", "None")
    _append(tensors, slots, problem, backend)


@on_one_thread
def _append(tensors: CacheTensors, slots: Slots, problem: Problem, backend: str) -> None:
    registry.get(backend).append(problem, tensors, slots)


def _cache_append_fake(*_: Any) -> None:
    pass


def _take_pages_impl(name: Tensor, table: Tensor, *args: Any) -> None:
    *storage, rows, lengths, counts = args
    pool = _pools.get(int(name)) if isinstance(name, Tensor) and name.numel() == 1 and not name.is_meta else None
    if pool is None:
        raise InvalidInput("name", "the stand-in of a cache that still exists", name)
    if not isinstance(table, Tensor):
        raise InvalidInput("table", "a tensor", table)
    pool.check_pages(table, tuple(storage), rows, lengths, counts)
    pool.take_pages(table, tuple(storage), rows, lengths, counts)


def _take_pages_fake(*_: Any) -> None:
    pass


def _attention_with_cache_impl(*args: Any) -> tuple[Tensor, Tensor]:
    call = _unflatten_cache(args)
    operands.check_cache(*call)
    if call[0].q is None:
        raise InvalidInput("q", "queries", "None")
    return _decode(*call)


@on_one_thread
def _decode(tensors: CacheTensors, slots: Slots, problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    assert tensors.q is not None
    out, lse = _empty_results(tensors.q, slots.v)
    registry.get(backend).decode(problem, tensors, slots, out, lse)
    return out, lse


def _attention_with_cache_fake(*args: Any) -> tuple[Tensor, Tensor]:
    tensors = CacheTensors(*args[:_NUM_CACHE_TENSORS])
    assert tensors.q is not None
    return _empty_results(tensors.q, args[_NUM_CACHE_TENSORS + 1])


@on_one_thread
def _backward_impl(*args: Any) -> tuple[Tensor, ...]:
    *call, out, lse, dout, dlse, wanted = args
    tensors, problem, backend = _unflatten(tuple(call))
    _check_wanted(wanted, len(_DIFFERENTIABLE))
    results = (("out", out), ("lse", lse), ("dout", dout), ("dlse", dlse))
    operands.check_backward(tensors, problem._replace(needs_grad=True), backend, results, wanted)
    dout = _unit_stride(dout)
    grads = _empty_gradients(tensors, wanted)
    registry.get(backend).backward(problem, tensors, out, lse.contiguous(), dout, dlse, grads)
    return _fixed_arity(grads, tensors.q)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    tensors = Tensors(*args[:_NUM_TENSORS])
    return _fixed_arity(_empty_gradients(tensors, args[-1]), tensors.q)


@on_one_thread
def _double_backward_impl(*args: Any) -> tuple[Tensor, ...]:
    call, (dout, dlse, *tangents, wanted) = args[: -len(_DIFFERENTIABLE) - 3], args[-len(_DIFFERENTIABLE) - 3 :]
    tensors, problem, backend = _unflatten(call)
    _check_wanted(wanted, len(_DIFFERENTIABLE) + 2)
    operands.check_backward(tensors, problem, backend, (("dout", dout), ("dlse", dlse)), wanted)
    operands.check_tangents(tensors, Gradients(*tangents))
    grads = _empty_gradients(tensors, wanted[:-2])
    ddout, ddlse = _empty_results(tensors.q, tensors.v)
    dtype = problem.accumulate_dtype
    with torch.autocast(problem.device, enabled=False):
        eager.double_backward(problem, tensors, dout, dlse, Gradients(*tangents), grads, ddout, ddlse, dtype)
    return _fixed_arity((*grads, ddout, ddlse), tensors.q)


def _double_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    tensors = Tensors(*args[:_NUM_TENSORS])
    grads = _empty_gradients(tensors, args[-1][:-2])
    return _fixed_arity((*grads, *_empty_results(tensors.q, tensors.v)), tensors.q)


def _check_wanted(wanted: Sequence[bool], count: int) -> None:
    if len(wanted) != count:
        raise InvalidInput("wanted", f"{count} flags, one for each gradient", list(wanted))


@on_one_thread
def _jvp_impl(*args: Any) -> tuple[Tensor, Tensor]:
    call, tangents = args[: -len(_DIFFERENTIABLE)], args[-len(_DIFFERENTIABLE) :]
    tensors, problem, backend = _unflatten(call)
    operands.check_attention(tensors, problem, backend)
    operands.check_tangents(tensors, Gradients(*tangents))
    out_tangent, lse_tangent = _empty_results(tensors.q, tensors.v)
    with torch.autocast(problem.device, enabled=False):
        eager.jvp(problem, tensors, Gradients(*tangents), out_tangent, lse_tangent, problem.accumulate_dtype)
    return out_tangent, lse_tangent


def _below_autograd(op: Any, args: tuple[Any, ...]) -> Any:
    """The operator one level down: the kernel, or an outer derivative of torch.func, which reads the grad modes."""
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
        if not _may_have_tangents():
            return op(*args)
        with forward_ad._set_fwd_grad_enabled(True):
            return op(*args)


_zeros_like = on_one_thread(torch.zeros_like)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = _below_autograd(torch.ops.longattn.attention.default, args)
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
            dout = _zeros_like(out)
        grads = torch.ops.longattn.attention_backward.default(*tensors, *ctx.scalars, out, lse, dout, dlse, wanted)
        for at, flag, grad in zip(_DIFFERENTIABLE_AT, wanted, grads, strict=True):
            if flag:
                result[at] = grad
        return tuple(result)


class _AttentionBackward(torch.autograd.Function):
    """A function of the inputs, dout and dlse: what it reads of out and lse follows from the inputs."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        grads = _below_autograd(torch.ops.longattn.attention_backward.default, args)
        *call, _, _, dout, dlse, _ = args
        ctx.save_for_backward(*call[:_NUM_TENSORS], dout, dlse)
        ctx.scalars = call[_NUM_TENSORS:]
        ctx.set_materialize_grads(False)
        return grads

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if all(tangent is None for tangent in tangents):
            return tuple(result)
        places = (*_DIFFERENTIABLE_AT, len(result) - 3, len(result) - 2)  # dout and dlse stand before the last
        wanted = [ctx.needs_input_grad[at] for at in places]
        *tensors, dout, dlse = ctx.saved_tensors
        call = (*tensors, *ctx.scalars, dout, dlse, *tangents, wanted)
        grads = torch.ops.longattn.attention_double_backward.default(*call)
        for at, flag, grad in zip(places, wanted, grads, strict=True):
            if flag:
                result[at] = grad
        return tuple(result)


class _AttentionDoubleBackward(torch.autograd.Function):
    """Second derivatives that can be computed, but not differentiated again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        return _below_autograd(torch.ops.longattn.attention_double_backward.default, args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise Unsupported("third derivative of attention", {"every backend": ["derivatives end with the second"]})


class _AttentionJvp(torch.autograd.Function):
    """The derivative of <outputs, dout'>, whose gradients are second derivatives, and first ones for the tangents."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        results = _below_autograd(torch.ops.longattn.attention_jvp.default, args)
        tangents = args[-len(_DIFFERENTIABLE) :]
        ctx.save_for_backward(*args[:_NUM_TENSORS], *tangents)
        ctx.scalars = args[_NUM_TENSORS : -len(_DIFFERENTIABLE)]
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if dout is None and dlse is None:
            return tuple(result)
        tensors, tangents = ctx.saved_tensors[:_NUM_TENSORS], ctx.saved_tensors[_NUM_TENSORS:]
        out, lse = torch.ops.longattn.attention.default(*tensors, *ctx.scalars)
        if dout is None:
            dout = torch.zeros_like(out)
        wanted = [ctx.needs_input_grad[at] for at in _DIFFERENTIABLE_AT]
        if any(wanted):
            call = (*tensors, *ctx.scalars, dout, dlse, *tangents, [*wanted, False, False])
            grads = torch.ops.longattn.attention_double_backward.default(*call)
            for at, flag, grad in zip(_DIFFERENTIABLE_AT, wanted, grads[:-2], strict=True):
                result[at] = grad if flag else None
        first = len(result) - len(_DIFFERENTIABLE)
        wanted = list(ctx.needs_input_grad[first:])
        if any(wanted):
            grads = torch.ops.longattn.attention_backward.default(*tensors, *ctx.scalars, out, lse, dout, dlse, wanted)
            result[first:] = [grad if flag else None for flag, grad in zip(wanted, grads, strict=True)]
        return tuple(result)


class _Rope(torch.autograd.Function):
    """A rotation is linear, and its transpose is the rotation the other way: derivatives of every order."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        out = _below_autograd(torch.ops.longattn.rope.default, args)
        _, inv_freq, positions, *ctx.scalars = args
        ctx.save_for_backward(inv_freq, positions)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        inv_freq, positions = ctx.saved_tensors
        factor, interleaved, inverse, backend = ctx.scalars
        dx = torch.ops.longattn.rope.default(dout, inv_freq, positions, factor, interleaved, not inverse, backend)
        return dx, None, None, None, None, None, None


def _autograd(function: type[torch.autograd.Function], op: Any, tangents_of: Any) -> Callable[..., Any]:
    """The kernel at the Autograd key: through `function` where a gradient may be asked for, straight down otherwise.

    Args:
        tangents_of: the results' tangents, given the arguments and, by position, their tangents; None: Unsupported.
    """
    # What PyTorch's own operators do: one level of derivatives. Function.apply would look for all levels at once.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    places = [at for at, argument in enumerate(op._schema.arguments) if argument.name in _MAY_REQUIRE_GRAD]

    def kernel(*args: Any) -> Any:
        _offer_formulas()
        if _may_have_tangents():
            primals, tangents = _unpack_duals(args)
            if tangents:
                _check_tangents(op, tangents, None if tangents_of is None else places)
                with forward_ad._set_fwd_grad_enabled(False):
                    results = primal(args)  # what a backward keeps has its tangents
                return _duals(results, tangents_of(primals, tangents))
        return primal(args)

    def primal(args: tuple[Any, ...]) -> Any:
        if torch.is_grad_enabled():
            for at in places:
                x = args[at]
                if x is not None and x.requires_grad:
                    if torch._C._are_functorch_transforms_active():
                        with enable_single_level_autograd_function():
                            return apply(*args)
                    return apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return kernel


def _may_have_tangents() -> bool:
    """Whether forward mode is on, or may be: a compiled torch.func.jvp enters it without telling torch.autograd."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _unpack_duals(args: tuple[Any, ...]) -> tuple[list[Any], dict[int, Tensor]]:
    """The arguments without tangents, and the tangents by position."""
    primals, tangents = list(args), {}
    for at, x in enumerate(args):
        if isinstance(x, Tensor):
            primal, tangent = torch._VF._unpack_dual(x, level=0)
            if tangent is not None:
                primals[at], tangents[at] = primal, tangent
    return primals, tangents


def _duals(results: Any, tangents: Any) -> Any:
    """The results with their tangents, None for those that have none."""
    if isinstance(results, Tensor):
        return torch._VF._make_dual(results, tangents, level=0)
    pairs = zip(results, tangents, strict=True)
    return tuple(x if tangent is None else torch._VF._make_dual(x, tangent, level=0) for x, tangent in pairs)


def _check_tangents(op: Any, tangents: dict[int, Tensor], places: Sequence[int] | None) -> None:
    if places is None:
        why = "forward mode differentiates attention and its first derivative"
        raise Unsupported(f"forward-mode derivative of {op}", {"every backend": [why]})
    for at in tangents:
        name = op._schema.arguments[at].name
        if at not in places and name not in ("out", "lse"):  # which follow from the inputs
            raise Unsupported(f"derivative with respect to {name}", {"every backend": ["it has none"]})


def _attention_tangents(primals: list[Any], tangents: dict[int, Tensor]) -> Any:
    along = [tangents.get(at) for at in _DIFFERENTIABLE_AT]
    return torch.ops.longattn.attention_jvp.default(*primals, *along)


def _backward_tangents(primals: list[Any], tangents: dict[int, Tensor]) -> list[Tensor | None]:
    """The tangents of gradients: second derivatives are symmetric, and gradients linear in dout and dlse."""
    *call, out, lse, dout, dlse, wanted = primals
    along = [tangents.get(at) for at in _DIFFERENTIABLE_AT]
    dout_tangent, dlse_tangent = tangents.get(len(primals) - 3), tangents.get(len(primals) - 2)
    found: list[Tensor | None] = [None] * len(wanted)
    terms = []
    if any(x is not None for x in along):
        flags = [*wanted, False, False]
        terms.append(torch.ops.longattn.attention_double_backward.default(*call, dout, dlse, *along, flags))
    if dout_tangent is not None or dlse_tangent is not None:
        given = torch.zeros_like(dout) if dout_tangent is None else dout_tangent
        terms.append(torch.ops.longattn.attention_backward.default(*call, out, lse, given, dlse_tangent, wanted))
    for term in terms:
        for at, flag in enumerate(wanted):
            if flag:
                before = found[at]
                found[at] = term[at] if before is None else before + term[at]
    return found


def _rope_tangents(primals: list[Any], tangents: dict[int, Tensor]) -> Tensor:
    return torch.ops.longattn.rope.default(tangents[0], *primals[1:])


def _offer_formulas() -> None:
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
        flops.offer(_FORMULAS)


def _formula(products: flops.Products) -> flops.Formula:
    def formula(*args: Any, out_val: Any = None) -> int:
        tensors, problem, _ = _unflatten(args[: _NUM_TENSORS + _NUM_SCALARS])
        return flops.operations(problem, flops.visible_pairs(problem, tensors), products)

    return formula


def _cache_formula(*args: Any, out_val: Any = None) -> int:
    _, _, problem, _ = _unflatten_cache(args)
    return flops.operations(problem, flops.visible_pairs(problem), flops.FORWARD)


def _vmap(op: Any, inputs: Sequence[str], results: Sequence[str]) -> Callable[..., Any]:
    """The rule of torch.vmap for an operator on the tensors and scalars of a call, and then on `inputs`.

    Names that are also of Tensors have its shapes; all others lead with the sequences.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        samples = batching.Samples(info.batch_size, Tensors(*args[:_NUM_TENSORS]), Tensors(*in_dims[:_NUM_TENSORS]))
        scalars, rest = args[_NUM_TENSORS : _NUM_TENSORS + _NUM_SCALARS], args[_NUM_TENSORS + _NUM_SCALARS :]
        wanted = rest[len(inputs) :]  # flags of the results, where they can be chosen
        flags = wanted[0] if wanted else [True] * len(results)
        own = {name for name, flag in zip(results, flags, strict=True) if flag}
        own |= {name for name, x in zip(inputs, rest, strict=False) if x is not None}
        tensors = samples.folded(own)
        if tensors is None:
            return batching.one_by_one(op, info.batch_size, in_dims, args), (0,) * len(results)
        folded = [
            None if x is None else samples.fold(name, x, dim)
            for name, x, dim in zip(inputs, rest, in_dims[_NUM_TENSORS + _NUM_SCALARS :], strict=False)
        ]
        found = op(*tensors, *scalars, *folded, *wanted)
        unfolded = [
            samples.unfold(*pair) if flag else pair[1] for *pair, flag in zip(results, found, flags, strict=True)
        ]
        return tuple(unfolded), tuple([0 if flag else None for flag in flags])

    return rule


def _rope_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    op, size = torch.ops.longattn.rope.default, info.batch_size
    (x, inv_freq, positions, *rest), (x_dim, inv_freq_dim, positions_dim, *_) = args, in_dims
    if inv_freq_dim is not None:
        return batching.one_by_one(op, size, in_dims, args)[0], 0
    batch = (x if x_dim is None else x.movedim(x_dim, 0)[0]).shape[0]
    by_sequence = positions.dim() - (positions_dim is not None) == 2
    if by_sequence or positions_dim is not None:
        positions = batching.fold(positions, positions_dim, size, batch, by_sequence)
    out = op(batching.fold(x, x_dim, size, batch), inv_freq, positions, *rest)
    return out.unflatten(0, (size, batch)), 0


def _rope_impl(
    x: Tensor, inv_freq: Tensor, positions: Tensor, factor: float, interleaved: bool, inverse: bool, backend: str
) -> Tensor:
    operands.check_rope(x, inv_freq, positions, factor, backend)
    return _rotate(x, inv_freq, positions, factor, interleaved, inverse, backend)


@on_one_thread
def _rotate(
    x: Tensor, inv_freq: Tensor, positions: Tensor, factor: float, interleaved: bool, inverse: bool, backend: str
) -> Tensor:
    x = _unit_stride(x)
    out = empty_laid_out_as(x, x.shape[-1])
    registry.get(backend).rope(x, inv_freq, positions, factor, interleaved, inverse, out)
    return out


def _rope_fake(x: Tensor, *_: Any) -> Tensor:
    return empty_laid_out_as(_unit_stride(x), x.shape[-1])


for _name, _impl, _fake, _function, _tangents_of in (
    ("attention", _attention_impl, _attention_fake, _Attention, _attention_tangents),
    ("attention_backward", _backward_impl, _backward_fake, _AttentionBackward, _backward_tangents),
    ("attention_double_backward", _double_backward_impl, _double_backward_fake, _AttentionDoubleBackward, None),
    ("attention_jvp", _jvp_impl, _attention_fake, _AttentionJvp, None),
    ("rope", _rope_impl, _rope_fake, _Rope, _rope_tangents),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"longattn::{_name}", _fake, lib=_library)
    _library.impl(_name, _autograd(_function, getattr(torch.ops.longattn, _name).default, _tangents_of), "Autograd")

_ops = torch.ops.longattn
for _name, _rule in (
    ("attention", _vmap(_ops.attention.default, (), ("out", "lse"))),
    ("attention_backward", _vmap(_ops.attention_backward.default, ("out", "lse", "dout", "dlse"), _DIFFERENTIABLE)),
    (
        "attention_double_backward",
        _vmap(
            _ops.attention_double_backward.default,
            ("dout", "dlse", *_DIFFERENTIABLE),
            (*_DIFFERENTIABLE, "dout", "dlse"),
        ),
    ),
    ("attention_jvp", _vmap(_ops.attention_jvp.default, _DIFFERENTIABLE, ("out", "lse"))),
    ("rope", _rope_vmap),
):
    torch.library.register_vmap(f"longattn::{_name}", _rule, lib=_library)

for _name, _cache_impl, _cache_fake in (
    ("take_pages", _take_pages_impl, _take_pages_fake),
    ("cache_append", _cache_append_impl, _cache_append_fake),
    ("attention_with_cache", _attention_with_cache_impl, _attention_with_cache_fake),
):
    _library.impl(_name, _cache_impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"longattn::{_name}", _cache_fake, lib=_library)

_FORMULAS: dict[Any, flops.Formula] = {
    _ops.attention: _formula(flops.FORWARD),
    _ops.attention_backward: _formula(flops.BACKWARD),
    _ops.attention_double_backward: _formula(flops.DOUBLE_BACKWARD),
    _ops.attention_jvp: _formula(flops.JVP),
    _ops.attention_with_cache: _cache_formula,
}
flops.offer(_FORMULAS)
