"""Read one function: run its statements through ``values.py``, with its regions kept by ``regions.py``."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from gradscope.scanning.branches import leaves_in_training, may_be_empty, modes
from gradscope.scanning.calls import FROZEN
from gradscope.scanning.facts import APART, DATA, Call, Class, Function
from gradscope.scanning.instances import class_named, of_the_scan
from gradscope.scanning.lines import within
from gradscope.scanning.regions import Regions, root_of
from gradscope.scanning.signatures import (
    GIVE_LOSS,
    FunctionNode,
    gives_data,
    gives_integers,
    holds_no_floats,
    positional,
    with_plain_defaults,
    words,
)
from gradscope.scanning.switches import Names, Switch, add_imports
from gradscope.scanning.values import INDEX, PLAIN, Value, gives_indices, is_own, joined


class Body(Regions):
    """Reads one function: ``read`` gives the fact, ``sites`` and ``nested`` what was found on the way."""

    def __init__(self, node: FunctionNode, names: Names, klass: Class | None, name: str, outer: Body | None) -> None:
        super().__init__(node, names, klass, name)
        self.gives_value = False
        self.backward: set[str] | None = None
        self.nested: list[Function] = []
        self.classes: list[Class] = []
        self._binds_names = False
        self._gives_integers = gives_integers(node)
        self.steps: list[str] = []
        self.is_step = node.name in GIVE_LOSS or within(names.backward, node)
        if outer is not None:
            self.env = dict(outer.env)
            self.made = dict(outer.made)
            self.has_numbers = outer.has_numbers
            self.parameters = set(outer.parameters)

    def read(self) -> Function:
        """Run the whole function and return its fact."""
        node = self.node
        self._take_parameters(node.args)
        aliases = dict(self.names.aliases)
        for region in self._decorator_regions():
            self.regions.append(region)
        self._run(node.body)
        while self.regions:
            self._close(self.regions.pop())
        if self.gives_apart:
            self.returned.add(APART)
        if gives_data(node):
            self.returned.add(DATA)
        self.names.aliases = aliases
        self.sites = self.pairs.settled(self.sites) if self.sites else self.sites
        decorators = {self.names.dotted(item).rpartition(".")[2] for item in node.decorator_list}
        kind = "async" if isinstance(node, ast.AsyncFunctionDef) else "generator" if self.yields else ""
        decorators |= {"property"} if "cached_property" in decorators else set()
        kind = next((k for k in ("staticmethod", "classmethod", "property", "overload") if k in decorators), kind)
        return Function(
            name=self.function, line=node.lineno, end_line=node.end_lineno or node.lineno,
            parameters=tuple(sorted(self.parameters)), signature=positional(node),
            calls=tuple(dict.fromkeys(self.calls)), reads=frozenset(self.reads),
            returns=frozenset(self.returned), gives_value=self.gives_value, kind=kind,
            steps=tuple(dict.fromkeys(self.steps)),
            backward=None if self.backward is None else frozenset(self.backward),
        )  # fmt: skip

    @property
    def is_alone(self) -> bool:
        """Whether its fact and its sites are all there is of it, and the file's names are as they were before."""
        return not (self._binds_names or self.nested or self.classes or self.applied)

    # --- parameters and decorators --------------------------------------------------------------

    def _take_parameters(self, arguments: ast.arguments) -> None:
        # __call__ of a class without bases is anybody's: a trainer's, a validator's
        is_called = self.node.name == "__call__" and self.klass is not None and bool(self.klass.bases)
        is_forward = self.node.name == "forward" or is_called
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        plain = with_plain_defaults(arguments)
        for argument in [*every, *filter(None, (arguments.vararg, arguments.kwarg))]:
            name = argument.arg
            note = words(argument.annotation)
            if name in ("self", "cls"):
                continue
            if self.made:
                self.made.pop(name, None)
            telling = "" if argument is arguments.vararg else name  # *args are called so whatever they hold
            if holds_no_floats(telling, note) or (name in plain and "Tensor" not in note):
                self.env[name] = INDEX if "Tensor" in note else PLAIN
                continue
            self.parameters.add(name)
            if note[:1].isupper() and "Tensor" not in note:
                self.note_class(name, of_the_scan(class_named(argument.annotation, self.names), self.names))
            is_tensor = "Tensor" in note or (is_forward and not note)
            kind = "module" if "Module" in note else "tensor" if is_tensor else "unknown"
            self.env[name] = Value(frozenset({f"param:{name}"}), kind)

    # --- statements -----------------------------------------------------------------------------

    def _run(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        rule = self.statements.get(type(node))
        if rule is not None:
            rule(self, node)
            return
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child)

    def _annotated(self, node: ast.AnnAssign) -> None:
        if node.value:
            self._assign([node.target], node.value)

    def _augmented(self, node: ast.AugAssign) -> None:
        self._assign([node.target], node.value, also=self.value(node.target))

    def _return(self, node: ast.Return) -> None:
        before = len(self.sites)
        if isinstance(node.value, ast.Tuple):
            parts = [self.value(element) for element in node.value.elts]
            value = joined(parts)
            self.hand_out(parts)
        else:
            value = self._handed_out(node.value)
            given = node.value
            if given is not None and is_own(given) and self.klass is not None and given.attr in self.klass.methods:
                self.calls.append(Call(f"self.{given.attr}", sometimes=self.sometimes))  # who asks for it calls it
            self.note_results_of_one_call([value])
        if node.value is not None:
            self.note_names(node.value, (), before)
        self._give(value, bool(node.value))

    def _for(self, node: ast.For | ast.AsyncFor) -> None:
        if isinstance(node, ast.AsyncFor):
            self.suspended(node.iter, "await")
        self.bind_each(node.target, node.iter)
        before, sites = dict(self.env) if may_be_empty(node.iter) else {}, len(self.sites)
        self._loop([*node.body, *node.orelse])
        if any(site.how == "block" for site in self.sites[sites:]):
            self.env.update({name: _merged(value, self.env[name]) for name, value in before.items()})

    def _while(self, node: ast.While) -> None:
        self.value(node.test)
        self._loop([*node.body, *node.orelse])

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        self._binds_names = True
        add_imports(self.names.imports, node, self.names.module)

    def _try(self, node: ast.Try) -> None:
        for part in (node.body, *(handler.body for handler in node.handlers), node.orelse, node.finalbody):
            self._run(part)

    def _match(self, node: ast.Match) -> None:
        self.value(node.subject)
        for case in node.cases:
            self._run(case.body)

    def _leave(self, node: ast.Raise | ast.Assert) -> None:
        """What is shown in an error, or only checked, is part of no result."""

    def _loop(self, body: Sequence[ast.stmt]) -> None:
        self._loops += 1
        self._run(body)
        self._loops -= 1

    def _if(self, node: ast.If) -> None:
        self.value(node.test)
        before, before_sometimes = dict(self.env), self.sometimes
        in_body, in_else = modes(node.test)
        self.sometimes = before_sometimes or in_body
        before_body = len(self.calls)
        body_gives_apart = self._arm(node, node.body, is_first=True)
        after_calls = len(self.calls)
        after_body, self.env = self.env, before
        self.sometimes = before_sometimes or in_else
        else_gives_apart = self._arm(node, node.orelse, is_first=False)
        self.gives_apart = self.gives_apart or (body_gives_apart and else_gives_apart)
        self.sometimes = before_sometimes
        if leaves_in_training(node):
            self.sometimes = "evaluation"
            self.conditions.append((node.test, False))
        either = {call.target for call in self.calls[before_body:after_calls]}
        either &= {call.target for call in self.calls[after_calls:]}
        for number in range(before_body, len(self.calls) if either else 0):
            if self.calls[number].target in either:  # made whatever the condition says
                self.calls[number] = self.calls[number]._replace(sometimes=before_sometimes)
        for name, value in after_body.items():
            other = self.env.get(name)
            if other is not value:
                self.env[name] = value if other is None or other == value else _merged(value, other)

    def _arm(self, node: ast.If, body: Sequence[ast.stmt], is_first: bool) -> bool:
        """Run one arm of an ``if``; tell whether it gives stopped values apart from others, or gives nothing at all."""
        before, self.gives_apart = self.gives_apart, False
        depth = len(self.conditions)
        self.conditions.append((node.test, is_first))
        self._run(body)
        del self.conditions[depth:]
        gives_apart, self.gives_apart = self.gives_apart, before
        return gives_apart or (bool(body) and isinstance(body[-1], ast.Raise))

    def _assign(self, targets: Sequence[ast.expr], node: ast.expr, also: Value = PLAIN) -> None:
        switch = self.names.switch(node) if not self.names.none_here and isinstance(node, _SWITCH_FORMS) else None
        if switch is not None:
            self._alias(targets, switch)
            return
        if not self.names.none_here and (self.renamed or isinstance(node, (ast.Attribute, ast.IfExp))):
            self.rename_parts(targets, node)
        if isinstance(targets[0], ast.Attribute) and all(getattr(target, "attr", "") == "data" for target in targets):
            self.discarded = node  # weight.data = f(...) gives the graph nothing
        before = len(self.sites)
        value = self.value(node)
        if isinstance(node, ast.Dict) or (isinstance(targets[0], ast.Subscript) and len(self.sites) > before):
            self.note_names(node, targets, before)
        if also is not PLAIN:
            value = Value(value.atoms | also.atoms, also.kind)
        made = self.class_of(node) if self.making is None and (self.made or isinstance(node, ast.Call)) else ""
        for target in targets:
            if isinstance(target, ast.Name) and self.function and not self.regions:  # by far the most
                self.env[target.id] = value
            else:
                self._assign_to(target, node, value)
            if self.making is not None:
                self.note_made(target, node)
            elif isinstance(target, ast.Name) and (made or self.made):
                self.note_class(target.id, made)

    def _assign_to(self, target: ast.expr, node: ast.expr, value: Value) -> None:
        computed = self.as_computed(value)
        self.bind(target, computed)
        self.keep(target, computed.atoms)
        if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
            self.hand_out([computed])
        self.note_output(target, value.atoms, value.kind)
        if isinstance(target, ast.Name) and self.function:
            return
        self._keep_applied(target, node)
        if isinstance(target, ast.Tuple) and len(target.elts) == 2 and gives_indices(node):
            self.bind(target.elts[1], INDEX)
        if isinstance(target, ast.Attribute) and target.attr == "requires_grad":
            off = isinstance(node, ast.Constant) and node.value is False
            if off:
                base = self.value(target.value)
                self.report(target, "GS901", "requires_grad = False", base, FROZEN)

    def _alias(self, targets: Sequence[ast.expr], switch: Switch) -> None:
        self._binds_names = True
        if self.conditions and switch.disables:
            switch = Switch(switch.mechanism, None, switch.wrapper, switch.called)
        for target in targets:
            name = self.names.dotted(target)
            known = self.names.aliases.get(name)
            if name and not (known and known.disables is not False):
                self.names.aliases[name] = switch

    def _give(self, value: Value, something: bool = True) -> None:
        self.gives_value = self.gives_value or something
        if self._gives_integers:
            value = INDEX
        self.returned |= self.as_computed(value).atoms
        if value.kind in ("function", "lambda"):
            return  # it runs later, when the region is long closed
        for region in self._effective_regions():
            region.returned |= value.atoms

    def _expression(self, statement: ast.Expr) -> None:
        node = statement.value
        if isinstance(node, ast.Call) and self._switch_statement(node):
            return
        self.discarded = node
        value = self.value(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and self.is_step:
            if node.func.attr in _BACKWARD:
                self._go_backward(node, node.func, value)
            elif node.func.attr == "step":  # scaler.step(optimizer)
                self.steps += [self.names.dotted(each) for each in (node.func.value, *node.args)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _hands_over(node.func.attr):
            self.hand_over(node, node.func)
        # x.copy_(y), self.cache.append(y): what is changed in place comes out of the region too
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _changes(node.func.attr):
            base = node.func.value
            given = self._silently(node.args)
            atoms = joined(given).atoms
            if node.func.attr == "set":  # tensordict.set(key, value)
                self.hand_out(given)
            if isinstance(base, (ast.Name, ast.Attribute, ast.Subscript)) and atoms and not is_own(node.func):
                self.note_output(base, atoms)
                self.keep(base, atoms)
                root = root_of(base)
                if root in self.env:
                    self.env[root] = _merged(self.env[root], self.as_computed(Value(atoms)))

    def _go_backward(self, node: ast.Call, func: ast.Attribute, value: Value) -> None:
        """``loss.backward()``, ``scaler.scale(loss).backward()``, ``accelerator.backward(loss)``: a training step."""
        loss = joined([value, *self._silently([func.value, *node.args])])
        self.backward = (self.backward or set()) | self.as_computed(loss).atoms
        self._give(loss, something=False)

    def _handed_out(self, node: ast.expr | None) -> Value:
        """Return the value of what is given back; a function given back by its name is not called here."""
        known = self.env.get(node.id) if isinstance(node, ast.Name) else None
        return known if known is not None and known.kind == "function" else self.value(node)

    def suspend(self, node: ast.Yield | ast.YieldFrom | ast.Await, value: Value) -> None:
        """Take a value that is given out in the middle of the function."""
        if isinstance(node, ast.Await):
            self.suspended(node, "await")
            return
        self.yields = True
        self._give(value)
        self.suspended(node, "yield")

    def _with(self, node: ast.With | ast.AsyncWith) -> None:
        if isinstance(node, ast.AsyncWith):
            self.suspended(node.items[0].context_expr, "await")
        depth = len(self.regions)
        bound = self._open_with(node)
        before = (self.reads, self.runs, len(self.calls))
        self.reads, self.runs = set(), set()
        self._run(node.body)
        runs = self.runs | {f"attr:{name}" for name in self.reads}
        runs |= {f"call:{call.target}" for call in self.calls[before[2] :]}
        self.reads |= before[0]
        self.runs = before[1] | runs
        self._close_with(node, depth, bound, frozenset(runs))

    def _inner_function(self, node: FunctionNode) -> None:
        inner = Body(node, self.names, self.klass, f"{self.function}.{node.name}", self)
        fact = inner.read()
        self.nested += [fact, *inner.nested]
        self._take_over(inner)
        self.calls += fact.calls
        self.reads |= fact.reads
        self.env[node.name] = Value(fact.returns, "function")

    def _take_over(self, inner: Body) -> None:
        self.sites += inner.sites
        self.applied += inner.applied
        self.classes += inner.classes

    def _inner_class(self, node: ast.ClassDef) -> None:
        """Read the methods of a class made inside a function; nothing outside can call them by name."""
        name = f"{self.function}.{node.name}"
        bases = tuple(filter(None, (self.names.dotted(base) for base in node.bases)))
        methods = [item for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))]
        klass = Class(name, node.lineno, bases, tuple(method.name for method in methods))
        self.classes.append(klass)
        for method in methods:
            inner = Body(method, self.names, klass, f"{name}.{method.name}", self)
            self.nested += [inner.read(), *inner.nested]
            self._take_over(inner)

    statements: ClassVar[dict[type, Callable[[Any, Any], None]]] = {
        ast.Assign: lambda self, node: self._assign(node.targets, node.value), ast.AnnAssign: _annotated,
        ast.AugAssign: _augmented, ast.Expr: _expression, ast.Return: _return, ast.If: _if, ast.For: _for,
        ast.AsyncFor: _for, ast.While: _while, ast.With: _with, ast.AsyncWith: _with, ast.FunctionDef: _inner_function,
        ast.AsyncFunctionDef: _inner_function, ast.ClassDef: _inner_class, ast.Import: _import,
        ast.ImportFrom: _import, ast.Try: _try, getattr(ast, "TryStar", ast.Try): _try, ast.Match: _match,
        ast.Raise: _leave, ast.Assert: _leave,
    }  # fmt: skip


_HANDS_OVER = re.compile(r"(?:set|condition|inject|feed|attach|store|remember|cache)_")
_BACKWARD = ("backward", "manual_backward")
_SWITCH_FORMS = (ast.Call, ast.IfExp, ast.Name, ast.Attribute, ast.BoolOp, ast.Lambda)


def _merged(first: Value, second: Value) -> Value:
    kind = first.kind if first.kind == second.kind else "tensor" if "tensor" in (first.kind, second.kind) else "unknown"
    for value, other in ((first, second), (second, first)):
        if value.kind == "number" and not other.atoms and kind == "unknown":
            kind = "number"
    return Value(first.atoms | second.atoms, kind)


@lru_cache(maxsize=4096)
def _hands_over(method: str) -> bool:
    return _HANDS_OVER.match(method) is not None


def _changes(method: str) -> bool:
    return method.endswith("_") or method in ("append", "extend", "add", "update", "insert", "appendleft", "put", "set")
