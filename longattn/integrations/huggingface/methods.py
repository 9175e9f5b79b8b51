"""What `config.longattn` says of a Hugging Face model's layers, and attention under it.

These models turn queries and keys before they call attention, each by its place; rotations add up, so a part that wants
them elsewhere turns them on by the difference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from longattn.errors import InvalidInput, Unsupported
from longattn.extension import (
    LayerPattern,
    LogN,
    Method,
    Part,
    Places,
    Remapping,
    ShiftedGroups,
    StreamingLLM,
    attend_in_parts,
    attend_in_shifted_groups,
    window_parts,
)
from longattn.functional import attention
from longattn.redirection import refuse_elsewhere
from longattn.rope import Rope
from longattn.scaling import YaRN

__all__ = ["KEY", "attend", "listed_methods", "methods_of", "turning_on"]

KEY = "longattn"  # the entry of a config: a list of methods as dictionaries

_ropes: WeakKeyDictionary[nn.Module, Rope] = WeakKeyDictionary()  # what turns a layer's vectors on


def listed_methods(config: Any) -> tuple[Method, ...]:
    """The methods that a config lists.

    Raises:
        InvalidInput: an entry that is no method.
    """
    listed = getattr(config, KEY, None)
    if not listed:
        return ()
    if not isinstance(listed, (list, tuple)):
        raise InvalidInput(f"config.{KEY}", "a list of methods", repr(listed))
    try:
        return _read(json.dumps(listed))
    except (TypeError, RecursionError) as error:
        raise InvalidInput(f"config.{KEY}", "a list of methods", f"{type(error).__name__}: {error}") from error


def methods_of(module: nn.Module) -> tuple[Method, ...]:
    """Those of a layer's model."""
    return listed_methods(getattr(module, "config", None))


@lru_cache(maxsize=64)
def _read(listed: str) -> tuple[Method, ...]:
    return tuple(Method.read(values) for values in json.loads(listed))


def attend(
    module: nn.Module,
    methods: Sequence[Method],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor | None,
    call: dict[str, Any],
) -> Tensor:
    """Attention of a causal layer under its model's methods: query [B, Hq, Nq, D] to [B, Hq, Nq, Dv].

    Args:
        start: int [1 or B, 1 or Nq], the index among the keys at which each query's own sequence starts, below 0 where
            a sliding cache has forgotten that token; None: 0.
        call: the keywords of `longattn.attention` that the model and its mask ask for.

    Raises:
        InvalidInput: a layer that is not causal. Unsupported: a mask that the methods cannot be joined with.
    """
    refuse_elsewhere("a method of config.longattn")
    places, window = _places(module, query, key, start, call)
    bounds = call.get("bounds")
    by_kind = {type(method): method for method in methods}
    log_n = by_kind.get(LogN)
    if isinstance(log_n, LogN):
        query = log_n.scaled(query, places.in_sequence)
    groups = by_kind.get(ShiftedGroups)
    parts = _parts(module, methods, places, window)
    rest = {name: call[name] for name in _OF_SCORES if name in call}
    if isinstance(groups, ShiftedGroups) and module.training and window is None and parts is None:
        first_seen = None if bounds is None else bounds[0]
        return attend_in_shifted_groups(
            query, key, value, places, groups.group, first_seen=first_seen, rope=None, standing=None, **rest
        )
    if parts is None:
        out = attention(query, key, value, **call)
        assert isinstance(out, Tensor)
        return out
    stand = places.in_sequence, places.keys
    rope = None
    if any(part.positions is not None for part in parts):
        rope = _turning_on(module)
    bounded = [_within(part, places, window, bounds, stand) for part in parts]
    return attend_in_parts(query, key, value, bounded, rope=rope, standing=None, **rest)


_OF_SCORES = ("scale", "softcap", "sink_logits", "dropout_p", "key_mask")


