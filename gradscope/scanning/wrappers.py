"""Find the package's own grad-disabling wrappers: decorators, context managers, subclasses, methods that give one.

Where ``smart_inference_mode`` is defined nothing is cut; where it is used, something is. So the definition
is turned into a name that the whole package is then read with.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from gradscope.scanning.signatures import FunctionNode
from gradscope.scanning.switches import Names, Switch


def wrapper_of_function(node: FunctionNode, names: Names) -> str:
    """Return the mechanism that a function wraps, or nothing where it is no wrapper."""
    decorators = {names.dotted(item).rpartition(".")[2] for item in node.decorator_list}
    if decorators & {"contextmanager", "asynccontextmanager"}:
        return _around_yield(node, names)
    return _given_back(node, names) or _around_argument(node, names)


def wrapper_of_class(node: ast.ClassDef, names: Names) -> str:
    """Return the mechanism of a context manager class: a subclass, or one that enters a switch itself."""
    for base in node.bases:
        switch = names.switch(base)
        if switch is not None and switch.disables is not False:
            return switch.mechanism
    methods = {method.name: method for method in node.body if isinstance(method, ast.FunctionDef)}
    if "__enter__" not in methods:
        return ""
    for name in ("__init__", "__enter__"):
        for part in statements(methods[name].body) if name in methods else ():
            value = part.value if isinstance(part, (ast.Expr, ast.Assign)) else None
            switch = _kept_or_entered(value, names) if value is not None else None
            if switch is not None and switch.disables is not False and switch.mechanism != "enable_grad":
                return switch.mechanism
    return ""


def _kept_or_entered(value: ast.expr, names: Names) -> Switch | None:
    """Return the switch that a statement keeps or enters: ``torch.no_grad().__enter__()``, also through a stack."""
    switch = names.switch(value)
    if switch is None and isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        inner = value.func.value if value.func.attr == "__enter__" else value.args[0] if value.args else None
        switch = names.switch(inner) if inner is not None else None
    return switch


_SIMPLE = (ast.Expr, ast.Assign, ast.Return, ast.AnnAssign, ast.AugAssign, ast.Raise)


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements and those nested in them, without a look at any expression."""
    for node in body:
        yield node
        if isinstance(node, _SIMPLE):
            continue
        for part in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, part, ()))
        for arm in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
            yield from statements(arm.body)


def _disabling(node: ast.expr, names: Names) -> str:
    switch = names.switch(node)
    return switch.mechanism if switch is not None and switch.disables else ""


def _around_yield(node: FunctionNode, names: Names) -> str:
    """``with torch.no_grad(): yield``, or a yield after ``set_grad_enabled(False)`` or an exit stack entered it."""
    called = ""
    for part in ast.walk(node):
        if isinstance(part, ast.With):
            found = [mechanism for item in part.items if (mechanism := _disabling(item.context_expr, names))]
            if found and any(isinstance(inner, ast.Yield) for inner in ast.walk(part)):
                return found[0]
    for statement in statements(node.body):
        value = statement.value if isinstance(statement, ast.Expr) else None
        if isinstance(value, ast.Yield) and called:
            return called
        switch = names.switch(value) if isinstance(value, ast.Call) else None
        if switch is not None and switch.mechanism == "set_grad_enabled":
            called = switch.mechanism if switch.disables else ""
        elif switch is None and isinstance(value, ast.Call) and getattr(value.func, "attr", "") == "enter_context":
            called = called or (_disabling(value.args[0], names) if value.args else "")
    return ""


def _given_back(node: FunctionNode, names: Names) -> str:
    """``return torch.no_grad``, ``return torch.no_grad()(fn)``."""
    for part in statements(node.body):
        if not isinstance(part, ast.Return) or part.value is None:
            continue
        value = part.value
        mechanism = _disabling(value, names)
        if not mechanism and isinstance(value, ast.Call) and _is_parameter_call(value, node):
            mechanism = _disabling(value.func, names)
        if mechanism:
            return mechanism
    return ""


def _is_parameter_call(call: ast.Call, node: FunctionNode) -> bool:
    """Tell whether every argument is a parameter of the function or of one nested in it."""
    return bool(call.args) and all(isinstance(arg, ast.Name) and arg.id in _parameters(node) for arg in call.args)


def _around_argument(node: FunctionNode, names: Names) -> str:
    """A nested function that calls the outer function's argument in a region: a hand-written decorator."""
    given = {argument.arg for argument in (*node.args.posonlyargs, *node.args.args)} - {"self", "cls"}
    returned = {
        part.value.id for part in node.body if isinstance(part, ast.Return) and isinstance(part.value, ast.Name)
    }
    for inner in node.body:
        if not isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)) or inner.name not in returned:
            continue
        for part in ast.walk(inner):
            if isinstance(part, (ast.With, ast.AsyncWith)):
                found = [mechanism for item in part.items if (mechanism := _disabling(item.context_expr, names))]
                if found and _called(part, inner) & given:
                    return found[0]
        found = [mechanism for item in inner.decorator_list if (mechanism := _disabling(item, names))]
        if found and _called(inner, inner) & given:
            return found[0]
    return ""


def _called(node: ast.AST, inner: FunctionNode) -> set[str]:
    """Return the names that are called with what the inner function is called with: ``fn(*args)``, ``fn(x)``."""
    own = _parameters(inner)
    return {
        part.func.id
        for part in ast.walk(node)
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)
        and (any(isinstance(each, ast.Starred) or getattr(each, "id", "") in own for each in part.args)
             or any(getattr(each.value, "id", "") in own or each.arg is None for each in part.keywords)
             or not own)
    }  # fmt: skip


def _parameters(node: FunctionNode) -> set[str]:
    return {
        argument.arg
        for part in ast.walk(node)
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))
        for argument in (*part.args.posonlyargs, *part.args.args)
    } - {"self", "cls"}
