"""longattn inside other libraries' models."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longattn.integrations import huggingface as huggingface

__all__ = ["huggingface"]


def __getattr__(name: str) -> Any:
    """Integrations load on first use."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
