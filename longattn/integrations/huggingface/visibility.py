"""What a query may see in a Hugging Face model: read off the functions that transformers composes its masks from.

transformers describes a mask as a function (batch, head, query, key) -> bool, composed of few standard ones: causal,
windows, chunks, packed sequences. Those we recognise and turn into the terms of `longattn.attention`. A function that
we do not recognise is evaluated by transformers itself, some rows at a time, and kept as one interval of keys per
query; a mask that no interval can say is an error. No [Nq, Nk] tensor outlives those rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, reduce
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longattn.errors import Unsupported
from longattn.redirection import on_shards, token_places

MaskFunction = Callable[..., Any]

_TILE_ENTRIES = 1 << 22  # entries of a mask that exist at once while an unknown function is evaluated
_FAR = 2**31 - 1


class Visibility(Tensor):
    """Takes the place of a dense mask [B, 1, Nq, Nk] on its way through a model, and holds no entries.

    Any operation on entries is an error, so that a model that edits its mask cannot get a wrong one.

    Attributes:
        left, right: of `longattn.Mask`; None for unbounded.
        offset: int32 [B], where query 0 stands; None: the last query stands at the last key.
        lo, hi: int32 [Nq] or [B, Nq], query i sees keys lo[i] <= j < hi[i] only; or None.
        key_mask: bool [B, Nk], True = visible; or None.
    """

    left: int | None
    right: int | None
    offset: Tensor | None
    lo: Tensor | None
    hi: Tensor | None
    key_mask: Tensor | None
    _anchor: Tensor  # empty: torch.compile takes no tensor that consists of none

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        device: torch.device | str,
        *,
        left: int | None = None,
        right: int | None = None,
        offset: Tensor | None = None,
        lo: Tensor | None = None,
        hi: Tensor | None = None,
        key_mask: Tensor | None = None,
        _anchor: Tensor | None = None,
    ) -> Visibility:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=torch.device(device))
        self.left, self.right = left, right
        self.offset, self.lo, self.hi, self.key_mask = offset, lo, hi, key_mask
        self._anchor = torch.empty(0, device=device) if _anchor is None else _anchor
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        terms = {name: getattr(self, name) for name in ("left", "right", *_TENSORS[:-1])}
        listing = ", ".join(f"{name}={_brief(term)}" for name, term in terms.items() if term is not None)
        return f"Visibility({list(self.shape)}, {listing})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return [name for name in _TENSORS if getattr(self, name) is not None], (self.device, self.left, self.right)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], constants: tuple[Any, ...], size: Any, stride: Any
    ) -> Visibility:
        device, left, right = constants
        return Visibility(tuple(size), device, left=left, right=right, **inner)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a classmethod
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        mask = args[0]
        if function in (aten.detach.default, aten.alias.default, aten.clone.default):
            return mask._map(function, mask.device)
        if function is aten.slice.Tensor and _is_whole(mask, *args[1:]):
            return mask._map(aten.alias.default, mask.device)
        if function is aten._to_copy.default and (kwargs or {}).get("dtype", torch.bool) == torch.bool:
            device = (kwargs or {}).get("device") or mask.device
            return mask._map(lambda x: x.to(device), device)
        raise _unsupported(f"{function} on a mask", "the model edits its mask, which has no entries here")

    def _map(self, function: Callable[[Tensor], Tensor], device: torch.device) -> Visibility:
        present = {name: function(term) for name in _TENSORS if (term := getattr(self, name)) is not None}
        return Visibility(tuple(self.shape), device, left=self.left, right=self.right, **present)


def keywords(mask: Visibility) -> dict[str, Any]:
    """The same as keywords of `longattn.attention`. No method: torch.compile would take it for a tensor's."""
    sides = (-1 if mask.left is None else mask.left, -1 if mask.right is None else mask.right)
    return {
        "window": None if sides == (-1, -1) else sides,
        "align": "end" if mask.offset is None else mask.offset,
        "key_mask": mask.key_mask,
        "bounds": None if mask.lo is None or mask.hi is None else (mask.lo, mask.hi),
    }


_TENSORS = ("offset", "lo", "hi", "key_mask", "_anchor")


