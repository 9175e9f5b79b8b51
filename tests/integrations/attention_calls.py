"""What the installed transformers' models write in their attention calls and pass through to them, read as syntax."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

import transformers

MODELS = Path(transformers.__file__).parent / "models"
_CAUSAL_MASKS = {"create_causal_mask", "create_sliding_window_causal_mask"}


class Modules:
    """The classes of a modeling file: which modules call attention, directly or not, and with which keywords."""

    def __init__(self, tree: ast.Module) -> None:
        self.classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self.parts = {name: self._parts(node) for name, node in self.classes.items()}
        self.forwards = {name: self._method(name, "forward") for name in self.classes}
        self.nodes = {name: list(ast.walk(node)) if node else [] for name, node in self.forwards.items()}
        self.loops = {name: self._loops(nodes) for name, nodes in self.nodes.items()}
        self._reach: dict[tuple[str, str], bool] = {}

    def makes_causal_masks_without_positions(self) -> bool:
        """Whether some causal mask is made without position_ids."""
        nodes = [node for nodes in self.nodes.values() for node in nodes]
        dicts = ({k.value for k in x.keys if isinstance(k, ast.Constant)} for x in nodes if isinstance(x, ast.Dict))
        given = set().union(*(keys for keys in dicts if "attention_mask" in keys))
        for call in nodes:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in _CAUSAL_MASKS:
                names = {keyword.arg for keyword in call.keywords}
                if not ("position_ids" in names or len(call.args) > 4 or (None in names and "position_ids" in given)):
                    return True
        return False

    def written(self) -> Iterator[str]:
        """The keywords in calls of the attention interface itself."""
        for name in self.classes:
            for call in self._calls(name):
                if _is_attention(call):
                    yield from (keyword.arg for keyword in call.keywords if keyword.arg)

    def passed(self) -> Iterator[str]:
        """The keywords that a module gives to another, which does not take them and hands them to its attention."""
        for name in self.classes:
            for call in self._calls(name):
                for other in self._called(name, call):
                    yield from (k.arg for k in call.keywords if k.arg and self._reaches(other, k.arg))

    def _method(self, name: str, method: str) -> ast.FunctionDef | None:
        node = self.classes.get(name)
        for item in node.body if node else ():
            if isinstance(item, ast.FunctionDef) and item.name == method:
                return item
        bases = (base.id for base in (node.bases if node else ()) if isinstance(base, ast.Name) and base.id != name)
        return next((found for base in bases if (found := self._method(base, method))), None)

    def _calls(self, name: str) -> Iterator[ast.Call]:
        return (node for node in self.nodes[name] if isinstance(node, ast.Call))

    def _parts(self, node: ast.ClassDef) -> dict[str, set[str]]:
        """The classes that an attribute of self may be of, or a list of."""
        parts: dict[str, set[str]] = defaultdict(set)
        for name in (node.name, *(base.id for base in node.bases if isinstance(base, ast.Name))):
            init = self._method(name, "__init__")
            for item in ast.walk(init) if init else ():
                targets = item.targets if isinstance(item, ast.Assign) else ()
                for target in targets:
                    if isinstance(target, ast.Attribute) and _is_self(target.value):
                        parts[target.attr] |= _names(item.value) & self.classes.keys()
        return parts

    def _called(self, name: str, call: ast.Call) -> Collection[str]:
        """The classes of the module that a call in this class's forward calls."""
        parts, called = self.parts[name], call.func
        if isinstance(called, ast.Attribute) and _is_self(called.value):
            return parts.get(called.attr, ())
        if isinstance(called, ast.Name):
            return {found for attribute in self.loops[name].get(called.id, ()) for found in parts.get(attribute, ())}
        return ()

    def _loops(self, nodes: list[ast.AST]) -> dict[str, set[str]]:
        """The attributes of self that each loop variable of a forward runs over."""
        lists: dict[str, set[str]] = defaultdict(set)
        for loop in nodes:
            if isinstance(loop, ast.For):
                attributes = {x.attr for x in ast.walk(loop.iter) if isinstance(x, ast.Attribute)}
                for variable in _names(loop.target):
                    lists[variable] |= attributes
        return lists

    def _reaches(self, name: str, keyword: str) -> bool:
        """Whether a keyword given to a module arrives in an attention call by way of its **kwargs."""
        if (name, keyword) not in self._reach:
            self._reach[name, keyword] = False  # for modules that hold each other
            forward = self.forwards[name]
            if forward and forward.args.kwarg and keyword not in _parameters(forward):
                rest = [call for call in self._calls(name) if _hands_on(call, forward.args.kwarg.arg)]
                self._reach[name, keyword] = any(
                    _is_attention(call) or any(self._reaches(other, keyword) for other in self._called(name, call))
                    for call in rest
                )
        return self._reach[name, keyword]


def files() -> Iterator[tuple[str, ast.Module]]:
    """The name of each model family that calls the attention interface, and its modeling file."""
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "attention_interface" in text:
            yield path.parent.name, ast.parse(text)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _is_attention(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "attention_interface"


def _hands_on(call: ast.Call, rest: str) -> bool:
    return any(k.arg is None and isinstance(k.value, ast.Name) and k.value.id == rest for k in call.keywords)


def _parameters(function: ast.FunctionDef) -> set[str]:
    return {argument.arg for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)}


def _names(node: ast.AST) -> set[str]:
    return {item.id for item in ast.walk(node) if isinstance(item, ast.Name)}
