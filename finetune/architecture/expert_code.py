"""Which classes of transformers compute a layer's experts as Qwen3-MoE's does, which is what our kernels compute.

Read from the sources of the installed version, by their syntax; nothing of it is imported.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

from finetune.architecture.names import EXPERT_PROJECTIONS

_CLASS = re.compile(r"(?:^@.*\n)*^class \w+.*\n(?:[ \t].*\n|\n)*", re.MULTILINE)
_REFERENCE = ("qwen3_moe", "Qwen3MoeExperts")


def known_experts(model_type: str | None) -> list[str]:
    """The classes for `model_type` in the installed transformers whose experts our kernels can compute."""
    if not model_type or not model_type.isidentifier() or not (reference := reference_code()):
        return []
    return [name for name, code in expert_code(_source(model_type)).items() if code == reference]


@cache
def reference_code() -> str | None:
    """The code of Qwen3-MoE's class; None where transformers is not installed, or without its sources."""
    folder, name = _REFERENCE
    return expert_code(_source(folder)).get(name)


def expert_code(source: str) -> dict[str, str]:
    """Name -> what is computed, of every class that has the weights of a bank of experts.

    What names other attributes and variables have does not count, nor do annotations and docstrings.
    """
    found = {}
    for text in _CLASS.findall(source):
        if all(f"self.{projection} = nn.Parameter" in text for projection in EXPERT_PROJECTIONS):
            (tree,) = ast.parse(text).body
            assert isinstance(tree, ast.ClassDef)
            found[tree.name] = _code(tree)
    return found


def _code(tree: ast.ClassDef) -> str:
    """Decorators, forward, and the names of other methods."""
    methods = [part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name != "__init__"]
    parts = [ast.unparse(decorator) for decorator in tree.decorator_list]
    parts += [_Renamed().visit(method) if method.name == "forward" else method.name for method in methods]
    return "\n".join(part if isinstance(part, str) else ast.unparse(part) for part in parts)


class _Renamed(ast.NodeTransformer):
    """Local names and attributes of `self` by the order in which they come."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._local: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        stored = {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
        self._local = stored | {argument.arg for argument in node.args.args} - {"self"}
        node.returns = None
        if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
            node.body = node.body[1:]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(self._name(node.arg) if node.arg in self._local else node.arg)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self._name(node.id) if node.id in self._local else node.id, node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
        self.generic_visit(node)
        if of_self and node.attr not in EXPERT_PROJECTIONS:
            node.attr = self._name(f"self.{node.attr}")
        return node

    def _name(self, name: str) -> str:
        return self._names.setdefault(name, f"name{len(self._names)}")


def _source(model_type: str) -> str:
    """The module that holds a model type's classes; "" where there is none."""
    spec = importlib.util.find_spec("transformers")
    for root in (spec.submodule_search_locations if spec is not None else None) or ():
        name = model_type
        while name:
            file = Path(root) / "models" / name / f"modeling_{name}.py"
            if file.is_file():
                return file.read_text(encoding="utf-8")
            name = name.rpartition("_")[0]
    return ""
