"""What a query may see in a Hugging Face model: read off the functions that transformers composes its masks from.

transformers describes a mask as a function (batch, head, query, key) -> bool, composed of few standard ones: causal,
windows, chunks, packed sequences. Those we recognise and turn into the terms of `longattn.attention`. A function that
we do not recognise is evaluated by transformers itself, some rows at a time, and kept as one interval of keys per
query; a mask that no interval can say is an error. No [Nq, Nk] tensor outlives those rows.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, reduce
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from longattn.errors import InvalidInput, Unsupported
from longattn.mask import Mask
from longattn.onnx_export import running_max
from longattn.redirection import on_shards, token_places

MaskFunction = Callable[..., Any]

_TILE_ENTRIES = 1 << 22  # entries of a mask that exist at once while an unknown function is evaluated
_FAR = 2**31 - 1


class Visibility(Tensor):
    """A stand-in for a dense mask [B, 1, Nq, Nk] on its way through a model. It holds no entries.

    Repeating it over the batch or the heads keeps it. Adding it to a tensor of scores, or choosing between two tensors
    by it, gives the dense tensor that the model asks for. Every other operation on entries is an error, so that a model
    that edits its mask cannot get a wrong one.

    Attributes:
        left, right: of `longattn.Mask`; None for unbounded.
        offset: int32 [B], the position of query 0; None: the last query is at the position of the last key.
        lo, hi: int32 [Nq] or [B, Nq], query i sees keys lo[i] <= j < hi[i] only; or None.
        key_mask: bool [B, Nk], True = visible; or None.
        plain: whether nothing but causality and a window hides keys, so that position_ids may say more.
        family: the model_type of the config that it was made for, for messages.
        packed: what `packing.packed_bounds` found for these position_ids, kept for the next layer.
        start: int32 [1 or B, 1 or Nq], the index at which each query's own sequence starts, past padding on the left
            and below 0 where a sliding cache has forgotten that token; None: 0. Attention does not read it, methods do.
    """

    left: int | None
    right: int | None
    offset: Tensor | None
    lo: Tensor | None
    hi: Tensor | None
    key_mask: Tensor | None
    plain: bool
    family: str | None
    packed: tuple[Tensor, tuple[Tensor, Tensor]] | None
    start: Tensor | None
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
        plain: bool = False,
        family: str | None = None,
        start: Tensor | None = None,
        _anchor: Tensor | None = None,
    ) -> Visibility:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=torch.device(device))
        self.left, self.right = left, right
        self.offset, self.lo, self.hi, self.key_mask, self.start = offset, lo, hi, key_mask, start
        self.plain, self.family, self.packed = plain, family, None
        self._anchor = torch.empty(0, device=device) if _anchor is None else _anchor
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        terms = {name: getattr(self, name) for name in ("left", "right", *_TENSORS[:-1])}
        listing = ", ".join(f"{name}={_brief(term)}" for name, term in terms.items() if term is not None)
        return f"Visibility({list(self.shape)}, {listing})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        constants = (self.device, self.left, self.right, self.plain, self.family)
        return [name for name in _TENSORS if getattr(self, name) is not None], constants

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], constants: tuple[Any, ...], size: Any, stride: Any
    ) -> Visibility:
        device, left, right, plain, family = constants
        return Visibility(tuple(size), device, left=left, right=right, plain=plain, family=family, **inner)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a classmethod
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        options = kwargs or {}
        mask = next(x for x in tree_leaves((args, options)) if isinstance(x, Visibility))
        if function in (aten.detach.default, aten.alias.default, aten.clone.default):
            return mask._map(function)
        if function is aten.slice.Tensor and _is_whole(mask, *args[1:]):
            return mask._map(aten.alias.default)
        if function is aten._to_copy.default and options.get("dtype", torch.bool) == torch.bool:
            device = options.get("device") or mask.device
            return mask._map(lambda x: x.to(device), device=device)
        if function in (aten.repeat.default, aten.expand.default, aten.view.default, aten._unsafe_view.default):
            reshaped = _reshaped(mask, function, list(args[1]))
            if reshaped is not None:
                return reshaped
        if function in (aten.add.Tensor, aten.add_.Tensor) and not options:
            scores = args[1] if args[0] is mask else args[0]
            if _has_entries(scores) and scores.dim() and scores.is_floating_point():
                hidden = torch.finfo(scores.dtype).min
                if function is aten.add.Tensor:
                    return torch.where(dense(mask), scores, hidden)
                return scores.copy_(torch.where(dense(mask), scores, hidden))
        if function is aten.where.self and args[0] is mask and all(map(_has_entries, args[1:])):
            return torch.where(dense(mask), *args[1:])
        family = "the model" if mask.family is None else mask.family
        raise _unsupported(
            f"{function} on the mask of {family}",
            "the model edits its mask, which has no entries here; use attn_implementation='sdpa' or 'eager' (and "
            "longattn.compat.use() around calls of PyTorch's scaled_dot_product_attention)",
        )

    def _map(
        self,
        function: Callable[[Tensor], Tensor],
        *,
        names: Sequence[str] | None = None,
        shape: tuple[int, ...] | None = None,
        device: torch.device | None = None,
    ) -> Visibility:
        """The same with a function applied to the tensors of these names, or to all."""
        present = {name: term for name in _TENSORS if (term := getattr(self, name)) is not None}
        changed = {name: function(x) if names is None or name in names else x for name, x in present.items()}
        return Visibility(
            tuple(self.shape) if shape is None else shape,
            self.device if device is None else device,
            left=self.left,
            right=self.right,
            plain=self.plain,
            family=self.family,
            **changed,
        )


def _has_entries(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, Visibility)


def keywords(mask: Visibility) -> dict[str, Any]:
    """The same as keywords of `longattn.attention`. No method: torch.compile would take it for a tensor's."""
    sides = (-1 if mask.left is None else mask.left, -1 if mask.right is None else mask.right)
    return {
        "window": None if sides == (-1, -1) else sides,
        "align": "end" if mask.offset is None else mask.offset,
        "key_mask": mask.key_mask,
        "bounds": None if mask.lo is None or mask.hi is None else (mask.lo, mask.hi),
    }


