"""The architecture: who may import whom, read off the syntax tree of every file of the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "longattn"

# Highest first. A unit is a module, or a package with all that is in it; it may import units of the rows below its own,
# never its neighbours. longattn/__init__.py and __main__.py may import everything, and nothing imports them.
LAYERS = (
    ("cli",),
    ("bench",),
    ("training", "evaluation"),
    ("integrations", "compat"),
    ("models",),
    ("nn", "distributed"),
    ("extension",),
    ("cache",),
    ("functional", "inspect"),
    ("arguments", "explanation", "redirection"),
    ("ops",),
    ("operands",),
    ("backends.registry", "batching", "dtensors", "flops", "onnx_export"),
    ("backends.cpu", "backends.cuda", "backends.triton", "backends.reference"),
    ("backends.eager_cache",),
    ("backends.eager",),
    ("backends.base", "backends.angles", "backends.philox"),
    ("problem",),
    ("mask", "rope"),
    ("scaling",),
    ("files",),
    ("errors", "forked", "tracing", "_build_info", "_interrupt", "_version", "_with_torch", "_C"),
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
FACADES = ("longattn", "longattn.__main__")

# Loaded on first use, inside a function; only the command line and the kernels may import their own toolkits outright.
HEAVY = {"click", "gguf", "matplotlib", "peft", "rich", "sacrebleu", "safetensors", "sklearn", "tokenizers", "tqdm"}
HEAVY |= {"transformers", "triton"}
OPENLY = {"cli": {"click", "rich"}, "backends.triton": {"triton"}}

# torch.library has one user, so that schemas, fakes and autograd stand in one place.
USER_OF_TORCH_LIBRARY = "ops"


def unit_of(module: str) -> str | None:
    """The unit of a dotted name: "backends.base" of "longattn.backends.base.Backend", None of "longattn.attention"."""
    parts = module.split(".")[1:]
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in LEVEL), None)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(node: ast.AST, package: str) -> Iterator[str]:
    """The absolute dotted names that an import statement in ``package`` asks for."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that importing the module runs: no function's body, nothing under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from run_at_import(child)


def violations(source: str, module: str, package: str) -> list[str]:
    """What the source of ``module``, which resolves relative imports in ``package``, does against the tables above."""
    tree = ast.parse(source)
    unit = unit_of(module)
    found = []

    if module not in FACADES:
        for node in ast.walk(tree):
            for name in imported(node, package):
                if name.split(".")[0] != "longattn":
                    continue
                target = unit_of(name)
                if unit is None:
                    found.append(f"line {node.lineno}: {module} has no layer, and imports {name}")
                elif target is None:
                    found.append(f"line {node.lineno}: {name} is in no layer")
                elif target != unit and LEVEL[target] <= LEVEL[unit]:
                    found.append(f"line {node.lineno}: {unit} stands no higher than {target}, and imports {name}")

    allowed = OPENLY.get(unit or "", OPENLY.get((unit or "").split(".")[0], set()))
    for node in run_at_import(tree):
        for name in imported(node, package):
            if name.split(".")[0] in HEAVY - allowed:
                found.append(f"line {node.lineno}: {name} is loaded as soon as {module} is")

    if unit != USER_OF_TORCH_LIBRARY:
        for node in ast.walk(tree):
            names = [ast.unparse(node)] if isinstance(node, ast.Attribute) else imported(node, package)
            if any(name == "torch.library" or name.startswith("torch.library.") for name in names):
                found.append(f"line {node.lineno}: {module} uses torch.library")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_point_down(path: Path) -> None:
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    assert violations(path.read_text(encoding="utf-8"), module, package) == []


def test_every_module_has_a_layer() -> None:
    packages = {module_name(path) for path in FILES if path.name == "__init__.py"}
    modules = {module_name(path) for path in FILES}
    homeless = {module for module in modules - packages if module not in FACADES and unit_of(module) is None}
    assert homeless == set()


