"""Operations that a package defines for autograd itself: ``autograd.Function`` classes and custom operators."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from gradscope.scanning.facts import Site
from gradscope.scanning.signatures import FunctionNode
from gradscope.scanning.switches import Names


def without_gradient(node: ast.ClassDef, name: str) -> Iterator[Site]:
    """Yield the site of an ``autograd.Function`` whose backward is missing or gives nothing."""
    methods = [item for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))]
    backward = next((method for method in methods if method.name in ("backward", "vjp")), None)
    if backward is None or _gives_nothing(backward):
        what = "has no backward" if backward is None else "has a backward that gives no gradient"
        line = node.lineno if backward is None else backward.lineno
        yield Site("GS501", line, 1, line, name, f"{node.name} {what}", "call")


def _gives_nothing(node: FunctionNode) -> bool:
    """Tell whether a backward returns only None, or raises and nothing else."""
    returns = [part.value for part in ast.walk(node) if isinstance(part, ast.Return)]
    if not returns:
        return True
    return all(
        value is None
        or (isinstance(value, ast.Constant) and value.value is None)
        or (isinstance(value, ast.Tuple) and all(isinstance(e, ast.Constant) and e.value is None for e in value.elts))
        for value in returns
    )


def is_custom_op(decorator: ast.expr, names: Names) -> bool:
    """Tell whether a decorator makes a function an operator: ``@torch.library.custom_op("own::name")``."""
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    return names.dotted(target).endswith("library.custom_op")


def without_autograd(decorator: ast.expr, function: str, source: str) -> Iterator[Site]:
    """Yield the site of an operator that its file registers no formula for its gradient of."""
    first = decorator.args[0] if isinstance(decorator, ast.Call) and decorator.args else None
    name = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
    if f"{function}.register_autograd" not in source and not re.search(
        rf"register_autograd\(\s*[\"']{re.escape(name)}[\"']", source
    ):
        mechanism = f"custom_op {function} without register_autograd"
        yield Site("GS502", decorator.lineno, decorator.col_offset + 1, decorator.lineno, function, mechanism, "call")