def hides_nothing(mask: Visibility) -> bool:
    """Return whether every query sees every key, however many there are of each."""
    return mask.left is None and mask.right is None and mask.lo is None and mask.key_mask is None


def dense(mask: Visibility) -> Tensor:
    """Return the mask's entries, bool, True = visible: [B, 1, Nq, Nk], or [rows, Nq, Nk] if it has three dimensions."""
    _say_dense(mask.family)
    nq, nk = mask.shape[-2:]
    query, key = torch.arange(nq, device=mask.device)[None, :, None], torch.arange(nk, device=mask.device)
    shift = nk - nq if mask.offset is None else mask.offset.long()[:, None, None]
    visible = Mask(mask.left, mask.right).visible(query + shift, key)
    if mask.lo is not None and mask.hi is not None:
        lo, hi = (x if x.dim() == 2 else x[None] for x in (mask.lo, mask.hi))
        visible = visible & (lo[:, :, None] <= key) & (key < hi[:, :, None])
    if mask.key_mask is not None:
        visible = visible & mask.key_mask[:, None]
    visible = visible.expand(mask.shape[0], nq, nk)
    return visible if mask.dim() == 3 else visible[:, None]


@cache
def _say_dense(family: str | None) -> None:
    """Warn, once for each family, that memory grows with the square of the length."""
    warnings.warn(
        f"{family or 'the model'} computes with the entries of its attention mask: the mask, and what the model "
        "computes with it, are dense [Nq, Nk] tensors that longattn's attention would not make",
        stacklevel=2,
    )


def _reshaped(mask: Visibility, function: Any, sizes: list[int]) -> Visibility | None:
    """The mask repeated or expanded over batch and heads, or with both in one dimension; None: something else."""
    aten = torch.ops.aten
    batch, rest = mask.shape[0], tuple(mask.shape[-2:])
    if function is aten.repeat.default:
        if mask.dim() != 4 or len(sizes) != 4 or tuple(sizes[2:]) != (1, 1):
            return None
        shape = (batch * sizes[0], mask.shape[1] * sizes[1], *rest)
        return mask._map(lambda x: x.repeat(sizes[0], *[1] * (x.dim() - 1)), names=_of_rows(mask), shape=shape)
    if function is aten.expand.default:
        if mask.dim() != 4 or len(sizes) != 4:
            return None
        shape = tuple(old if new == -1 else new for old, new in zip(mask.shape, sizes, strict=True))
        if shape[2:] != rest:
            return None
        return mask._map(lambda x: x.expand(shape[0], *x.shape[1:]), names=_of_rows(mask), shape=shape)
    leading = mask.shape[:-2].numel()
    sizes = [leading if size == -1 else size for size in sizes]
    if tuple(sizes) == tuple(mask.shape):
        return mask._map(aten.alias.default)
    if len(sizes) != 3 or tuple(sizes[1:]) != rest or mask.dim() != 4:
        return None
    heads = mask.shape[1]
    return mask._map(lambda x: x.repeat_interleave(heads, 0), names=_of_rows(mask), shape=(leading, *rest))