@pytest.mark.parametrize(
    ("source", "module", "package"),
    [
        ("from longattn.functional import attention", "longattn.ops", "longattn"),
        ("from longattn import functional", "longattn.ops", "longattn"),
        ("from . import functional", "longattn.ops", "longattn"),
        ("from ..ops import forward", "longattn.backends.cpu", "longattn.backends"),
        ("def f():\n    import longattn.ops", "longattn.backends.cpu", "longattn.backends"),
        ("from longattn.backends.reference import x", "longattn.backends.cpu", "longattn.backends"),
        ("from longattn import attention", "longattn.models.decoder", "longattn.models"),
        ("import longattn", "longattn.models.decoder", "longattn.models"),
        ("try:\n    import tqdm\nexcept ImportError:\n    tqdm = None", "longattn.training.loop", "longattn.training"),
        ("from rich.table import Table", "longattn.ops", "longattn"),
        ("import torch.library", "longattn.functional", "longattn"),
        ("from torch import library", "longattn.functional", "longattn"),
        ("import torch\ntorch.library.Library('a', 'DEF')", "longattn.functional", "longattn"),
        ("import longattn.mask", "longattn.unheard_of", "longattn"),
    ],
)
def test_a_violation_is_seen(source: str, module: str, package: str) -> None:
    assert len(violations(source, module, package)) >= 1


@pytest.mark.parametrize(
    ("source", "module", "package"),
    [
        ("from longattn.backends import registry", "longattn.ops", "longattn"),
        ("from .base import Backend\nfrom ..problem import Problem", "longattn.backends.cpu", "longattn.backends"),
        ("from longattn.models.config import Config", "longattn.models.decoder", "longattn.models"),
        ("def f():\n    import safetensors.torch", "longattn.training.checkpoint", "longattn.training"),
        ("if TYPE_CHECKING:\n    import transformers", "longattn.rope", "longattn"),
        ("import click\nimport rich", "longattn.cli", "longattn"),
        ("import torch\ntorch.library.Library('a', 'DEF')", "longattn.ops", "longattn"),
    ],
)
def test_what_is_allowed_passes(source: str, module: str, package: str) -> None:
    assert violations(source, module, package) == []


def run(program: str) -> str:
    """What a Python process of its own prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    # Of what importing longattn adds: torch itself may load some of these.
    program = "import sys, torch; before = set(sys.modules); import longattn; print(*set(sys.modules) - before)"
    added = set(run(program).split())
    slow_parts_of_torch = {"torch._dynamo", "torch._inductor"}
    assert {name.split(".")[0] for name in added} & HEAVY == set()
    assert added & slow_parts_of_torch == set()


def test_importing_the_package_does_not_import_torch() -> None:
    program = (
        "import signal, sys\n"
        "before = signal.getsignal(signal.SIGINT)\n"
        "import longattn\n"
        "assert set(longattn.__all__) <= set(dir(longattn)) and longattn.InvalidInput.__name__ == 'InvalidInput'\n"
        "import longattn.cli\n"
        "assert signal.getsignal(signal.SIGINT) is before\n"
        "print(*sys.modules)"
    )
    assert {name.split(".")[0] for name in run(program).split()} & (HEAVY | {"torch", "numpy"}) <= {"click"}


@pytest.mark.parametrize(
    "imports",
    ["import longattn\nimport torch", "import torch\nimport longattn", "from longattn import Rope\nimport torch"],
)
def test_the_operators_exist_once_longattn_and_torch_are_imported(imports: str) -> None:
    program = (
        f"{imports}\n"
        "print(torch.ops.longattn.attention.default)\n"
        "import importlib.util, pathlib, sys\n"
        "assert importlib.util.find_spec('torch').origin == torch.__file__ and torch.__loader__.get_source('torch')\n"
        "assert not any(type(finder).__module__.startswith('longattn') for finder in sys.meta_path)"
    )
    assert run(program).strip() == "longattn.attention.default"


def test_modules_can_be_imported_first() -> None:
    """Each is what imports torch, while it is half imported itself."""
    for module in ("scaling", "ops"):
        program = (
            f"import longattn.{module}\n"
            "import torch\n"
            "q = torch.ones(1, 1, 2, 8)\n"
            "print(longattn.attention(q, q, q).sum().item())"
        )
        assert run(program) == "16.0\n"


def test_public_names_load_on_first_use() -> None:
    import pickle

    import longattn

    names: dict[str, object] = {}
    exec("from longattn import *", names)
    assert set(longattn.__all__) <= set(names)
    for name in longattn.__all__:
        assert getattr(longattn, name) is names[name]
    assert pickle.loads(pickle.dumps(longattn.attention)) is longattn.attention
    assert longattn.problem.__name__ == "longattn.problem"  # a module that is not among the public names
    for name in ("_nothing", "nothing", "attn"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(longattn, name)