def _parts(module: nn.Module, methods: Sequence[Method], places: Places, window: int | None) -> list[Part] | None:
    """What a layer sees where a method says so; None: what it sees anyway."""
    letter = "L"
    for method in methods:
        if isinstance(method, StreamingLLM):
            return window_parts(places, method.window, method.sinks, at_cache=True)
        if isinstance(method, LayerPattern):
            letter = method.letter(_layer(module))
            if letter == "S":
                return window_parts(places, method.window, method.sinks, at_cache=False)
    if letter == "N":
        still = torch.zeros_like(places.in_sequence), torch.zeros_like(places.keys)
        return [Part(places.starts, places.queries + 1, still)]
    remapping = next((method for method in methods if isinstance(method, Remapping)), None)
    return None if remapping is None or window is not None else remapping.parts(places)


def _within(
    part: Part,
    places: Places,
    window: int | None,
    bounds: tuple[Tensor, Tensor] | None,
    stand: tuple[Tensor, Tensor],
) -> Part:
    """A part within what the layer's own mask shows, with the turns that are missing in place of positions."""
    lo = part.lo if window is None else part.lo.maximum(places.queries - window + 1)
    hi = part.hi
    if bounds is not None:
        lo, hi = lo.maximum(bounds[0]), hi.minimum(bounds[1])
    if part.positions is None:
        return Part(lo, hi)
    wanted_q, wanted_k = part.positions
    return Part(lo, hi, (wanted_q - stand[0], wanted_k - stand[1]))


def _places(
    module: nn.Module, query: Tensor, key: Tensor, start: Tensor | None, call: dict[str, Any]
) -> tuple[Places, int | None]:
    """Return where tokens are, and the layer's own window."""
    nq, nk, device = query.shape[2], key.shape[2], query.device
    if call.get("bias") is not None:
        raise Unsupported("a dense mask or bias", {"every backend": ["methods of config.longattn need a causal layer"]})
    left, right = call.get("window") or (-1, -1)
    if not (call.get("causal") or right == 0 or nq == 1) or not getattr(module, "is_causal", True):
        raise InvalidInput("model", f"causal layers, for the methods of config.{KEY}", type(module).__name__)
    align = call.get("align", "end")
    offset = align[:, None] if isinstance(align, Tensor) else {"end": nk - nq, "start": 0}[align]
    queries = torch.arange(nq, device=device) + offset
    keys = torch.arange(nk, device=device)
    window = None if left == -1 else left + 1
    if start is None:
        return Places(queries, torch.zeros_like(queries), keys), window
    queries, starts = torch.broadcast_tensors(queries, start.to(device, torch.int64))
    if start.shape[-1] == 1:
        return Places(queries, starts, keys - start), window
    if nq != nk:
        raise Unsupported("packed sequences", {"every backend": ["methods cannot be joined with a cache of them"]})
    return Places(queries, starts, keys - starts), window


def _layer(module: nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise InvalidInput("model", "layers that know their number (layer_idx)", type(module).__name__)
    return int(layer)


def _turning_on(module: nn.Module) -> Rope:
    if module not in _ropes:
        config: Any = module.config
        kinds = getattr(config, "layer_types", None)
        _ropes[module] = turning_on(config, kinds[_layer(module)] if kinds else None)
    return _ropes[module]


def turning_on(config: Any, layer_type: str | None = None) -> Rope:
    """The model's rotation without its attention_factor, which its vectors have already.

    Raises:
        InvalidInput: no rotary positions, or such as cannot be turned on: frequencies that depend on the length, or
            interleaved pairs, which some models put in another order.
    """
    rope = Rope.from_hf(config, layer_type)
    if rope.interleaved or rope.depends_on_length:
        raise InvalidInput("model", "a rotation in halves whose frequencies are fixed", rope)
    scaling = rope.scaling
    if isinstance(scaling, YaRN):  # the only one of those left that has a factor
        scaling = replace(scaling, attention_factor=1.0)
    return Rope(rope.dim, rope.base, scaling)
