"""What an expression's value depends on: a small abstract interpreter over one function's syntax.

It runs forward once, keeps for every local name the atoms (see ``facts.py``) that its value may depend
on and whether it is a tensor, and reports what it meets on the way to its owner, ``body.py``.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, TypeGuard

from gradscope.scanning import torch_ops
from gradscope.scanning.detaches import DETACH_RULES, Pairs
from gradscope.scanning.facts import NOTHING, Atoms, Call, Class, Site
from gradscope.scanning.instances import class_made, itself
from gradscope.scanning.made import maker_of
from gradscope.scanning.makers import Making, one_of, side_by_side
from gradscope.scanning.switches import Names


class Value(NamedTuple):
    """Atoms and kind: ``tensor``, ``index`` (integers or truth values), ``module``, ``plain`` or ``unknown``.

    An ``array`` is what another library makes of tensors: it depends on them, and no gradient gets into it.
    A ``packed`` sequence is no tensor, and its ``data`` carries a gradient.
    A ``number`` is what ``.item()`` makes of a tensor: it depends on it, and no gradient gets into what is made of it.
    """

    atoms: Atoms = NOTHING
    kind: str = "unknown"


PLAIN = Value(NOTHING, "plain")
INDEX = Value(NOTHING, "index")
UNKNOWN = Value()


def joined(values: list[Value]) -> Value:
    """Return the value of something made of several: all atoms, a tensor if one of them is."""
    if len(values) < 2:
        return values[0] if values else PLAIN
    first = values[0]
    atoms, kind = first
    for more, other in values[1:]:
        if more:
            atoms = atoms | more if atoms else more
        if kind != "tensor" and other in ("tensor", "unknown"):
            kind = other
    return first if atoms is first.atoms and kind == first.kind else Value(atoms, kind)


class Expressions:
    """Evaluates expressions in the environment ``env``; collects calls, reads of ``self`` and sites."""

    def __init__(self, names: Names, klass: Class | None, function: str) -> None:
        self.names = names
        self.klass = klass
        self.function = function
        self.env: dict[str, Value] = {}
        self.made = dict(names.instances)  # names that are known to be instances of a class of the scan
        self.making = Making(names) if names.is_glue else None
        self.calls: list[Call] = []
        self.reads: set[str] = set()
        self.runs: set[str] = set()  # what calls and reads do not show: methods of a parameter that run a model
        self.sites: list[Site] = []
        self.pairs = Pairs()
        self.parameters: set[str] = set()
        self.renamed: dict[str, tuple[str, ...]] = {}  # local names, and what of ``self`` they stand for
        self.is_step = False  # of training: what it goes backward from, or gives a trainer, is followed more closely
        self.discarded: ast.expr | None = None
        self.sometimes = ""
        self.has_numbers = False  # as long as there are none, nobody looks for them
        self.conditions: list[tuple[ast.expr, bool]] = []  # the tests of the enclosing ifs, and which arm

    def value(self, node: ast.expr | None) -> Value:
        """Return what an expression's value depends on."""
        rule = self.rules.get(type(node))
        return rule(self, node) if rule is not None else self._children(node)

    def _children(self, node: ast.expr | None) -> Value:
        assert node is not None  # there is a rule for None
        parts = [self.value(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        return PLAIN if isinstance(node, ast.JoinedStr) else joined(parts)

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

    def bind_each(self, target: ast.expr, node: ast.expr) -> None:
        """Let the target of a loop stand for the items of a value; ``zip`` and ``enumerate`` give them side by side."""
        if self.making is not None:
            self.note_made(target, ast.copy_location(ast.Subscript(node, ast.Constant(0), ast.Load()), node))
        given: list[ast.expr | None] = _side_by_side(node) if isinstance(target, ast.Tuple) else []
        if isinstance(target, ast.Tuple) and len(given) == len(target.elts):
            for element, part in zip(target.elts, given, strict=True):
                self.bind(element, self.as_computed(self.value(part)))
        else:
            self.bind(target, self.as_computed(self.value(node)))

    def class_of(self, node: ast.expr) -> str:
        """Return the class of the scan that a value is known to be an instance of."""
        node = itself(node)
        known = self.made.get(node.id, "") if isinstance(node, ast.Name) else class_made(node, self.names)
        return known if known or self.making is None else self._made_by(node, self.making)

    def _made_by(self, node: ast.expr, making: Making) -> str:
        """Return the notation for what a function gives that models are got from (``makers.py``)."""
        kinds = [kind for kind in making.kinds(node) if not kind.startswith("?") or self._is_of_maker(kind)]
        return one_of(kinds)

    def _is_of_maker(self, kind: str) -> bool:
        return self.names.is_maker(maker_of(kind))

    def note_class(self, name: str, made: str) -> None:
        """Let a local name stand for an instance of a class, or of none that is known."""
        if made:
            self.made[name] = made
        else:
            self.made.pop(name, None)

    def note_made(self, target: ast.expr, node: ast.expr) -> None:
        """Take note of what a name, or each of several, is an instance of: ``model, transform = load()``."""
        if self.making is not None:
            self.making.assign(target, node)
        for part, given in side_by_side(target, node):
            if isinstance(part, ast.Name):
                self.note_class(part.id, self.class_of(given))

    def rename_parts(self, targets: Sequence[ast.expr], node: ast.expr) -> None:
        """``model = self.model``: what is called by this name is what ``self`` keeps."""
        given = [node.body, node.orelse] if isinstance(node, ast.IfExp) else [node]
        parts = tuple(part.attr for part in given if is_own(part))
        for target in targets:
            if isinstance(target, ast.Name) and (parts or target.id in self.renamed):
                self.renamed[target.id] = parts

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
            Site(rule, line, column, end, self.function, mechanism, "call", depends=value.atoms,
                 conditional=rule == "GS901" and bool(self.conditions), harmless=harmless)
        )  # fmt: skip
        atoms = value.atoms
        if self.is_step:
            atoms = frozenset(atom if atom.startswith(_STOPPED) else f"off:{atom}" for atom in atoms)
        return atoms | {f"cut:{line}"}

    def _silently(self, nodes: Sequence[ast.expr]) -> list[Value]:
        """Return the values of expressions that were evaluated before: nothing is noted twice."""
        kept = (self.calls, self.sites, set(self.reads))
        self.calls, self.sites = [], []
        found = [self.value(node) for node in nodes]
        self.calls, self.sites, self.reads = kept
        return found

    # --- what a subclass does with it -------------------------------------------------------------

    def note_output(self, target: ast.expr, atoms: Atoms, kind: str = "unknown") -> None:
        """Take note that a target holds a new value."""

    def suspend(self, node: ast.Yield | ast.YieldFrom | ast.Await, value: Value) -> None:
        """Take note of a value given out, or awaited, in the middle of the function."""

    def as_computed(self, value: Value) -> Value:
        """Return a value as the open regions leave it."""
        return value

    def hand_out(self, parts: Sequence[Value]) -> None:
        """Take note of values that are given out side by side: in a tuple, a dict, an output object."""

    # --- names and attributes -------------------------------------------------------------------

    def _name(self, node: ast.Name) -> Value:
        value = self.env.get(node.id, UNKNOWN)
        if value.kind == "function":  # given to somebody who calls it
            self.calls.append(Call(node.id, sometimes=self.sometimes))
        return value

    def _attribute(self, node: ast.Attribute, written: bool = False) -> Value:
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return self._own_attribute(node.attr)
        base = self.value(node.value)
        if node.attr in torch_ops.PLAIN_ATTRIBUTES:
            return PLAIN
        if self.is_step and base is UNKNOWN and isinstance(node.value, ast.Name):
            return self._of_global(node.value.id)
        if node.attr in torch_ops.WEIGHTS:
            return Value(base.atoms, "tensor")
        if node.attr == "data" and base.kind == "tensor":
            harmless = "writes the value and reads no gradient" if written else ""
            cut = self.report(node, "GS202", ".data", base, harmless, at=node.end_lineno or 0)
            return Value(base.atoms if written else cut, base.kind)
        if node.attr == "indices":
            return INDEX
        if base.kind == "packed":
            return Value(base.atoms, "tensor" if node.attr == "data" else "packed")
        kind = base.kind if node.attr in ("T", "mT", "H", "mH", "real", "imag", "data") else "unknown"
        return Value(base.atoms, "plain" if base.kind == "plain" else kind)

    def _of_global(self, name: str) -> Value:
        """Return what an object of the module keeps, in a step of training: ``policy.saved_log_probs``."""
        is_settings = name in torch_ops.SETTINGS or name in self.names.imports
        return UNKNOWN if is_settings else Value(frozenset({f"call:{name}"}))

    def _own_attribute(self, name: str) -> Value:
        self.reads.add(name)
        known = self.klass.attributes.get(name, "") if self.klass else ""
        if known == "buffer":
            return Value(NOTHING, "tensor")
        if known == "plain" or name in torch_ops.PLAIN_ATTRIBUTES:
            return PLAIN
        kind = "module" if known.startswith("|") else _KINDS.get(known, "unknown")
        return Value(frozenset({f"attr:{name}"}), kind)

    def _plain(self, _: ast.Constant | None) -> Value:
        return PLAIN

    def _operand(self, node: ast.UnaryOp) -> Value:
        return self.value(node.operand)

    def _elements(self, node: ast.Tuple | ast.List | ast.Set) -> Value:
        return joined([self.value(element) for element in node.elts])

    def _any_of(self, node: ast.BoolOp) -> Value:
        return joined([self.value(part) for part in node.values])

    def _slice(self, node: ast.Slice) -> Value:
        return joined([self.value(part) for part in (node.lower, node.upper, node.step) if part is not None])

    # --- the rest -------------------------------------------------------------------------------

    def _binary(self, node: ast.BinOp) -> Value:
        before = len(self.sites)
        value = joined([self.value(node.left), self.value(node.right)])
        if isinstance(node.op, (ast.Add, ast.Sub)) and len(self.sites) > before:
            meant = self.pairs.meant_in_sum(node)
            for number in range(before, len(self.sites)) if meant else ():
                if self.sites[number].rule in (*DETACH_RULES, "GS402"):
                    self.sites[number] = replace(self.sites[number], harmless=meant)
            if isinstance(node.op, ast.Sub):
                self.pairs.note(node.left, node.right, self.sites[before:])
        return value

    def _subscript(self, node: ast.Subscript) -> Value:
        self.value(node.slice)
        base = self.value(node.value)
        if gives_indices(node.value) and isinstance(node.slice, ast.Constant) and node.slice.value == 1:
            return INDEX
        return Value(base.atoms, "unknown") if base.kind == "plain" else base

    def _compare(self, node: ast.Compare) -> Value:
        for part in (node.left, *node.comparators):
            self.value(part)
        return INDEX

    def _conditional(self, node: ast.IfExp) -> Value:
        self.value(node.test)
        return joined([self.value(node.body), self.value(node.orelse)])

    def _walrus(self, node: ast.NamedExpr) -> Value:
        value = self.value(node.value)
        self.bind(node.target, self.as_computed(value))
        self.note_output(node.target, value.atoms)
        return value

    def _lambda(self, node: ast.Lambda) -> Value:
        return Value(self.value(node.body).atoms, "lambda")

    def _suspension(self, node: ast.Yield | ast.YieldFrom | ast.Await) -> Value:
        value = self.value(node.value)
        self.suspend(node, value)
        return value if isinstance(node, ast.Await) else UNKNOWN

    def _dict(self, node: ast.Dict) -> Value:
        values = [self.value(item) for item in node.values]
        self.hand_out(values)
        return joined(values) if values else UNKNOWN

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> Value:
        for generator in node.generators:
            self.bind_each(generator.target, generator.iter)
            for test in generator.ifs:
                self.value(test)
        if isinstance(node, ast.DictComp):
            self.value(node.key)
            return self.value(node.value)
        return self.value(node.elt)

    # Not in the objects: bound methods there would make cycles that hold every syntax tree in memory.
    rules: ClassVar[dict[type, Callable[[Any, Any], Value]]] = {
        ast.Constant: _plain, type(None): _plain, ast.Name: _name, ast.Attribute: _attribute, ast.BinOp: _binary,
        ast.Subscript: _subscript, ast.Compare: _compare, ast.IfExp: _conditional, ast.NamedExpr: _walrus,
        ast.Lambda: _lambda, ast.Dict: _dict, ast.ListComp: _comprehension, ast.SetComp: _comprehension,
        ast.GeneratorExp: _comprehension, ast.DictComp: _comprehension, ast.UnaryOp: _operand, ast.BoolOp: _any_of,
        ast.Slice: _slice, ast.Tuple: _elements, ast.List: _elements, ast.Set: _elements,
        ast.Yield: _suspension, ast.YieldFrom: _suspension, ast.Await: _suspension,
    }  # fmt: skip


def carries(value: Value) -> bool:
    """Tell whether a value is a tensor that was computed of something."""
    return value.kind == "tensor" and not all(atom.startswith("from:") for atom in value.atoms)


def cuts_of(value: Value) -> Value:
    """Return what is left of a value of which no gradient comes: where it was lost."""
    return Value(frozenset(atom for atom in value.atoms if atom.startswith(("cut:", "from:"))), "plain")


def as_array(value: Value) -> Value:
    """Return what another library makes of a value: no gradient comes to it, and none is lost in a block around it."""
    atoms = (atom for atom in value.atoms if not atom.startswith("in:"))
    return Value(frozenset(atom if atom.startswith(("off:", "cut:")) else f"off:{atom}" for atom in atoms), "array")


# Atoms of which no gradient comes anyway.
_STOPPED = ("off:", "in:", "cut:", "from:")
# What ``self`` keeps, as a value.
_KINDS = {"parameter": "tensor", "module": "module", "weightless": "module"}


def is_own(node: ast.AST) -> TypeGuard[ast.Attribute]:
    """Tell an attribute of ``self``."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _side_by_side(node: ast.expr) -> list[ast.expr | None]:
    """Return what ``zip`` and ``enumerate`` take items from, side by side; None stands for the number that counts."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
        return []
    if node.func.id == "enumerate":
        return [None, node.args[0]]
    return [*node.args] if node.func.id == "zip" and not any(isinstance(arg, ast.Starred) for arg in node.args) else []


def gives_indices(node: ast.expr) -> bool:
    """Tell whether a call gives ``(values, indices)``: the second of the two carries no gradient."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return node.func.attr in ("topk", "sort", "max", "min", "median", "kthvalue", "mode", "cummax", "cummin")
