"""What a method that extends the context changes in a Hugging Face model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from longattn.errors import InvalidInput
from longattn.extension import BaseChange, LearnedPositions, Method, Remapping, StreamingLLM, check_layer_methods
from longattn.integrations.huggingface.methods import KEY, listed_methods, turning_on
from longattn.integrations.huggingface.registration import NAME
from longattn.integrations.huggingface.rotation import longest_position, rope_parameters, without_ntk
from longattn.models import check_sense, with_method
from longattn.rope import Rope
from longattn.scaling import Proportional, Scaling

__all__ = ["extend"]

_FULL = "full_attention"  # the layer type whose rotation reaches far
_TABLES = {"gpt2": "wpe", "bert": "position_embeddings"}


def extend(model: nn.Module, method: Scaling | Method) -> Any:
    """`longattn.integrations.extend` of a Hugging Face model."""
    config: Any = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation != NAME:
        raise InvalidInput("model", f"one of longattn.models, or one with attn_implementation={NAME!r}", implementation)
    shared = {id(weight): weight for weight in model.parameters()}
    extended: Any = copy.deepcopy(model, shared)
    text = extended.config.get_text_config()
    if isinstance(method, (Scaling, BaseChange)):
        _rotate_otherwise(extended, text, method)
    elif isinstance(method, LearnedPositions):
        _interpolate(extended, text, method)
    elif isinstance(method, Method):
        _list(extended, text, method)
    else:
        raise InvalidInput("method", "a longattn.scaling.Scaling or a longattn.extension.Method", method)
    problem = _problem_of_saving(extended.config)
    if problem is not None and _problem_of_saving(config) is None:
        expected = f"a method that {type(config).__name__} saves and loads"
        raise InvalidInput("method", expected, f"{method}: {type(problem).__name__}: {problem}") from problem
    text = config.get_text_config()
    trained = getattr(text, "max_position_embeddings", None)
    if isinstance(trained, int):
        check_sense(trained, _scaling(text), method)
    return extended


def _problem_of_saving(config: Any) -> Exception | None:
    """Return what a config's class has against saving or loading it."""
    try:
        if hasattr(config, "validate"):
            config.validate()
        type(config).from_dict(config.to_dict())
    except Exception as error:  # each class has checks of its own
        return error
    return None


def _scaling(config: Any) -> Scaling | None:
    """Return the scaling of a model's rotation, where it has one that a Rope can say."""
    parameters = getattr(config, "rope_parameters", None)
    by_layer = isinstance(parameters, Mapping) and any(isinstance(value, Mapping) for value in parameters.values())
    try:
        return Rope.from_hf(config, _FULL if by_layer else None).scaling
    except (InvalidInput, AttributeError):
        return None


def _rotate_otherwise(model: nn.Module, config: Any, method: Scaling | BaseChange) -> None:
    """Write other rope_parameters, and have every rotation of the model made anew."""
    old = getattr(config, "rope_parameters", None)
    if not isinstance(old, Mapping):
        raise InvalidInput("model", f"one with rotary positions (rope_parameters), for {method}", type(model).__name__)
    by_layer = any(isinstance(value, Mapping) for value in old.values())
    if by_layer and _FULL not in old:
        raise InvalidInput("model", f"rope_parameters of {_FULL}, for {method}", sorted(old))
    rope = Rope.from_hf(config, _FULL if by_layer else None)
    if isinstance(method, BaseChange):
        wanted = Rope(rope.dim, method.base, rope.scaling, rope.interleaved)
    else:
        wanted = Rope(rope.dim, rope.base, method, rope.interleaved)
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        raise InvalidInput("model", f"one whose config has max_position_embeddings, for {method}", type(model).__name__)
    new = rope_parameters(wanted, longest)
    config.max_position_embeddings = longest_position(wanted.scaling, longest)
    part = (old[_FULL] if by_layer else old).get("partial_rotary_factor")
    if part is not None and not isinstance(wanted.scaling, Proportional):
        new["partial_rotary_factor"] = part
    config.rope_parameters = {**old, _FULL: new} if by_layer else new
    if Rope.from_hf(config, _FULL if by_layer else None) != without_ntk(wanted):
        raise InvalidInput("model", f"one whose config can say {method}", type(model).__name__)
    if any(_turns(other) for other in listed_methods(config)):
        turning_on(config, _FULL if by_layer else None)
    found = [(parent, name) for parent in model.modules() for name, child in parent.named_children() if _rotates(child)]
    if not found:
        raise InvalidInput("model", "one whose rotation is a module of its own (inv_freq)", type(model).__name__)
    for parent, name in found:
        module: Any = getattr(parent, name)
        device = next(module.buffers()).device
        setattr(parent, name, type(module)(config=module.config).to(device))


def _rotates(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return hasattr(module, "config") and any(name.endswith("inv_freq") for name in names)


def _interpolate(model: nn.Module, config: Any, method: LearnedPositions) -> None:
    name = _TABLES.get(config.model_type)
    if name is None:
        expected = f"one with learned positions ({', '.join(_TABLES)}), for {method}"
        raise InvalidInput("model", expected, config.model_type)
    config.max_position_embeddings = length = method.length(config.max_position_embeddings)
    for module in model.modules():
        table = getattr(module, name, None)
        if not isinstance(table, nn.Embedding):
            continue
        weight = nn.Parameter(method.interpolated(table.weight.detach()), table.weight.requires_grad)
        setattr(module, name, nn.Embedding(length, weight.shape[1], _weight=weight))
        if "position_ids" in dict(module.named_buffers(recurse=False)):
            device = weight.device
            module.position_ids = nn.Buffer(torch.arange(length, device=device)[None], persistent=False)
            module.token_type_ids = nn.Buffer(torch.zeros_like(module.position_ids), persistent=False)


def _list(model: nn.Module, config: Any, method: Method) -> None:
    """Add to the methods that layers read in the config."""
    if any(getattr(module, "is_causal", None) is False for module in model.modules()):
        raise InvalidInput("model", f"causal layers, for {method}", type(model).__name__)
    if getattr(method, "sinks", 0) and _has_windows(config):
        raise InvalidInput(
            "model", f"no layers with windows, whose caches forget the sinks of {method}", config.model_type
        )
    methods = with_method(listed_methods(config), method)
    if _turns(method):
        parameters = getattr(config, "rope_parameters", None)
        if not isinstance(parameters, Mapping):
            raise InvalidInput("model", f"one with rotary positions, for {method}", type(model).__name__)
        by_layer = any(isinstance(value, Mapping) for value in parameters.values())
        rope = turning_on(config, _FULL if by_layer else None)
        check_layer_methods([other for other in methods if isinstance(other, Remapping)], rope)
    setattr(config, KEY, [other.to_dict() for other in methods])


def _turns(method: Method) -> bool:
    """Return whether layers rotate vectors again under a method, because they want them at other positions."""
    return isinstance(method, (Remapping, StreamingLLM)) or "N" in getattr(method, "pattern", "")


def _has_windows(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    return any("full" not in kind for kind in kinds) if kinds else getattr(config, "sliding_window", None) is not None
