"""PyTorch's operations in a forked child, where the OpenMP threads of the parent are gone and are waited for."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_in_child = False
_own = threading.local()  # `threads`: how many PyTorch had before `on_one_thread` took them


def _enter_child() -> None:
    global _in_child
    _in_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_enter_child)


def num_threads() -> int:
    """Return the number of threads for a kernel of ours, which has threads of its own in a forked child."""
    return (_in_child and getattr(_own, "threads", 0)) or torch.get_num_threads()


def on_one_thread(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Let the operations of PyTorch that `function` calls run on one thread in a forked child."""

    @functools.wraps(function)
    def guarded(*args: _Arguments.args, **keywords: _Arguments.kwargs) -> _Result:
        if not _in_child:
            return function(*args, **keywords)
        threads = torch.get_num_threads()
        if threads == 1:
            return function(*args, **keywords)
        torch.set_num_threads(1)
        _own.threads = threads
        try:
            return function(*args, **keywords)
        finally:
            _own.threads = 0
            torch.set_num_threads(threads)

    return guarded
