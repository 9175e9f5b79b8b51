"""What a method that extends the context changes in one of our models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from longattn.errors import InvalidInput
from longattn.extension import (
    BaseChange,
    LayerPattern,
    LearnedPositions,
    LogN,
    Method,
    Remapping,
    ShiftedGroups,
    StreamingLLM,
)
from longattn.models.build import build
from longattn.models.config import SLIDING, TransformerConfig
from longattn.models.decoder import Decoder
from longattn.models.encoder import Encoder
from longattn.models.encoder_decoder import EncoderDecoder
from longattn.scaling import Scaling

__all__ = ["extend", "extended_config", "with_method"]

_KINDS: tuple[tuple[type[Method], ...], ...] = (
    (LogN,),
    (ShiftedGroups,),
    (Remapping,),
    (StreamingLLM, LayerPattern),
)


def extend(model: Decoder | Encoder | EncoderDecoder, method: Scaling | Method) -> Any:
    """A model of the same class over these very weights (not copies) that reads further.

    Learned positions alone are new weights.

    Raises:
        InvalidInput: a model that has no use for the method, or one with a head: extend its encoder.
    """
    if not isinstance(model, (Decoder, Encoder, EncoderDecoder)):
        raise InvalidInput("model", "a Decoder, Encoder or EncoderDecoder", type(model).__name__)
    config = extended_config(model.config, method)
    with torch.device("meta"):
        extended = build(config)
    state = model.state_dict(keep_vars=True)
    if isinstance(method, LearnedPositions):
        for name, table in state.items():
            if name.endswith("position_embedding.weight"):
                state[name] = nn.Parameter(method.interpolated(table.detach()))
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


def with_method(methods: tuple[Method, ...], method: Method) -> tuple[Method, ...]:
    """These and one more, in place of what it excludes: of each kind there is one."""
    kind = next(kind for kind in _KINDS if isinstance(method, kind))
    return (*(other for other in methods if not isinstance(other, kind)), method)
