"""What flash-attn's arguments must be, in its layouts. What attention itself checks is not checked again."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from longattn.compat.errors import described
from longattn.errors import InvalidInput

DENSE = ("batch", "seqlen", "nheads", "headdim")
PACKED = ("tokens", "nheads", "headdim")
PAGES = ("blocks", "block_size", "nheads", "headdim")
_INTEGERS = (torch.int32, torch.int64)


def check_axes(name: str, x: object, axes: tuple[str | int, ...]) -> None:
    """A strided tensor with these axes; those that are numbers have that size."""
    if (
        not isinstance(x, Tensor)
        or x.is_nested
        or x.layout != torch.strided
        or x.dim() != len(axes)
        or any(isinstance(axis, int) and axis != size for axis, size in zip(axes, x.shape, strict=True))
    ):
        raise InvalidInput(name, f"a tensor [{', '.join(map(str, axes))}]", described(x))


def check_heads(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str] = ("q", "k", "v")) -> None:
    """q [..., nheads, headdim], k and v [..., nheads_k, headdim] fit each other."""
    _, name_k, name_v = names
    if k.shape[-1] != q.shape[-1]:
        raise InvalidInput(name_k, f"headdim {q.shape[-1]} as q", described(k))
    if v.shape[:-1] != k.shape[:-1]:
        raise InvalidInput(name_v, f"{name_k}'s shape {tuple(k.shape)} but for headdim", described(v))
    if k.shape[-2] < 1 or q.shape[-2] % k.shape[-2]:
        raise InvalidInput("q", f"a multiple of {name_k}'s {k.shape[-2]} heads", described(q))


def check_indices(name: str, x: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An int32 or int64 tensor of that shape on that device."""
    check_axes(name, x, shape)
    assert isinstance(x, Tensor)
    if x.dtype not in _INTEGERS or x.device != device:
        raise InvalidInput(name, f"int32 on {device}", f"{x.dtype} on {x.device}")
    return x


def check_sequences(name: str, x: object, device: torch.device) -> Tensor:
    """cu_seqlens: int32 or int64 [batch + 1]."""
    check_axes(name, x, ("batch + 1",))
    assert isinstance(x, Tensor)
    if not x.shape[0]:
        raise InvalidInput(name, "at least one entry", described(x))
    return check_indices(name, x, tuple(x.shape), device)


def check_table(name: str, x: object, shape: tuple[int, ...] | None, device: torch.device) -> Tensor:
    """Cosines or sines: floating [seqlen_rotary, rotary_dim / 2], or of a given shape."""
    check_axes(name, x, ("seqlen_rotary", "rotary_dim / 2") if shape is None else shape)
    assert isinstance(x, Tensor)
    if not x.is_floating_point() or x.device != device:
        raise InvalidInput(name, f"a floating tensor on {device}", f"{x.dtype} on {x.device}")
    return x


def check_contents(name: str, x: Tensor, low: int, high: int, what: str | Callable[[], str]) -> None:
    """Every entry lies in low..high. Tensors on a GPU are not read: that would wait for it."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.numel():
        return
    smallest, largest = (int(extreme) for extreme in torch.aminmax(x))
    if smallest < low or largest > high:
        reason = what if isinstance(what, str) else what()
        raise InvalidInput(name, f"entries of {low}..{high} ({reason})", f"{smallest}..{largest}")


def window_sides(window_size: Iterable[int]) -> tuple[int, int]:
    """(left, right) from any pair of ints, a tensor's too; every negative number is -1, unbounded."""
    try:
        left, right = (operator.index(side) for side in window_size)
    except (TypeError, ValueError):
        raise InvalidInput("window_size", "a pair of ints (left, right), -1 = unbounded", repr(window_size)) from None
    return max(left, -1), max(right, -1)


def softcap_or_none(softcap: float) -> float | None:
    """Numbers up to 0 mean no softcap."""
    return None if isinstance(softcap, (int, float)) and softcap <= 0 else softcap
