"""torch.fx: a symbolic trace keeps our modules and functions as single nodes, as it keeps those of torch.nn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import nn
from torch.fx import Proxy
from torch.overrides import has_torch_function

P = ParamSpec("P")
R = TypeVar("R")
Forward = TypeVar("Forward", bound=Callable[..., Any])


def node(function: Callable[..., Any], args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """Return the proxy of a node that calls the function, or None where no argument is a proxy."""
    proxy = _proxy(args, keywords)
    if proxy is None:
        return None
    return proxy.tracer.create_proxy("call_function", function, args, dict(keywords))


def leaf(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that torch.fx records a call of it as one node."""

    @wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        traced = node(call, args, keywords)
        return function(*args, **keywords) if traced is None else traced

    return call


def leaf_module(forward: Forward) -> Forward:
    """Decorate a module's forward so that torch.fx records a call of the module as one node."""

    @wraps(forward)
    def call(module: nn.Module, *args: Any, **keywords: Any) -> Any:
        if has_torch_function((*args, *keywords.values())):
            traced = module_node(module, args, keywords)
            if traced is not None:
                return traced
        return forward(module, *args, **keywords)

    return cast(Forward, call)


def module_node(module: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """Return the proxy of a node that calls the module.

    None where no argument is a proxy, and for the root of a trace, of which a graph cannot have a node: it is traced
    through.
    """
    proxy = _proxy(args, keywords)
    if proxy is None or module is proxy.tracer.root:
        return None
    return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(module), args, dict(keywords))


def _proxy(args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """The first argument that stands for a value of a trace; those in tuples and lists count, too."""
    if torch.compiler.is_compiling():
        return None
    for value in (*args, *keywords.values()):
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, Proxy):
                return x
    return None
