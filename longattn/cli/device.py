"""The option --device."""

from __future__ import annotations

from typing import Any

import click
import torch

from longattn.errors import InvalidInput

__all__ = ["Device"]


class Device(click.ParamType[str]):
    """The name of a device that PyTorch has here, checked before anything is loaded.

    Args:
        computes: refuse devices without data, such as meta.
    """

    name = "device"

    def __init__(self, computes: bool = True) -> None:
        self._computes = computes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            one = torch.ones(1, device=value)
            if self._computes:
                float(one)
        except Exception as error:  # what a build of PyTorch without that device raises differs between devices
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InvalidInput("--device", "a device that PyTorch has here", f"{value}: {reason}") from error
        return str(value)
