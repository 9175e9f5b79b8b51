"""Swapping the attention of a model that was built with torch.nn.MultiheadAttention."""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from torch.nn import Module

from longattn.arguments import Window
from longattn.errors import InvalidInput
from longattn.nn.multihead import MultiheadAttention, check_options
from longattn.rope import Rope

M = TypeVar("M", bound=Module)


def replace_attention(
    model: M,
    need_weights: bool | None = None,
    *,
    window: Window = None,
    sinks: int = 0,
    rope: Rope | None = None,
) -> M:
    """Turn every torch.nn.MultiheadAttention of a model into `longattn.nn.MultiheadAttention`, in place.

    The modules stay the objects they were: parameters, dtype, device, training mode, hooks and every reference to them
    remain, and optimizers and state_dicts notice nothing. torch.nn.TransformerEncoder stops making nested tensors.
    Modules that already are longattn's keep their options, so parts of a model can be given different ones:

        replace_attention(model.encoder, window=512)
        replace_attention(model)

    Subclasses of torch.nn.MultiheadAttention and instances with a forward of their own are left alone, with a warning.
    Replace before wrapping the model in FSDP or parametrizations, which make such subclasses.

    Args:
        model: any module; a torch.nn.MultiheadAttention itself will do.
        need_weights: False: calls that do not pass need_weights return None in place of the weights, in linear memory.
            None, the default, and True: they return a dense matrix, as PyTorch's do. A warning names each module that
            stays dense: one that is not replaced, and at its first such call one whose caller does not pass
            need_weights=False.
        window, sinks, rope: given to every module replaced, see `longattn.nn.MultiheadAttention`.

    Returns:
        The model.

    Raises:
        InvalidInput: no module, need_weights of another type, or options that do not fit one of its modules; then none
            is replaced.
    """
    if not isinstance(model, torch.nn.Module):
        raise InvalidInput("model", "a torch.nn.Module", type(model).__name__)
    if need_weights is not None and not isinstance(need_weights, bool):
        raise InvalidInput("need_weights", "a bool or None", repr(need_weights))
    replaced: list[tuple[str, torch.nn.MultiheadAttention]] = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.MultiheadAttention):
            continue
        name = name or "the model"
        if isinstance(module, MultiheadAttention):
            if need_weights is False and module.weights_by_default:
                text = (
                    f"{name} is longattn's already, keeps its options and stays dense where need_weights is not passed"
                )
                warnings.warn(text, stacklevel=2)
            continue
        if type(module) is torch.nn.MultiheadAttention and "forward" not in vars(module):
            check_options(module, window, sinks, rope)
            replaced.append((name, module))
        else:
            text = f"{name} ({type(module).__qualname__}) has a forward of its own, is not replaced and stays dense"
            warnings.warn(text, stacklevel=2)
    for name, module in replaced:
        # A new object would lose hooks, weight tying, and references that are no child modules.
        module.__class__ = MultiheadAttention
        assert isinstance(module, MultiheadAttention)
        module._set_options(window, sinks, rope)
        module.weights_by_default = need_weights is not False
        module._warns_as = None if need_weights else name
    for module in model.modules():
        if isinstance(module, torch.nn.TransformerEncoder):
            if any(isinstance(child, MultiheadAttention) for child in module.modules()):
                module.use_nested_tensor = False
    return model
