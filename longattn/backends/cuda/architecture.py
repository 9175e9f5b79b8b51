"""Which GPUs the kernels run on, and on which of them `gpu-check` has proven them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

# Architectures ("sm_90") where every GPU test passed and the kernels beat Triton's, with the kernels' release. Read as
# this is loaded: torch.compile could not trace it.
PROVEN: dict[str, str] = json.loads(Path(__file__).with_name("proven.json").read_text(encoding="utf-8"))
_CAPABILITY = (9, 0)  # sm_90a: its instructions run on no other


def fault() -> str | None:
    """Why the kernels cannot run on the current GPU, or None."""
    return _fault(torch.cuda.current_device())


def is_proven() -> bool:
    """Whether `backend="auto"` may choose them on the current GPU."""
    return _is_proven(torch.cuda.current_device())


@functools.cache
def _fault(device: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or (major, minor) != _CAPABILITY:
        return f"needs compute capability 9.0, and {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return None


@functools.cache
def _is_proven(device: int) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" in PROVEN
