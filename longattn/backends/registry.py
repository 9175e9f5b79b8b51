"""The backends in order of preference, and the choice of one per call."""

from __future__ import annotations

import warnings

import torch

from longattn.backends.base import Backend
from longattn.backends.cpu import CpuBackend
from longattn.backends.cuda.backend import CudaBackend
from longattn.backends.reference import ReferenceBackend
from longattn.backends.triton.backend import TritonBackend
from longattn.errors import InvalidInput, Unsupported
from longattn.problem import Problem

BACKENDS: tuple[Backend, ...] = (CpuBackend(), CudaBackend(), TritonBackend(), ReferenceBackend())
_BY_NAME = {backend.name: backend for backend in BACKENDS}
_warned: set[str] = set()


def get(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        InvalidInput: there is none of that name.
    """
    if not isinstance(name, str) or name not in _BY_NAME:
        raise InvalidInput("backend", f"'auto' or one of {', '.join(map(repr, _BY_NAME))}", repr(name))
    return _BY_NAME[name]


def reasons(problem: Problem) -> dict[str, list[str]]:
    """Every backend in order of preference, with the reasons why it cannot run the call (none: it can)."""
    return {backend.name: _reasons(backend, problem) for backend in BACKENDS}


def select(problem: Problem, name: str = "auto") -> Backend:
    """The named backend, or for "auto" the first that can run the call.

    Raises:
        Unsupported: the named backend, or every backend, has reasons against the call.
    """
    candidates = BACKENDS if name == "auto" else (get(name),)
    found: dict[str, list[str]] = {}
    for backend in candidates:
        why = _reasons(backend, problem)
        if not why and name == "auto" and (passed := backend.passed_over()) is not None:
            why = [passed]
        if not why:
            slow = backend.name == "reference" and problem.device != "meta"  # on which nothing runs
            if found and slow and not torch.compiler.is_compiling():
                _warn_slow(found)
            return backend
        found[backend.name] = why
    raise Unsupported(str(problem), found)


def _reasons(backend: Backend, problem: Problem) -> list[str]:
    missing = backend.unavailable()
    return [missing] if missing is not None else backend.reasons(problem)


def _warn_slow(found: dict[str, list[str]]) -> None:
    listing = "; ".join(f"{name}: {', '.join(why)}" for name, why in found.items())
    if listing not in _warned:
        _warned.add(listing)
        warnings.warn(f"longattn runs on its slow float64 reference backend ({listing})", RuntimeWarning, stacklevel=4)
