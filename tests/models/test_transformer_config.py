"""The shape of a model: defaults, contradictions, and the way through JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from longattn import InvalidInput
from longattn.models import STYLES, TransformerConfig
from longattn.scaling import LongRoPE, YaRN

SMALL: dict[str, Any] = {"dim": 64, "layers": 4, "heads": 4, "max_length": 128}


def test_defaults_follow_from_the_width() -> None:
    config = TransformerConfig(**SMALL)
    assert (config.kv_heads, config.head_dim, config.hidden) == (4, 16, 192)
    assert config.rope is not None and config.rope.dim == 16
    assert TransformerConfig(dim=128, layers=1, heads=2, max_length=8).hidden == 384


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pattern": "SSSL", "window": 32, "sinks": 4, "tie_embeddings": True},
        {"rope_scaling": YaRN(8, 128), "rope_base": 5e5, "kv_heads": 2, "head_dim": 32},
        {"rope_scaling": LongRoPE(4, 128, (1.0,) * 8, (2.0,) * 8)},
        STYLES["bert"],
        STYLES["transformer"],
    ],
)
def test_survives_json(changes: dict[str, Any]) -> None:
    config = TransformerConfig(**SMALL | changes)
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("dim", {"dim": 512, "heads": 6}),
        ("dim", {"dim": 0}),
        ("dim", {"dim": 64.0}),
        ("layers", {"layers": -1}),
        ("vocab_size", {"vocab_size": True}),
        ("max_length", {"max_length": 0}),
        ("kv_heads", {"kv_heads": 3}),
        ("kv_heads", {"kv_heads": 0}),
        ("head_dim", {"head_dim": 7}),
        ("hidden", {"hidden": 0}),
        ("pattern", {"pattern": "SXL", "window": 8}),
        ("pattern", {"pattern": ""}),
        ("pattern", {"pattern": "SSSSL", "window": 8}),
        ("window", {"pattern": "SL"}),
        ("window", {"pattern": "SL", "window": 0}),
        ("window", {"window": 8}),
        ("sinks", {"sinks": 4}),
        ("sinks", {"pattern": "S", "window": 8, "sinks": -1}),
        ("base", {"rope_base": 0.5}),
        ("scaling", {"rope_scaling": "yarn"}),
        ("short_factor", {"rope_scaling": LongRoPE(4, 64, (1.0,) * 3, (2.0,) * 3)}),
        ("norm_eps", {"norm_eps": 0.0}),
        ("tie_embeddings", {"tie_embeddings": 1}),
        ("architecture", {"architecture": "rnn"}),
        ("positions", {"positions": "none"}),
        ("norm", {"norm": "batch"}),
        ("feed_forward", {"feed_forward": "tanh"}),
        ("norm_first", {"norm_first": None}),
        ("encoder_layers", {"encoder_layers": 2}),
        ("encoder_layers", {"architecture": "encoder-decoder", "encoder_layers": 0}),
        ("token_types", {"token_types": 2}),
        ("token_types", {"architecture": "encoder", "token_types": -1}),
        ("rope_scaling", {"positions": "learned", "rope_scaling": YaRN(2, 64)}),
        ("rope_base", {"positions": "sinusoidal", "rope_base": 5e5}),
        ("dim", {"positions": "sinusoidal", "dim": 63, "head_dim": 16}),
        ("dropout", {"dropout": 1.0}),
        ("attention_dropout", {"attention_dropout": -0.1}),
    ],
)
def test_contradictions_name_the_argument(argument: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as error:
        TransformerConfig(**SMALL | changes)
    assert error.value.argument == argument


def test_a_width_that_heads_do_not_divide_may_state_the_head_dim() -> None:
    assert TransformerConfig(dim=512, layers=1, heads=6, head_dim=64, max_length=8).head_dim == 64


@pytest.mark.parametrize("values", [None, {}, {**SMALL, "width": 3}, {"dim": 64}])
def test_descriptions_that_are_none_are_refused(values: Any) -> None:
    with pytest.raises(InvalidInput, match="config"):
        TransformerConfig.from_dict(values)


def test_a_pattern_repeats_over_the_layers() -> None:
    config = TransformerConfig(dim=64, layers=6, heads=4, max_length=128, pattern="SSL", window=8)
    assert [config.is_sliding(layer) for layer in range(6)] == [True, True, False] * 2
    assert not any(replace(config, pattern="L", window=None).is_sliding(layer) for layer in range(6))
