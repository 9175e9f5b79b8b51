"""Checks of an operator's operands: a call of `torch.ops.longattn` comes without the checks of `arguments`.

Calls that do come from there pass all of this. Metadata is looked at, and where the storage lies; no contents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longattn.backends import registry
from longattn.backends.base import Gradients
from longattn.errors import InvalidInput, Unsupported
from longattn.problem import CacheTensors, Problem, Slots, Tensors, check_memory

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_BIAS = (*_FLOATING, torch.bool)
_INT32 = (torch.int32,)
_INT64 = (torch.int64,)
_FLOAT32 = (torch.float32,)
_BOOL = (torch.bool,)
_SINGLE, _DOUBLE = torch.finfo(torch.float32).max, torch.finfo(torch.float64).max
_INT32_MAX = 2**31 - 1
_FARTHEST = 2**33  # a block's queries from its keys, in a sequence of less than 2^31 tokens and an offset as large

Shape = tuple[int, ...]


def check_attention(tensors: Tensors, problem: Problem, backend: str) -> None:
    """Check the operands of `attention`, each against the call that they make together.

    Raises:
        InvalidInput: a shape, dtype, device, layout or number that does not fit, or a tensor without storage.
        Unsupported: the backend cannot run the call.
    """
    t, p = tensors, problem
    device, batch, varlen = t.q.device, p.batch, p.varlen
    rows = 1 if varlen else batch
    _expect("q", t.q, _FLOATING, ((rows, p.q_heads, p.nq, p.head_dim),), device)
    _expect("k", t.k, (p.dtype,), ((rows, p.kv_heads, p.nk, p.head_dim),), device)
    _expect("v", t.v, (p.dtype,), ((rows, p.kv_heads, p.nk, p.v_head_dim),), device)
    _expect_unit_stride("q", t.q)
    _expect_unit_stride("k", t.k)
    _expect_unit_stride("v", t.v)
    if p.head_dim < 1 or p.v_head_dim < 1 or p.kv_heads < 1 or p.q_heads % p.kv_heads:
        shapes = f"{tuple(t.q.shape)}, {tuple(t.k.shape)}, {tuple(t.v.shape)}"
        raise InvalidInput("q", "heads that are a multiple of k's, and widths of at least 1", shapes)
    if any(x is not None for x in t[3:]):
        _check_optional(t, p, device)
    if (t.seed is None) != (p.dropout_p == 0):
        raise InvalidInput("seed", "an int64 tensor [1] with dropout, else None", _told(t.seed))
    _check_scalars(problem)
    _check_backend(problem, backend)


def _check_optional(t: Tensors, p: Problem, device: torch.device) -> None:
    batch, varlen = p.batch, p.varlen
    _expect_pair("lo", t.lo, t.hi)
    _expect_pair("cu_seqlens_q", t.cu_seqlens_q, t.cu_seqlens_k)
    if varlen and (t.key_mask is not None or t.lo is not None or t.bias is not None):
        raise InvalidInput("cu_seqlens_q", "None beside key_mask, bounds or bias", "a tensor")
    by_query: tuple[Shape, ...] = ((p.nq,),) if varlen else ((p.nq,), (batch, p.nq))
    by_key: tuple[Shape, ...] = ((p.nk,),) if varlen else ((p.nk,), (batch, p.nk))
    _expect("key_mask", t.key_mask, _BOOL, ((batch, p.nk),), device)
    _expect("key_lens", t.key_lens, _INT32, ((batch,),), device)
    _expect("lo", t.lo, _INT32, by_query, device)
    if t.lo is not None:
        _expect("hi", t.hi, _INT32, (tuple(t.lo.shape),), device)
    _expect("offset", t.offset, _INT32, ((batch,),), device)
    _expect("cu_seqlens_q", t.cu_seqlens_q, _INT32, ((batch + 1,),), device)
    _expect("cu_seqlens_k", t.cu_seqlens_k, _INT32, ((batch + 1,),), device)
    if t.bias is not None:
        sizes = (batch, p.q_heads, p.nq, p.nk)
        broadcast = t.bias.dim() == 4 and all(n in (1, full) for n, full in zip(t.bias.shape, sizes, strict=True))
        _expect("bias", t.bias, _BIAS, (tuple(t.bias.shape) if broadcast else sizes,), device)
    _expect("alibi_slopes", t.alibi_slopes, _FLOATING, ((p.q_heads,), (batch, p.q_heads)), device)
    _expect("sink_logits", t.sink_logits, _FLOATING, ((p.q_heads,),), device)
    _expect_frequencies(t.inv_freq, p.head_dim, (), device)
    for name, positions, shapes in (("positions_q", t.positions_q, by_query), ("positions_k", t.positions_k, by_key)):
        _expect(name, positions, _FLOAT32, shapes, device)
        if positions is not None and t.inv_freq is None:
            raise InvalidInput(name, "None without inv_freq", _told(positions))
    _expect("seed", t.seed, _INT64, ((1,),), device)


def check_backward(
    tensors: Tensors,
    problem: Problem,
    backend: str,
    results: Sequence[tuple[str, Tensor | None]],
    wanted: Sequence[bool],
) -> None:
    """Check the operands of a derivative: those of `attention`, and results and gradients by their names."""
    check_attention(tensors, problem, backend)
    device, rows = tensors.q.device, tuple(tensors.q.shape[:3])
    for name, x in results:
        wide = name in ("out", "dout")
        if x is None and name != "dlse":
            raise InvalidInput(name, "a tensor", "None")
        _expect(
            name,
            x,
            (problem.dtype,) if wide else _FLOATING,
            ((*rows, problem.v_head_dim),) if wide else (rows,),
            device,
        )
    for name, flag in zip(Gradients._fields, wanted[: len(Gradients._fields)], strict=True):
        x = getattr(tensors, name)
        if flag and (x is None or not x.is_floating_point()):
            raise InvalidInput("wanted", f"False for {name}, which has no gradient", "True")


def check_tangents(tensors: Tensors, tangents: Gradients) -> None:
    """Check tangents: each like the tensor that it belongs to."""
    for name, tangent in tangents._asdict().items():
        if tangent is None:
            continue
        x = getattr(tensors, name)
        if x is None:
            raise InvalidInput(f"{name}_tangent", f"None without {name}", _told(tangent))
        _expect(f"{name}_tangent", tangent, (x.dtype,), (tuple(x.shape),), x.device)


def check_cache(tensors: CacheTensors, slots: Slots, problem: Problem, backend: str) -> None:
    """Check the operands of a call on a cache; raises as `check_attention`."""
    t, p, device = tensors, problem, slots.k.device
    pages, kv_heads, size, width = slots.k.shape
    of_pages = (pages, kv_heads, size)
    if min(kv_heads, size, width, p.v_head_dim) < 1 or p.nq < 0 or p.q_heads < 0 or p.q_heads % kv_heads:
        raise InvalidInput("slots_k", "[pages, heads that divide those of q, slots, width]", _told(slots.k))
    storage = (*_FLOATING, torch.int8)
    _expect("slots_k", slots.k, storage, ((*of_pages, width),), device)
    _expect("slots_v", slots.v, (slots.k.dtype,), ((*of_pages, p.v_head_dim),), device)
    int8 = slots.k.dtype == torch.int8
    for name, scales in (("k_scales", slots.k_scales), ("v_scales", slots.v_scales)):
        _expect(name, scales, _FLOAT32, (of_pages,), device)
        if int8 == (scales is None):
            raise InvalidInput(name, "float32 scales of int8 slots, else None", _told(scales))
    _expect("table", slots.table, _INT32, ((p.batch, slots.table.shape[1]),), device)
    for name, x in zip(Slots._fields, slots, strict=True):
        if isinstance(x, Tensor) and not x.is_contiguous():
            raise InvalidInput(name, "a contiguous tensor", "another layout")
    if not 0 <= slots.ring <= _INT32_MAX or not 0 <= slots.sinks <= _INT32_MAX or (slots.sinks and not slots.ring):
        raise InvalidInput("ring", "0, or slots past the sinks", f"{slots.ring}, sinks {slots.sinks}")
    _expect_pair("k", t.k, t.v)
    if p.dtype not in _FLOATING or not 0 <= p.nk <= _INT32_MAX:
        raise InvalidInput("nk", "an int of 0 to 2^31 - 1, and a floating dtype", f"{p.nk}, {p.dtype}")
    for name, x, shape in (
        ("q", t.q, (p.batch, p.q_heads, p.nq, width)),
        ("k", t.k, (p.batch, kv_heads, p.nq, width)),
        ("v", t.v, (p.batch, kv_heads, p.nq, p.v_head_dim)),
    ):
        _expect(name, x, (p.dtype,), (shape,), device)
        if x is not None:
            _expect_unit_stride(name, x)
    by_query = ((p.nq,), (p.batch, p.nq))
    check_dims((("key_lens", t.key_lens), ("query_lens", t.query_lens)), 1)
    _expect("key_lens", t.key_lens, _INT32, ((p.batch,),), device)
    _expect("query_lens", t.query_lens, _INT32, ((p.batch,),), device)
    _expect("alibi_slopes", t.alibi_slopes, _FLOATING, ((p.q_heads,), (p.batch, p.q_heads)), device)
    _expect("sink_logits", t.sink_logits, _FLOATING, ((p.q_heads,),), device)
    _expect_frequencies(t.inv_freq, width, (p.batch,), device)
    _expect("positions", t.positions, _FLOAT32, by_query, device)
    _expect_pair("cos", t.cos, t.sin)
    if t.cos is not None and t.sin is not None:
        _expect_tables(t.cos, t.sin, t, problem, slots)
    elif p.frame:
        raise InvalidInput("frame", "0 without cos and sin", p.frame)
    _expect_pair("tree", t.tree, t.depths)
    _expect("tree", t.tree, _BOOL, ((p.nq, p.nq), (p.batch, p.nq, p.nq)), device)
    _expect("depths", t.depths, _INT32, by_query, device)
    _check_scalars(problem)
    _check_backend(problem, backend)


def check_rope(x: Tensor, inv_freq: Tensor, positions: Tensor, factor: float, backend: str) -> None:
    """Check the operands of `rope`; raises as `check_attention`."""
    check_dims((("x", x),), 4)
    check_dims((("inv_freq", inv_freq),), 1)
    if positions is None:
        raise InvalidInput("positions", "a tensor", "None")
    batch, _, n, width = x.shape
    _expect("x", x, _FLOATING, (tuple(x.shape),), x.device)
    _expect_frequencies(inv_freq, width, (), x.device)
    _expect("positions", positions, _FLOAT32, ((n,), (1, n), (batch, n)), x.device)
    _check_number("factor", factor, _DOUBLE)
    found = registry.get(backend)
    missing = found.unavailable()
    if missing is not None:
        raise Unsupported("rope", {backend: [missing]})


def check_dims(tensors: Sequence[tuple[str, Tensor | None]], dims: int) -> None:
    """Check ranks before sizes are read off shapes; the dispatcher hands on None in place of a tensor."""
    for name, x in tensors:
        if x is None or x.dim() != dims:
            raise InvalidInput(name, f"a tensor of {dims} dimensions", _told(x))


def _expect(
    name: str, x: Tensor | None, dtypes: Sequence[torch.dtype], shapes: Sequence[Shape], device: torch.device
) -> None:
    if x is None:
        return
    if x.shape not in shapes or x.dtype not in dtypes or x.layout != torch.strided or x.device != device:
        listing = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        kinds = " or ".join(str(dtype)[6:] for dtype in dtypes)
        raise InvalidInput(name, f"{kinds} {listing} on {device}", _told(x))
    check_memory(name, x)


def _expect_unit_stride(name: str, x: Tensor) -> None:
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
        raise InvalidInput(name, "unit stride in the last dimension", f"stride {x.stride(-1)}")


def _expect_pair(name: str, x: Tensor | None, other: Tensor | None) -> None:
    if (x is None) != (other is None):
        raise InvalidInput(name, "given exactly if its counterpart is", _told(x))


def _expect_frequencies(x: Tensor | None, width: int, batch: Shape, device: torch.device) -> None:
    if x is None:
        return
    check_dims((("inv_freq", x),), 2 if batch and x.dim() == 2 else 1)
    pairs = x.shape[-1]
    if 2 * pairs > width:
        raise InvalidInput("inv_freq", f"at most {width // 2} frequencies, as heads are {width} wide", f"{pairs}")
    _expect("inv_freq", x, _FLOAT32, ((pairs,), (*batch, pairs)), device)


def _expect_tables(cos: Tensor, sin: Tensor, tensors: CacheTensors, problem: Problem, slots: Slots) -> None:
    """Tables of angles have a row for every place that a key or a query may rotate at."""
    if tensors.inv_freq is None:
        raise InvalidInput("cos", "None without inv_freq", _told(cos))
    frame, new = problem.frame, problem.nq
    if not 0 <= frame <= _INT32_MAX:
        raise InvalidInput("frame", "an int of 0 to 2^31 - 1", frame)
    rows = max(frame + new - 1, frame + slots.sinks) if frame else problem.nk
    pairs = tensors.inv_freq.shape[-1]
    check_dims((("cos", cos), ("sin", sin)), 3)
    if cos.shape[1] < rows:
        raise InvalidInput("cos", f"at least {rows} rows", f"{cos.shape[1]}")
    shapes = ((1, cos.shape[1], pairs), (problem.batch, cos.shape[1], pairs))
    for name, x in (("cos", cos), ("sin", sin)):
        _expect(name, x, (problem.accumulate_dtype,), shapes, slots.k.device)
        if not x.is_contiguous() or x.shape != cos.shape:
            raise InvalidInput(name, "a contiguous tensor of cos's shape", "another layout")


def _check_scalars(problem: Problem) -> None:
    mask, p = problem.mask, problem
    sizes = (mask.left or 0, mask.right or 0, mask.sinks, p.max_seqlen_q, p.max_seqlen_k)
    if min(sizes) < 0 or max(sizes) > _INT32_MAX:
        named = dict(zip(("left", "right", "sinks", "max_seqlen_q", "max_seqlen_k"), sizes, strict=True))
        raise InvalidInput("window", "left, right, sinks and lengths of 0 to 2^31 - 1", named)
    if not -_FARTHEST <= mask.offset <= _FARTHEST:
        raise InvalidInput("shift", "an int of -2^33 to 2^33", mask.offset)
    largest = _DOUBLE if p.dtype == torch.float64 else _SINGLE
    _check_number("scale", p.scale, largest)
    _check_number("softcap", p.softcap, largest, low=0.0)
    _check_number("rope_factor", p.rope_factor, largest)
    if not 0 <= p.dropout_p < 1:
        raise InvalidInput("dropout_p", "a number in [0, 1)", p.dropout_p)
    if min(p.origin) < 0 or max(p.origin) >= 2**62:
        raise InvalidInput("origin", "four ints from 0 to 2^62", p.origin)


def _check_number(name: str, value: float, largest: float, low: float = -math.inf) -> None:
    if not (-largest <= value <= largest and value >= low):
        raise InvalidInput(name, f"a finite number of at most {largest:.2g}", value)


def _check_backend(problem: Problem, name: str) -> None:
    backend = registry.get(name)
    missing = backend.unavailable()
    why = backend.reasons(problem) if missing is None else [missing]
    if why:
        raise Unsupported(str(problem), {name: why})


def _told(x: Tensor | None) -> str:
    return "None" if x is None else f"{str(x.dtype)[6:]} {list(x.shape)} on {x.device}"