def _of_rows(mask: Visibility) -> list[str]:
    """The names of the terms that have an entry for each sequence of the batch."""
    bounds = ("lo", "hi") if mask.lo is not None and mask.lo.dim() == 2 else ()
    start = ("start",) if mask.start is not None and mask.start.shape[0] == mask.shape[0] else ()
    return ["offset", "key_mask", *bounds, *start]


_TENSORS = ("offset", "lo", "hi", "key_mask", "start", "_anchor")


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
    config: Any = None,
    **_: Any,
) -> Visibility:
    """What transformers' AttentionMaskInterface calls for a mask.

    Args:
        batch_size, q_length, kv_length: B, Nq, Nk.
        q_offset: the index of query 0, a tensor with static caches; kv_offset: that of key 0 (sliding caches).
        mask_function: (batch, head, query, key) -> bool of indices; causal by default.
        attention_mask: bool [B, seen], False for padding.
        use_vmap: mask_function is the user's own and may not be vectorised.
        config: of the model.

    Raises:
        InvalidInput: an attention_mask that has neither 2 nor 4 dimensions; a sliding_window below 1.
        Unsupported: some query's keys are no interval; a mask function of the user's own in an exported program.
    """
    from transformers import masking_utils

    if attention_mask is not None and attention_mask.dim() != 2:
        expected = "2 dimensions [B, keys], or 4 [B, 1 or heads, queries, keys]"
        raise InvalidInput("attention_mask", expected, f"shape {list(attention_mask.shape)}")
    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    queries = (token_places(q_length, torch.device(device)) + q_offset)[None]
    terms = _read(mask_function, queries)
    known = terms is not None
    key_mask = _padding(attention_mask, batch_size, kv_length, kv_offset)
    if terms is None:
        if on_shards():
            name = getattr(mask_function, "__qualname__", mask_function)
            raise _unsupported(f"the mask {name}", "what it says of indices holds for a whole sequence, not for shards")
        if not _at_hand(queries):
            name = getattr(mask_function, "__qualname__", mask_function)
            raise _unsupported(
                f"tracing the mask {name}",
                "only masks that transformers makes can be traced; pass the "
                "model a 4-D attention_mask, or export it with attn_implementation='sdpa'",
            )
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
    plain = known and terms.right == 0 and lo is None and key_mask is None and offset is None
    return Visibility(
        (batch_size, 1, q_length, kv_length),
        device,
        left=terms.left,
        right=terms.right,
        offset=offset,
        lo=lo,
        hi=hi,
        key_mask=key_mask,
        plain=plain,
        family=getattr(config, "model_type", None),
        start=_start(terms, attention_mask, kv_offset, device),
    )


def _start(terms: _Terms, attention_mask: Tensor | None, kv_offset: int, device: torch.device | str) -> Tensor | None:
    """The attribute `start` of a mask; the 2-D mask also covers the tokens that a sliding cache has forgotten."""
    if terms.start is not None:
        start = terms.start
    elif attention_mask is not None:
        start = attention_mask.to(torch.int32).argmax(-1, keepdim=True)
    elif kv_offset:
        start = torch.zeros(1, 1, dtype=torch.int32, device=device)
    else:
        return None
    return (start - kv_offset).to(torch.int32)


def _padding(attention_mask: Tensor | None, batch_size: int, kv_length: int, kv_offset: int) -> Tensor | None:
    """The keys that are not padding, bool [B, Nk], or None if all are. Keys past the mask's end are padding."""
    if attention_mask is None:
        return None
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    present = F.pad(attention_mask, (0, max(missing, 0)))[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    return None if _at_hand(present) and present.all() else present.expand(batch_size, kv_length).contiguous()


def _at_hand(x: Tensor) -> bool:
    """Whether the values of a tensor may be read: no graph is traced, and it is neither fake nor under a transform."""
    if torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


@dataclass(frozen=True)
class _Terms:
    """A query at index q sees the key at index k if q - left <= k <= q + right and lo <= k < hi."""

    left: int | None = None
    right: int | None = None
    lo: Tensor | None = None  # int64 [1 or B, Nq]
    hi: Tensor | None = None
    start: Tensor | None = None  # where sequences that are packed in a row start

    def __and__(self, other: _Terms) -> _Terms:
        nearer: dict[str, Any] = {"left": min, "right": min, "lo": torch.maximum, "hi": torch.minimum}
        nearer["start"] = torch.maximum
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
        made.packed_sequence_mask_function(nothing).__code__: _read_sequences,
    }


