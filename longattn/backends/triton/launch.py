"""Starting a kernel in a few microseconds: Triton's own launch looks at every argument anew, this one remembers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MOST = 4096  # signatures to remember
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Start `programs` programs of a kernel on the current device; the one place where that happens.

    Args:
        arguments: tensors, numbers, None, descriptors, and named tuples of them, in the kernel's order.
        constants: its constexprs, and options of Triton such as num_warps.
    """
    if not programs:
        return
    if not hasattr(kernel, "device_caches"):  # the interpreter's
        kernel[(programs,)](*arguments, **constants)
        return
    signature: list[Any] = [id(kernel), torch.cuda.current_device(), *constants.values()]
    _describe(arguments, signature)
    key = tuple(signature)
    known = _compiled.get(key)
    if known is None:
        if len(_compiled) >= _MOST:
            _compiled.clear()
        compiled = kernel[(programs,)](*arguments, **constants)
        _compiled[key] = compiled, tuple([constants[name] for name in kernel.arg_names[len(arguments) :]])
        return
    compiled, rest = known
    compiled[(programs, 1, 1)](*arguments, *rest)


def _describe(arguments: tuple[Any, ...], signature: list[Any]) -> None:
    """Append all that Triton may specialise code for. Numbers stand for themselves: they repeat from call to call."""
    for x in arguments:
        kind = type(x)
        if x is None or kind is int or kind is float:
            signature.append(x)
        elif isinstance(x, tuple):
            _describe(x, signature)
        elif isinstance(x, Tensor):
            signature += (x.dtype, x.data_ptr() & 15)
        else:  # a descriptor
            signature += (x.base.dtype, *x.block_shape)
