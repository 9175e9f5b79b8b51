"""What a method that extends the context changes in one of our models."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from longattn.errors import InvalidInput
from longattn.extension import (
    BaseChange,
    DualChunk,
    LayerPattern,
    LearnedPositions,
    LogN,
    Method,
    Remapping,
    SelfExtend,
    ShiftedGroups,
    StreamingLLM,
)
from longattn.models.build import build
from longattn.models.config import SLIDING, TransformerConfig
from longattn.models.decoder import Decoder
from longattn.models.encoder import Encoder
from longattn.models.encoder_decoder import EncoderDecoder
from longattn.models.projection import share_head
from longattn.scaling import NTK, DynamicNTK, Linear, Llama3, LongRoPE, Scaling, YaRN

__all__ = ["check_sense", "extend", "extended_config", "with_method"]

_KINDS: tuple[tuple[type[Method], ...], ...] = (
    (LogN,),
    (ShiftedGroups,),
    (Remapping,),
    (StreamingLLM, LayerPattern),
)


def extend(model: Decoder | Encoder | EncoderDecoder, method: Scaling | Method) -> Any:
    """A model of the same class over these very weights (not copies) that reads further.

    Learned positions alone are new weights.

    Warns:
        UserWarning: the method replaces a scaling of the model, or the model reads less far with it.

    Raises:
        InvalidInput: a model that has no use for the method, or one with a head: extend its encoder.
    """
    if not isinstance(model, (Decoder, Encoder, EncoderDecoder)):
        raise InvalidInput("model", "a Decoder, Encoder or EncoderDecoder", type(model).__name__)
    config = extended_config(model.config, method)
    check_sense(model.config.max_length, model.config.rope_scaling, method)
    with torch.device("meta"):
        extended = build(config)
    state = model.state_dict(keep_vars=True)
    if isinstance(method, LearnedPositions):
        for name, table in state.items():
            if name.endswith("position_embedding.weight"):
                state[name] = nn.Parameter(method.interpolated(table.detach()))
    share_head(model, extended)
    extended.load_state_dict(state, assign=True)
    return extended.train(model.training)


def extended_config(config: TransformerConfig, method: Scaling | Method) -> TransformerConfig:
    """The config of a model that a method extends.

    Raises:
        InvalidInput: as `extend`.
    """
    if isinstance(method, (Scaling, BaseChange, Remapping, StreamingLLM)) and config.positions != "rope":
        raise InvalidInput("model", f"one with rotary positions, for {method}", f"positions {config.positions!r}")
    match method:
        case Scaling():
            return replace(config, rope_scaling=method)
        case BaseChange():
            return replace(config, rope_base=method.base)
        case StreamingLLM():
            return replace(config, pattern=SLIDING, window=method.window, sinks=method.sinks, window_positions="cache")
        case LayerPattern():
            return replace(
                config,
                pattern=method.pattern,
                window=method.window,
                sinks=method.sinks,
                window_positions="original",
            )
        case LearnedPositions():
            if config.positions != "learned":
                got = f"positions {config.positions!r}"
                raise InvalidInput("model", f"one with learned positions, for {method}", got)
            return replace(config, max_length=method.length(config.max_length))
        case LogN() | ShiftedGroups() | Remapping():
            return replace(config, methods=with_method(config.methods, method))
    raise InvalidInput("method", "a longattn.scaling.Scaling or a longattn.extension.Method", method)


def check_sense(trained: int, scaling: Scaling | None, method: Scaling | Method) -> None:
    """Refuse a method whose sizes make no sense for a model, and warn where it takes something away.

    Args:
        trained: the length that the model was trained at. scaling: the one that it has.

    Warns:
        UserWarning: as `extend`.

    Raises:
        InvalidInput: a window or distance that is not below the length that the model reads, or a group of one.
    """
    limit = max(trained, _reach(trained, scaling))
    if isinstance(method, Scaling):
        if scaling is not None and scaling != method:
            warnings.warn(f"{method} replaces {scaling}, which the model had", stacklevel=4)
        reach = _reach(trained, method)
        if reach < limit:
            known = f"{limit:,.0f} tokens, trained or scaled to" if limit < math.inf else f"any length, by {scaling}"
            warnings.warn(f"the model reads about {reach:,.0f} tokens with {method}, before {known}", stacklevel=4)
        return
    expected = f"less than the {limit:,.0f} tokens that the model reads"
    if isinstance(method, (SelfExtend, StreamingLLM, LayerPattern)) and (method.window or 0) >= limit:
        raise InvalidInput("window", expected, method.window)
    if isinstance(method, StreamingLLM) and method.window + method.sinks > limit:
        raise InvalidInput("sinks", f"with the window at most the {limit:,.0f} tokens that the model reads", method)
    if isinstance(method, DualChunk) and method.longest >= limit:
        raise InvalidInput("longest", expected, method.longest)
    if isinstance(method, SelfExtend) and method.group == 1:
        raise InvalidInput("group", "an int >= 2, as a group of one token leaves all positions as they are", 1)


def _reach(trained: int, scaling: Scaling | None) -> float:
    """Return the tokens that a scaling is for."""
    match scaling:
        case DynamicNTK():
            return math.inf
        case YaRN() | LongRoPE() | Llama3():
            return scaling.factor * scaling.original_max_position
        case Linear() | NTK():
            return scaling.factor * trained
    return trained


def with_method(methods: tuple[Method, ...], method: Method) -> tuple[Method, ...]:
    """These and one more, in place of what it excludes: of each kind there is one."""
    kind = next(kind for kind in _KINDS if isinstance(method, kind))
    return (*(other for other in methods if not isinstance(other, kind)), method)
