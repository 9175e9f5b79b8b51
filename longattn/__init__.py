"""Exact long-context attention for PyTorch: one meaning on every backend, memory linear in the sequence length."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from longattn import scaling
from longattn._version import __version__
from longattn.cache import KVCache, PagedKVCache, SlidingKVCache, attention_with_cache
from longattn.errors import CacheFull, InvalidInput, Unsupported
from longattn.explanation import Explanation
from longattn.functional import apply_rope, attention, attention_varlen, explain, merge_attention
from longattn.inspect import AttentionStats, attention_rows, attention_stats
from longattn.mask import Mask
from longattn.rope import Rope

if TYPE_CHECKING:
    import longattn.compat as compat
    import longattn.distributed as distributed
    import longattn.integrations as integrations
    import longattn.models as models
    import longattn.nn as nn

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

_SUBPACKAGES = ("compat", "distributed", "integrations", "models", "nn")


def __getattr__(name: str) -> Any:
    """Subpackages load on first use."""
    if name in _SUBPACKAGES:
        return importlib.import_module(f"longattn.{name}")
    raise AttributeError(f"module 'longattn' has no attribute {name!r}")