def visibility(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Visibility:
    """What transformers' AttentionMaskInterface calls for a mask.

    Args:
        batch_size, q_length, kv_length: B, Nq, Nk.
        q_offset: the index of query 0, a tensor with static caches; kv_offset: that of key 0 (sliding caches).
        mask_function: (batch, head, query, key) -> bool of indices; causal by default.
        attention_mask: bool [B, seen], False for padding.
        use_vmap: mask_function is the user's own and may not be vectorised.

    Raises:
        Unsupported: some query's keys are no interval.
    """
    from transformers import masking_utils

    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    queries = (token_places(q_length, torch.device(device)) + q_offset)[None]
    terms = _read(mask_function, queries)
    key_mask = _padding(attention_mask, batch_size, kv_length, kv_offset)
    if terms is None:
        if on_shards():
            name = getattr(mask_function, "__qualname__", mask_function)
            raise _unsupported(f"the mask {name}", "what it says of indices holds for a whole sequence, not for shards")
        terms, seen = _evaluate(mask_function, batch_size, q_length, kv_length, q_offset, kv_offset, use_vmap, device)
        key_mask = seen if key_mask is None else key_mask if seen is None else key_mask & seen
    lo = hi = offset = None
    if terms.lo is not None and terms.hi is not None:
        lo, hi = ((x - kv_offset).clamp(-_FAR, _FAR).to(torch.int32) for x in (terms.lo, terms.hi))
        lo, hi = (x[0] if x.shape[0] == 1 else x.contiguous() for x in (lo, hi))
    shift = q_offset - kv_offset
    # A tensor is copied here: the cache that it belongs to counts on in place while the layers run.
    if isinstance(shift, Tensor) or shift != kv_length - q_length:
        offset = torch.as_tensor(shift, dtype=torch.int32, device=device).expand(batch_size).contiguous()
    return Visibility(
        (batch_size, 1, q_length, kv_length),
        device,
        left=terms.left,
        right=terms.right,
        offset=offset,
        lo=lo,
        hi=hi,
        key_mask=key_mask,
    )


def _padding(attention_mask: Tensor | None, batch_size: int, kv_length: int, kv_offset: int) -> Tensor | None:
    """The keys that are no padding, bool [B, Nk], or None if all are. Keys past the mask's end are padding."""
    if attention_mask is None:
        return None
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    present = F.pad(attention_mask, (0, max(missing, 0)))[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    return None if present.all() else present.expand(batch_size, kv_length).contiguous()


@dataclass(frozen=True)
class _Terms:
    """A query at index q sees the key at index k if q - left <= k <= q + right and lo <= k < hi."""

    left: int | None = None
    right: int | None = None
    lo: Tensor | None = None  # int64 [1 or B, Nq]
    hi: Tensor | None = None

    def __and__(self, other: _Terms) -> _Terms:
        nearer: dict[str, Any] = {"left": min, "right": min, "lo": torch.maximum, "hi": torch.minimum}
        joined = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            both = mine is not None and theirs is not None
            joined[field.name] = nearer[field.name](mine, theirs) if both else theirs if mine is None else mine
        return _Terms(**joined)


def _read(function: MaskFunction, queries: Tensor) -> _Terms | None:
    """The terms of a mask function that transformers made, for queries at these indices; None if it is unknown."""
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return _Terms(right=0)
    if function is masking_utils.bidirectional_mask_function:
        return _Terms()
    reader = _readers().get(getattr(function, "__code__", None))
    if reader is None:
        return None
    try:
        return reader(queries, **inspect.getclosurevars(function).nonlocals)
    except TypeError:  # another version of transformers, whose function has other variables
        return None


@cache
def _readers() -> dict[CodeType | None, Callable[..., _Terms | None]]:
    """By the code of the functions that transformers' factories return: the same object in each of them."""
    from transformers import masking_utils as made

    nothing = torch.zeros(1, 1, device="cpu")
    return {
        made.and_masks().__code__: _read_intersection,
        made.sliding_window_overlay(1).__code__: _read_sliding_window,
        made.sliding_window_bidirectional_overlay(1).__code__: _read_bidirectional_window,
        made.chunked_overlay(1, nothing).__code__: _read_chunks,
    }


def _read_intersection(queries: Tensor, mask_functions: tuple[MaskFunction, ...]) -> _Terms | None:
    packed = _read_packed(queries, mask_functions)
    if packed is not None:
        return packed
    parts = [_read(function, queries) for function in mask_functions]
    return None if None in parts else reduce(_Terms.__and__, parts)  # type: ignore[arg-type]


def _read_sliding_window(queries: Tensor, sliding_window: int) -> _Terms:
    """k > q - W: the W newest keys."""
    return _Terms(left=sliding_window - 1)


def _read_bidirectional_window(queries: Tensor, sliding_window: int) -> _Terms:
    """|q - k| <= W: both ends included."""
    return _Terms(left=sliding_window, right=sliding_window)


def _read_chunks(queries: Tensor, chunk_size: int, left_padding: Tensor) -> _Terms:
    """Chunks are counted from the first token after the padding."""
    if on_shards() and left_padding.any():
        raise _unsupported("a mask of chunks", "padding on the left shifts them, and a shard does not know by how much")
    padding = left_padding.view(-1, 1)
    start = torch.div(queries - padding, chunk_size, rounding_mode="floor") * chunk_size + padding
    return _Terms(lo=start, hi=start + chunk_size)


def _read_packed(queries: Tensor, mask_functions: tuple[MaskFunction, ...]) -> _Terms | None:
    """Sequences packed in a row: (same sequence) and (a mask function of the positions inside of it).

    Both hold for intervals of indices only if a sequence stands in one place and its positions count up by one.
    """
    from transformers import masking_utils as made

    if on_shards():
        return None
    none = torch.zeros(1, 1, device="cpu")
    codes = [getattr(function, "__code__", None) for function in mask_functions]
    if codes != [
        made.packed_sequence_mask_function(none).__code__,
        made.remap_positions_for_packed_sequence(made.causal_mask_function, none).__code__,
    ]:
        return None
    same, remapped = (inspect.getclosurevars(function).nonlocals for function in mask_functions)
    ids, positions = same["packed_sequence_mask"], remapped["position_ids"]
    starts = ids.diff(dim=-1, prepend=ids[:, :1] - 1) != 0
    if (ids.diff(dim=-1) < 0).any() or ((positions.diff(dim=-1) != 1) & ~starts[:, 1:]).any():
        return None
    inner = _read(remapped["mask_function"], positions.gather(1, queries.expand(len(positions), -1)))
    if inner is None:
        return None
    shift = queries - positions
    inside = _Terms(inner.left, inner.right, *(None if x is None else x + shift for x in (inner.lo, inner.hi)))
    if not starts[:, 1:].any():
        return inside
    index = torch.arange(ids.shape[1], device=ids.device)
    lo = torch.where(starts, index, 0).cummax(dim=-1).values
    last = F.pad(starts[:, 1:], (0, 1), value=True)
    hi = torch.where(last, index + 1, ids.shape[1]).flip(-1).cummin(dim=-1).values.flip(-1)
    return inside & _Terms(lo=lo, hi=hi)


def _evaluate(
    function: MaskFunction,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    use_vmap: bool,
    device: torch.device | str,
) -> tuple[_Terms, Tensor | None]:
    """The interval of each query under any mask function, found by evaluating all of it, a tile of rows at a time.

    Returns:
        the terms, and bool [B, Nk], the keys that any query sees, if some interval has holes where nobody sees a key.
    """
    from transformers.masking_utils import sdpa_mask

    rows = max(1, _TILE_ENTRIES // max(1, batch_size * kv_length))
    lo = torch.zeros(batch_size, q_length, dtype=torch.int64, device=device)
    hi, count = torch.zeros_like(lo), torch.zeros_like(lo)
    seen = torch.zeros(batch_size, kv_length, dtype=torch.bool, device=device)
    for start in range(0, q_length, rows):
        tile = slice(start, min(start + rows, q_length))
        dense = sdpa_mask(
            batch_size,
            tile.stop - tile.start,
            kv_length,
            q_offset=q_offset + start,  # type: ignore[arg-type]  # static caches have tensors
            kv_offset=kv_offset,
            mask_function=function,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        assert dense is not None
        visible = dense[:, 0].to(torch.int8)
        seen |= visible.any(1)
        count[:, tile] = visible.sum(-1)
        lo[:, tile] = visible.argmax(-1)
        hi[:, tile] = kv_length - visible.flip(-1).argmax(-1)
    hi = torch.where(count > 0, hi, lo)
    terms = _Terms(lo=lo + kv_offset, hi=hi + kv_offset)
    if torch.equal(hi - lo, count):
        return terms, None
    seen_before = F.pad(seen.cumsum(-1), (1, 0))  # [B, Nk + 1]
    if not torch.equal(seen_before.gather(1, hi) - seen_before.gather(1, lo), count):
        raise _unsupported(
            f"the mask {getattr(function, '__qualname__', function)}",
            "a query's keys are no interval; give the model a 4-D attention_mask to have it dense",
        )
    return terms, seen


def _is_whole(x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> bool:
    """Whether a slice is all of x."""
    places = range(x.shape[dim])
    return places[start:end:step] == places


def _unsupported(call: str, why: str) -> Unsupported:
    return Unsupported(call, {"every backend": [why]})


def _brief(term: object) -> str:
    return f"{str(term.dtype)[6:]} {list(term.shape)}" if isinstance(term, Tensor) else str(term)
