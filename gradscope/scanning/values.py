"""What an expression's value depends on: a small abstract interpreter over one function's syntax.

It runs forward once, keeps for every local name the atoms (see ``facts.py``) that its value may depend
on and whether it is a tensor, and reports what it meets on the way to its owner, ``body.py``.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any, NamedTuple

from gradscope.scanning import torch_ops
from gradscope.scanning.facts import NOTHING, Atoms, Call, Class, Site
from gradscope.scanning.switches import Names


class Value(NamedTuple):
    """Atoms and kind: ``tensor``, ``index`` (integers or truth values), ``module``, ``plain`` or ``unknown``."""

    atoms: Atoms = NOTHING
    kind: str = "unknown"


PLAIN = Value(NOTHING, "plain")
INDEX = Value(NOTHING, "index")
UNKNOWN = Value()


def joined(values: list[Value]) -> Value:
    """Return the value of something made of several: all atoms, a tensor if one of them is."""
    if not values:
        return PLAIN
    atoms = frozenset().union(*(value.atoms for value in values)) if len(values) > 1 else values[0].atoms
    kinds = {value.kind for value in values}
    kind = "tensor" if "tensor" in kinds else "unknown" if "unknown" in kinds else values[0].kind
    return Value(atoms, kind)


class Expressions:
    """Evaluates expressions in the environment ``env``; collects calls, reads of ``self`` and sites."""

    def __init__(self, names: Names, klass: Class | None, function: str) -> None:
        self.names = names
        self.klass = klass
        self.function = function
        self.env: dict[str, Value] = {}
        self.calls: list[Call] = []
        self.reads: set[str] = set()
        self.sites: list[Site] = []
        self.parameters: set[str] = set()
        self.discarded: ast.expr | None = None
        self.sometimes = False

    def value(self, node: ast.expr | None) -> Value:
        """Return what an expression's value depends on."""
        if node is None or isinstance(node, ast.Constant):
            return PLAIN
        rule = _RULES.get(type(node))
        if rule is not None:
            return rule(self, node)
        parts = [self.value(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        if isinstance(node, ast.JoinedStr):
            return PLAIN
        return joined(parts)

    def bind(self, target: ast.expr, value: Value) -> None:
        """Let a name, an item or a tuple of names stand for a value."""
        if isinstance(target, ast.Name):
            self.env[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            for element in target.elts:
                self.bind(element, value)
        elif isinstance(target, ast.Starred):
            self.bind(target.value, value)
        elif isinstance(target, ast.Subscript):
            self.value(target.slice)
            base = target.value
            if isinstance(base, ast.Name):
                self.env[base.id] = joined([self.env.get(base.id, UNKNOWN), value])
            else:
                self.value(base)
        elif isinstance(target, ast.Attribute) and not (isinstance(target.value, ast.Name) and target.attr != "data"):
            self._attribute(target, written=True)

    def report(
        self, node: ast.expr, rule: str, mechanism: str, value: Value = UNKNOWN, harmless: str = "", at: int = 0
    ) -> Atoms:
        """Note a place where a gradient may stop; return the atoms of what it gives out."""
        column = node.col_offset + 1
        end = node.end_lineno or node.lineno
        line = at or (node.end_lineno if isinstance(node, ast.Call) else 0) or node.lineno
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            line = node.func.end_lineno or line
        self.sites.append(
            Site(rule, line, column, end, self.function, mechanism, "call", depends=value.atoms, harmless=harmless)
        )
        return value.atoms | {f"cut:{line}"}

    # --- names and attributes -------------------------------------------------------------------

    def _name(self, node: ast.Name) -> Value:
        return self.env.get(node.id, UNKNOWN)

    def _attribute(self, node: ast.Attribute, written: bool = False) -> Value:
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return self._own_attribute(node.attr)
        base = self.value(node.value)
        if node.attr in torch_ops.PLAIN_ATTRIBUTES:
            return PLAIN
        if node.attr in torch_ops.WEIGHTS:
            return Value(base.atoms, "tensor")
        if node.attr == "data" and base.kind == "tensor":
            harmless = "writes the value and reads no gradient" if written else ""
            cut = self.report(node, "GS202", ".data", base, harmless, at=node.end_lineno or 0)
            return Value(base.atoms if written else cut, base.kind)
        if node.attr == "indices":
            return INDEX
        kind = base.kind if node.attr in ("T", "mT", "H", "mH", "real", "imag", "data") else "unknown"
        return Value(base.atoms, "plain" if base.kind == "plain" else kind)

    def _own_attribute(self, name: str) -> Value:
        self.reads.add(name)
        known = self.klass.attributes.get(name, "") if self.klass else ""
        if known == "buffer":
            return Value(NOTHING, "tensor")
        if known == "plain" or name in torch_ops.PLAIN_ATTRIBUTES:
            return PLAIN
        kind = {"parameter": "tensor", "module": "module"}.get(known, "unknown")
        return Value(frozenset({f"attr:{name}"}), kind)

    # --- calls ----------------------------------------------------------------------------------

    def _call(self, node: ast.Call) -> Value:
        if isinstance(node.func, ast.Name) and node.func.id == "self" and self.klass is not None:
            return self._called_itself(node, self.klass)
        given = [self.value(argument) for argument in node.args]
        given += [self.value(keyword.value) for keyword in node.keywords]
        dotted = self.names.dotted(node.func)
        root = dotted.partition(".")[0]
        is_local = root in self.env or root == "self"
        if root == "super()" or (dotted and not is_local):
            self._note_call(dotted, node)
        if root in ("torch", "torchvision") and not is_local:
            return self._torch_call(node, dotted.rpartition(".")[2], given)
        if isinstance(node.func, ast.Attribute) and root != "super()":
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "self":
                self._note_call(dotted, node)
                return self._own_call(node, node.func.attr, given)
            if root == "self" and dotted.count(".") == 2:
                self._note_call(dotted, node)
            if is_local or not dotted or root not in self.names.imports.values():
                return self._method(node, node.func, given)
        return self._function(node, dotted, given)

    def _called_itself(self, node: ast.Call, klass: Class) -> Value:
        """``self(x)`` is ``self.forward(x)``."""
        given = [self.value(argument) for argument in (*node.args, *(keyword.value for keyword in node.keywords))]
        name = "__call__" if "__call__" in klass.methods else "forward"
        self._note_call(f"self.{name}", node)
        return Value(self._own_call(node, name, given).atoms, "tensor")

    def _note_call(self, target: str, node: ast.Call) -> None:
        self.calls.append(Call(target, node.lineno, used=node is not self.discarded, sometimes=self.sometimes))

    def _own_call(self, node: ast.Call, name: str, given: list[Value]) -> Value:
        self.reads.add(name)
        known = self.klass.attributes.get(name, "") if self.klass else ""
        atoms = _through(node, f"self.{name}", given) | {f"call:self.{name}"}
        # What is called on self and is no method of the class is a module, as far as the class shows.
        is_module = known == "module" or (not known and self.klass is not None and name not in self.klass.methods)
        return Value(atoms, "tensor" if is_module else "unknown")

    def _torch_call(self, node: ast.Call, name: str, given: list[Value]) -> Value:
        value = joined(given)
        if name in torch_ops.SHAPE_ONLY:
            return Value(NOTHING, "tensor")
        if name in torch_ops.INDEX_VALUED:
            self._index_valued(node, name, value)
            return INDEX
        if name in torch_ops.PIECEWISE_CONSTANT:
            self.report(node, "GS402", name, value)
        if name in ("tensor", "from_numpy") and value.atoms:
            if value.kind == "tensor":
                return Value(self.report(node, "GS203", f"torch.{name}", value), "tensor")
            return Value(frozenset(atom for atom in value.atoms if atom.startswith("cut:")), "tensor")
        if name == "checkpoint" and any(
            keyword.arg == "use_reentrant" and getattr(keyword.value, "value", None) is True
            for keyword in node.keywords
        ):
            self.report(node, "GS604", "checkpoint(use_reentrant=True)", value)
        return Value(value.atoms, "tensor")

    def _index_valued(self, node: ast.Call, name: str, value: Value) -> None:
        if value.kind == "tensor" and name in ("argmax", "argmin", "multinomial"):
            self.report(node, "GS401", name, value)
        elif value.kind == "tensor" and name in ("long", "int"):
            self.report(node, "GS403", f".{name}()", value)

    def _function(self, node: ast.Call, dotted: str, given: list[Value]) -> Value:
        value = joined(given)
        if dotted in torch_ops.PLAIN_FUNCTIONS:
            return PLAIN
        if dotted in ("float", "int", "round"):
            if value.kind == "tensor" and dotted == "float":
                self.report(node, "GS302", "float()", value)
            return PLAIN
        last = dotted.rpartition(".")[2]
        if last == "deepcopy":
            return Value(NOTHING, value.kind)  # a copy is a leaf of its own
        if last in _INDEX_FUNCTIONS:
            return INDEX
        if last == "Parameter" and given and value.kind == "tensor" and value.atoms:
            self.report(node, "GS203", "nn.Parameter", value)
        if isinstance(node.func, ast.Name) and node.func.id in self.env:
            callee = self.env[node.func.id]
            atoms = value.atoms | callee.atoms
            if node.func.id in self.parameters:
                self._note_call(node.func.id, node)
                atoms |= {f"call:{node.func.id}"}
            return Value(atoms, "tensor" if callee.kind == "module" else "unknown")
        if not dotted:
            callee = self.value(node.func)
            return Value(value.atoms | callee.atoms, "tensor" if callee.kind == "module" else "unknown")
        return Value(_through(node, dotted, given) | {f"call:{dotted}"}, "unknown")

    def _method(self, node: ast.Call, func: ast.Attribute, given: list[Value]) -> Value:
        base = self.value(func.value)
        name = func.attr
        if name in torch_ops.PLAIN_METHODS:
            return PLAIN if name not in ("pop", "keys") else Value(base.atoms, "unknown")
        if name in torch_ops.PARAMETER_LISTS:
            return Value(base.atoms, "tensor")
        if name in torch_ops.MODULE_LISTS:
            return Value(base.atoms, "module")
        if name in torch_ops.SHAPE_ONLY:
            return Value(NOTHING, base.kind)
        if base.kind == "plain":
            return Value(joined(given).atoms, "plain")
        if name in _ESCAPES and base.kind != "module":
            return self._escape(node, name, base)
        if name in torch_ops.INDEX_VALUED and base.kind != "module":
            self._index_valued(node, name, base)
            return INDEX
        if name in torch_ops.PIECEWISE_CONSTANT and base.kind == "tensor":
            self.report(node, "GS402", name, base)
        if name == "requires_grad_" and node.args and getattr(node.args[0], "value", None) is False:
            self.report(node, "GS901", "requires_grad_(False)", base, "frozen, and frozen is not blocked")
        value = joined([base, *given, *self._forward_of(func)])
        return Value(value.atoms, "tensor" if base.kind in ("tensor", "module") else "unknown")

    def _forward_of(self, func: ast.Attribute) -> list[Value]:
        """``self.part.forward(x)`` runs a module, like ``self.part(x)``."""
        part = self.names.dotted(func.value) if func.attr == "forward" else ""
        return [Value(frozenset({f"call:self.{part.split('.')[1]}"}), "tensor")] if part.startswith("self.") else []

    def _escape(self, node: ast.Call, name: str, base: Value) -> Value:
        rule = _ESCAPES[name]
        sure = base.kind == "tensor"
        if name in ("detach", "detach_"):
            if node.args or base.kind not in ("tensor", "unknown"):
                return base
            return Value(self.report(node, rule, f".{name}()", base), "tensor")
        if not sure:
            return Value(base.atoms, "unknown")
        cut = self.report(node, rule, f".{name}()", base)
        return Value(cut, {"sample": "tensor", "numpy": "unknown"}.get(name, "plain"))

    # --- the rest -------------------------------------------------------------------------------

    def _binary(self, node: ast.BinOp) -> Value:
        before = len(self.sites)
        value = joined([self.value(node.left), self.value(node.right)])
        if isinstance(node.op, (ast.Add, ast.Sub)) and len(self.sites) > before and _is_straight_through(node):
            for index in range(before, len(self.sites)):
                site = self.sites[index]
                if site.rule in ("GS201", "GS202", "GS402"):
                    self.sites[index] = Site(
                        site.rule, site.line, site.column, site.end_line, site.function, site.mechanism, site.how,
                        site.depends, harmless="part of a straight-through estimator",
                    )  # fmt: skip
        return value

    def _subscript(self, node: ast.Subscript) -> Value:
        self.value(node.slice)
        base = self.value(node.value)
        if gives_indices(node.value) and isinstance(node.slice, ast.Constant) and node.slice.value == 1:
            return INDEX
        return Value(base.atoms, "unknown" if base.kind == "plain" else base.kind)

    def _compare(self, node: ast.Compare) -> Value:
        for part in (node.left, *node.comparators):
            self.value(part)
        return INDEX

    def _conditional(self, node: ast.IfExp) -> Value:
        self.value(node.test)
        return joined([self.value(node.body), self.value(node.orelse)])

    def _walrus(self, node: ast.NamedExpr) -> Value:
        value = self.value(node.value)
        self.bind(node.target, value)
        return value

    def _lambda(self, node: ast.Lambda) -> Value:
        return self.value(node.body)

    def _dict(self, node: ast.Dict) -> Value:
        return joined([self.value(item) for item in node.values]) if node.values else UNKNOWN

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> Value:
        for generator in node.generators:
            self.bind(generator.target, self.value(generator.iter))
            for test in generator.ifs:
                self.value(test)
        if isinstance(node, ast.DictComp):
            self.value(node.key)
            return self.value(node.value)
        return self.value(node.elt)


# Kept outside the objects: bound methods in them would make cycles that hold every syntax tree in memory.
_RULES: dict[type[ast.AST], Callable[[Expressions, Any], Value]] = {
    ast.Name: Expressions._name, ast.Attribute: Expressions._attribute, ast.Call: Expressions._call,
    ast.BinOp: Expressions._binary, ast.Subscript: Expressions._subscript, ast.Compare: Expressions._compare,
    ast.IfExp: Expressions._conditional, ast.NamedExpr: Expressions._walrus, ast.Lambda: Expressions._lambda,
    ast.Dict: Expressions._dict, ast.ListComp: Expressions._comprehension, ast.SetComp: Expressions._comprehension,
    ast.GeneratorExp: Expressions._comprehension, ast.DictComp: Expressions._comprehension,
}  # fmt: skip
_INDEX_FUNCTIONS = frozenset({"linear_sum_assignment", "argsort", "argmax", "argmin"})
_ESCAPES = {
    "detach": "GS201", "detach_": "GS201", "item": "GS302", "tolist": "GS302", "numpy": "GS301", "sample": "GS205",
}  # fmt: skip


def _through(node: ast.Call, target: str, given: list[Value]) -> Atoms:
    """Return the atoms of a call's arguments, each marked with its way into the function called."""
    ways = [*map(str, range(len(node.args))), *(keyword.arg or "*" for keyword in node.keywords)]
    return frozenset(
        atom if atom.startswith(("arg:", "cut:")) else f"arg:{target}:{way}:{atom}"
        for way, value in zip(ways, given, strict=True)
        for atom in value.atoms
    )


def gives_indices(node: ast.expr) -> bool:
    """Tell whether a call gives ``(values, indices)``: the second of the two carries no gradient."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return node.func.attr in ("topk", "sort", "max", "min", "median", "kthvalue", "mode", "cummax", "cummin")


def _is_straight_through(node: ast.BinOp) -> bool:
    """Tell ``x + (q - x).detach()`` and its rearrangements: the detached part is a difference."""
    for side, other in ((node.left, node.right), (node.right, node.left)):
        if isinstance(side, ast.Attribute) and side.attr == "data":
            inner: ast.expr = side.value
        elif isinstance(side, ast.Call) and isinstance(side.func, ast.Attribute) and side.func.attr == "detach":
            inner = side.func.value
        else:
            continue
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, (ast.Sub, ast.Add)):
            return True
        # soft - soft.detach(): the same name on both sides
        if ast.dump(inner) in ast.dump(other):
            return True
    return False