def _read_intersection(queries: Tensor, mask_functions: tuple[MaskFunction, ...]) -> _Terms | None:
    packed = _read_packed(queries, mask_functions)
    if packed is not None:
        return packed
    parts = [_read(function, queries) for function in mask_functions]
    return None if None in parts else reduce(_Terms.__and__, parts)  # type: ignore[arg-type]


def _read_sliding_window(queries: Tensor, sliding_window: int) -> _Terms:
    """k > q - W: the W newest keys."""
    _check_window(sliding_window)
    return _Terms(left=sliding_window - 1)


def _read_bidirectional_window(queries: Tensor, sliding_window: int) -> _Terms:
    """|q - k| <= W: both ends included."""
    _check_window(sliding_window)
    return _Terms(left=sliding_window, right=sliding_window)


def _check_window(sliding_window: int) -> None:
    if sliding_window < 1:
        raise InvalidInput("sliding_window", "an int >= 1 in the config of a model with sliding layers", sliding_window)


def _read_chunks(queries: Tensor, chunk_size: int, left_padding: Tensor) -> _Terms:
    """Chunks are counted from the first token after the padding."""
    if chunk_size < 1:
        raise InvalidInput("attention_chunk_size", "an int >= 1 in the config of a model with chunks", chunk_size)
    if on_shards() and left_padding.any():
        raise _unsupported("a mask of chunks", "padding on the left shifts them, and a shard does not know by how much")
    padding = left_padding.view(-1, 1)
    start = torch.div(queries - padding, chunk_size, rounding_mode="floor") * chunk_size + padding
    return _Terms(lo=start, hi=start + chunk_size)


def _read_sequences(queries: Tensor, packed_sequence_mask: Tensor) -> _Terms | None:
    """Sequences packed in a row, each at one place: a query sees the keys that have its own sequence's number."""
    ids = packed_sequence_mask
    if on_shards() or (_at_hand(ids) and (ids.diff(dim=-1) < 0).any()):
        return None
    starts = ids.diff(dim=-1, prepend=ids[:, :1] - 1) != 0
    if _at_hand(ids) and not starts[:, 1:].any():
        return _Terms()
    index = torch.arange(ids.shape[1], device=ids.device)
    lo = running_max(torch.where(starts, index, 0))
    last = F.pad(starts[:, 1:], (0, 1), value=True)
    hi = -running_max(-torch.where(last, index + 1, ids.shape[1]).flip(-1)).flip(-1)
    return _Terms(lo=lo, hi=hi, start=lo)


def _read_packed(queries: Tensor, mask_functions: tuple[MaskFunction, ...]) -> _Terms | None:
    """(The same sequence) and (a mask function of the positions inside of it), as transformers composes them from 5.23.

    Both hold for intervals of indices only if the positions of a sequence count up by one. While a graph is traced this
    is not checked: transformers numbers the sequences by where they do not.
    """
    from transformers import masking_utils as made

    remap = getattr(made, "remap_positions_for_packed_sequence", None)
    if remap is None or on_shards():
        return None
    none = torch.zeros(1, 1, device="cpu")
    codes = [getattr(function, "__code__", None) for function in mask_functions]
    if codes != [
        made.packed_sequence_mask_function(none).__code__,
        remap(made.causal_mask_function, none).__code__,
    ]:
        return None
    same, remapped = (inspect.getclosurevars(function).nonlocals for function in mask_functions)
    ids, positions = same["packed_sequence_mask"], remapped["position_ids"]
    sequences = _read_sequences(queries, ids)
    if sequences is None:
        return None
    if _at_hand(positions) and ((positions.diff(dim=-1) != 1) & (ids.diff(dim=-1) == 0)).any():
        return None
    inner = _read(remapped["mask_function"], positions.gather(1, queries.expand(len(positions), -1)))
    if inner is None:
        return None
    shift = queries - positions
    lo, hi = (None if x is None else x + shift for x in (inner.lo, inner.hi))
    return sequences & _Terms(inner.left, inner.right, lo, hi)


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
    return step == 1 and (start is None or start == 0) and (end is None or bool(end >= x.shape[dim]))


def _unsupported(call: str, why: str) -> Unsupported:
    return Unsupported(call, {"every backend": [why]})


def _brief(term: object) -> str:
    return f"{str(term.dtype)[6:]} {list(term.shape)}" if isinstance(term, Tensor) else str(term)
