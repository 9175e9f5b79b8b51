"""longattn inside other libraries' models, and one function that extends the context of all of them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longattn.integrations import huggingface as huggingface
    from longattn.integrations.extending import extend as extend

__all__ = ["extend", "huggingface"]


def __getattr__(name: str) -> Any:
    """Integrations load on first use."""
    if name == "extend":
        return importlib.import_module(f"{__name__}.extending").extend
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
