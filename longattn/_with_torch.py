"""Registers the operators `torch.ops.longattn` when torch is imported, without importing it."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

_OPERATORS = "longattn.functional"


def register_operators() -> None:
    """Register the operators: now if torch is imported, otherwise at the end of its import."""
    if "torch" in sys.modules:
        importlib.import_module(_OPERATORS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds torch where the import system finds it, and gives it a loader that registers the operators."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Runs torch's source as ever, then registers the operators."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        if _is_half_imported():
            return  # such as `import longattn.rope` in a process without torch: the operators come with the first call
        try:
            importlib.import_module(_OPERATORS)
        except Exception:  # not torch's fault: `import torch` succeeds, and the first use of longattn raises it again
            pass


def _is_half_imported() -> bool:
    """Return whether a module of longattn is what imports torch, so that others could not import names from it yet."""
    ours = [module for name, module in list(sys.modules.items()) if name.startswith("longattn.")]
    return any(getattr(module.__spec__, "_initializing", False) for module in ours)
