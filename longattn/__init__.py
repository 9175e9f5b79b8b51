"""Exact long-context attention for PyTorch: one meaning on every backend, memory linear in the sequence length.

Public names load on first use, so `import longattn` does not wait for PyTorch. The operators `torch.ops.longattn` exist
as soon as both longattn and torch are imported, in either order: a program that `torch.export` saved can be loaded.
"""

from __future__ import annotations

import importlib
import importlib.util

from longattn import _with_torch
from longattn._version import __version__

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, without the time that importing typing takes
if TYPE_CHECKING:
    from typing import Any

    import longattn.compat as compat
    import longattn.distributed as distributed
    import longattn.integrations as integrations
    import longattn.models as models
    import longattn.nn as nn
    import longattn.scaling as scaling
    from longattn.cache import KVCache, PagedKVCache, SlidingKVCache, attention_with_cache
    from longattn.errors import CacheFull, InvalidInput, Unsupported
    from longattn.explanation import Explanation
    from longattn.functional import apply_rope, attention, attention_varlen, explain, merge_attention
    from longattn.inspect import AttentionStats, attention_rows, attention_stats
    from longattn.mask import Mask
    from longattn.rope import Rope

    _C: Any  # the extension, where it was built

__all__ = [
    "AttentionStats",
    "CacheFull",
    "Explanation",
    "InvalidInput",
    "KVCache",
    "Mask",
    "PagedKVCache",
    "Rope",
    "SlidingKVCache",
    "Unsupported",
    "__version__",
    "apply_rope",
    "attention",
    "attention_rows",
    "attention_stats",
    "attention_varlen",
    "attention_with_cache",
    "compat",
    "distributed",
    "explain",
    "integrations",
    "merge_attention",
    "models",
    "nn",
    "scaling",
]

# Public names by the module that defines them. The others of __all__ are modules.
_DEFINED_IN = {
    "cache": ("KVCache", "PagedKVCache", "SlidingKVCache", "attention_with_cache"),
    "errors": ("CacheFull", "InvalidInput", "Unsupported"),
    "explanation": ("Explanation",),
    "functional": ("apply_rope", "attention", "attention_varlen", "explain", "merge_attention"),
    "inspect": ("AttentionStats", "attention_rows", "attention_stats"),
    "mask": ("Mask",),
    "rope": ("Rope",),
}
_WITHOUT_TORCH = ("cli", "errors", "files")
_MODULE_OF = {name: module for module, names in _DEFINED_IN.items() for name in names}

if not TYPE_CHECKING:  # a type checker sees the names above, and no others

    def __getattr__(name: str) -> object:
        """Load a public name or a module of the package on first use."""
        module = _MODULE_OF.get(name, name)
        if name.startswith("_") or importlib.util.find_spec(f"longattn.{module}") is None:
            raise AttributeError(f"module 'longattn' has no attribute {name!r}")
        if module not in _WITHOUT_TORCH:
            importlib.import_module("torch")  # and the operators with it, before a module of ours is half imported
        found = importlib.import_module(f"longattn.{module}")
        if name not in _MODULE_OF:
            return found
        globals()[name] = value = getattr(found, name)
        return value

    def __dir__() -> list[str]:
        """Return the names that are loaded, and the public ones that are not yet."""
        return sorted({*globals(), *__all__})


_with_torch.register_operators()
