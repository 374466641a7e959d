"""Read one function: run its statements through ``values.py`` and close every region it opens.

A region is a stretch under one switch: the whole body below a decorator, the block of a ``with``, the
rest of the function after a bare ``set_grad_enabled(False)``. What matters of it is what comes out:
the values that are returned, used after it, or stored on ``self``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from gradscope.scanning.facts import NOTHING, Atoms, Class, Function, How, Site
from gradscope.scanning.switches import Names, Switch, effective, rule_of
from gradscope.scanning.torch_ops import INTEGER_ANNOTATIONS, INTEGER_NAMES
from gradscope.scanning.values import INDEX, PLAIN, Expressions, Value, gives_indices

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
_INTEGER_NAME = re.compile(INTEGER_NAMES)
_INTEGER_ANNOTATION = re.compile(INTEGER_ANNOTATIONS)
_INTEGER_TENSOR = re.compile(r"(?:Long|Int|Bool|Byte)Tensor")
_FLOAT_TENSOR = re.compile(r"(?<!Long)(?<!Int)(?<!Bool)(?<!Byte)Tensor")
ASYNC = "a decorator on an async function covers only the making of the coroutine: gradients stay on"
BARE = "a switch that is neither entered nor applied does nothing"
NOT_TRAINING = "only outside training"


@dataclass(slots=True)
class Region:
    """A stretch under a switch while it is open, and what has come out of it so far."""

    switch: Switch
    how: How
    line: int
    column: int
    end_line: int
    harmless: str = ""
    conditional: bool = False
    names: dict[str, Atoms] = field(default_factory=dict)
    returned: set[str] = field(default_factory=set)
    effects: set[str] = field(default_factory=set)


class Body(Expressions):
    """Reads one function; ``close`` gives the fact and the sites."""

    def __init__(self, node: FunctionNode, names: Names, klass: Class | None, name: str, outer: Body | None) -> None:
        super().__init__(names, klass, name)
        self.node = node
        self.regions: list[Region] = []
        self.returned: set[str] = set()
        self.gives_value = False
        self.yields = False
        self.nested: list[Function] = []
        self._conditions: list[tuple[ast.expr, bool]] = []  # the tests of the enclosing ifs, and which arm
        self._loops = 0
        note = _words(node.returns)
        self._gives_integers = bool(_INTEGER_TENSOR.search(note)) and not _FLOAT_TENSOR.search(note)
        self._last_loads: dict[str, int] | None = None
        if outer is not None:
            self.env = dict(outer.env)
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
        self.names.aliases = aliases
        decorators = {self.names.dotted(item).rpartition(".")[2] for item in node.decorator_list}
        kind = "async" if isinstance(node, ast.AsyncFunctionDef) else "generator" if self.yields else ""
        kind = next((k for k in ("staticmethod", "classmethod", "property", "overload") if k in decorators), kind)
        return Function(
            name=self.function, line=node.lineno, end_line=node.end_lineno or node.lineno,
            parameters=tuple(sorted(self.parameters)), signature=_signature(node),
            calls=tuple(dict.fromkeys(self.calls)), reads=frozenset(self.reads),
            returns=frozenset(self.returned), gives_value=self.gives_value, kind=kind,
        )  # fmt: skip

    # --- parameters and decorators --------------------------------------------------------------

    def _take_parameters(self, arguments: ast.arguments) -> None:
        # __call__ of a class without bases is anybody's: a trainer's, a validator's
        is_called = self.node.name == "__call__" and self.klass is not None and bool(self.klass.bases)
        is_forward = self.node.name == "forward" or is_called
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        for argument in [*every, *filter(None, (arguments.vararg, arguments.kwarg))]:
            name = argument.arg
            note = _words(argument.annotation)
            if name in ("self", "cls"):
                continue
            if "Float" not in note and (_INTEGER_ANNOTATION.search(note) or _INTEGER_NAME.search(name)):
                self.env[name] = INDEX if "Tensor" in note else PLAIN
                continue
            self.parameters.add(name)
            is_tensor = "Tensor" in note or (is_forward and not note)
            kind = "module" if "Module" in note else "tensor" if is_tensor else "unknown"
            self.env[name] = Value(frozenset({f"param:{name}"}), kind)

    def _decorator_regions(self) -> list[Region]:
        node = self.node
        found = [(item, self.names.switch(item)) for item in node.decorator_list]
        switches = [(item, switch) for item, switch in found if switch]
        regions: list[Region] = []
        for position, (item, switch) in enumerate(switches):
            inward = [each for _, each in switches[position:]]
            if switch.disables is False or effective(inward) is None:
                continue
            harmless = ASYNC if isinstance(node, ast.AsyncFunctionDef) else ""
            end = node.end_lineno or node.lineno
            regions.append(Region(switch, "decorator", item.lineno, item.col_offset + 1, end, harmless))
        return regions

    # --- statements -----------------------------------------------------------------------------

    def _run(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:  # noqa: C901, PLR0912 - one branch a kind of statement
        if isinstance(node, ast.Assign):
            self._assign(node.targets, node.value)
        elif isinstance(node, ast.AnnAssign):
            self._assign([node.target], node.value) if node.value else None
        elif isinstance(node, ast.AugAssign):
            self._assign([node.target], node.value, also=self.value(node.target))
        elif isinstance(node, ast.Expr):
            self._expression(node.value)
        elif isinstance(node, ast.Return):
            self._give(self.value(node.value), bool(node.value))
        elif isinstance(node, ast.If):
            self._if(node)
        elif isinstance(node, (ast.For, ast.AsyncFor)):
            self.bind(node.target, self.value(node.iter))
            self._loop([*node.body, *node.orelse])
        elif isinstance(node, ast.While):
            self.value(node.test)
            self._loop([*node.body, *node.orelse])
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            self._with(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self._inner_function(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            add_imports(self.names.imports, node, self.names.module)
        elif isinstance(node, ast.Try) or type(node).__name__ == "TryStar":
            for part in (node.body, *(h.body for h in node.handlers), node.orelse, node.finalbody):  # type: ignore[attr-defined]
                self._run(part)
        elif isinstance(node, ast.Match):
            self.value(node.subject)
            for case in node.cases:
                self._run(case.body)
        elif isinstance(node, ast.ClassDef):
            self._inner_class(node)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self.value(child)

    def _loop(self, body: Sequence[ast.stmt]) -> None:
        self._loops += 1
        self._run(body)
        self._loops -= 1

    def _if(self, node: ast.If) -> None:
        self.value(node.test)
        before, before_sometimes = dict(self.env), self.sometimes
        self.sometimes = before_sometimes or _asks_for_training(node.test)
        self._conditions.append((node.test, True))
        self._run(node.body)
        after_body, self.env = self.env, before
        self._conditions[-1] = (node.test, False)
        self._run(node.orelse)
        self._conditions.pop()
        self.sometimes = before_sometimes
        for name, value in after_body.items():
            other = self.env.get(name)
            self.env[name] = value if other is None or other == value else _merged(value, other)

    def _assign(self, targets: Sequence[ast.expr], node: ast.expr, also: Value = PLAIN) -> None:
        switch = self.names.switch(node) if isinstance(node, _SWITCH_FORMS) else None
        if switch is not None:
            self._alias(targets, switch)
            return
        if all(isinstance(target, ast.Attribute) and target.attr == "data" for target in targets):
            self.discarded = node  # weight.data = f(...) gives the graph nothing
        value = self.value(node)
        if also is not PLAIN:
            value = Value(value.atoms | also.atoms, also.kind)
        for target in targets:
            self.bind(target, value)
            self._note_output(target, value.atoms)
            if isinstance(target, ast.Tuple) and len(target.elts) == 2 and gives_indices(node):
                self.bind(target.elts[1], INDEX)
            if isinstance(target, ast.Attribute) and target.attr == "requires_grad":
                off = isinstance(node, ast.Constant) and node.value is False
                if off:
                    base = self.value(target.value)
                    self.report(target, "GS901", "requires_grad = False", base, "frozen, and frozen is not blocked")

    def _alias(self, targets: Sequence[ast.expr], switch: Switch) -> None:
        if self._conditions and switch.disables:
            switch = Switch(switch.mechanism, None, switch.wrapper, switch.called)
        for target in targets:
            name = self.names.dotted(target)
            known = self.names.aliases.get(name)
            if name and not (known and known.disables is not False):
                self.names.aliases[name] = switch

    def _note_output(self, target: ast.expr, atoms: Atoms) -> None:
        if not self.regions or not atoms:
            return
        open_regions = self._effective_regions()
        for part in ast.walk(target):
            if isinstance(part, ast.Name):
                for region in open_regions:
                    region.names[part.id] = region.names.get(part.id, NOTHING) | atoms
                    if part.id == "self":
                        region.effects |= atoms

    def _effective_regions(self) -> list[Region]:
        switches = [region.switch for region in self.regions]
        return [
            region
            for position, region in enumerate(self.regions)
            if region.switch.disables is not False and effective(switches[position:]) is not None
        ]

    def _give(self, value: Value, something: bool = True) -> None:
        self.gives_value = self.gives_value or something
        if self._gives_integers:
            value = INDEX
        self.returned |= value.atoms
        for region in self._effective_regions():
            region.returned |= value.atoms

    def _expression(self, node: ast.expr) -> None:
        if isinstance(node, (ast.Yield, ast.YieldFrom)):
            self._yield(node)
            return
        if isinstance(node, ast.Await):
            self._leak(node, "await")
        if isinstance(node, ast.Call) and self._switch_statement(node):
            return
        self.discarded = node
        self.value(node)
        # x.copy_(y), self.cache.append(y): what is changed in place comes out of the region too
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _changes(node.func.attr):
            base = node.func.value
            atoms = self._silently(node.args)
            if isinstance(base, (ast.Name, ast.Attribute, ast.Subscript)) and atoms and not _is_own_method(node.func):
                self._note_output(base, atoms)
                if isinstance(base, ast.Name) and base.id in self.env:
                    self.env[base.id] = _merged(self.env[base.id], Value(atoms, "unknown"))

    def _silently(self, nodes: Sequence[ast.expr]) -> Atoms:
        """Return the atoms of expressions that were evaluated before: nothing is noted twice."""
        kept = (self.calls, self.sites, set(self.reads))
        self.calls, self.sites = [], []
        atoms = frozenset[str]().union(*(self.value(node).atoms for node in nodes))
        self.calls, self.sites, self.reads = kept
        return atoms

    def _yield(self, node: ast.Yield | ast.YieldFrom) -> None:
        self.yields = True
        self._give(self.value(node.value))
        self._leak(node, "yield")

    def _leak(self, node: ast.expr, word: str) -> None:
        """A ``with`` region stays on while the consumer (or another task) runs; a decorated body does not."""
        blocks = [region for region in self._effective_regions() if region.how == "block"]
        decorators = {self.names.dotted(item).rpartition(".")[2] for item in self.node.decorator_list}
        if blocks and not decorators & {"contextmanager", "asynccontextmanager"}:
            self.report(node, "GS107", f"{word} inside {blocks[-1].switch.mechanism}", Value(frozenset(self.returned)))

    def _switch_statement(self, node: ast.Call) -> bool:
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("enter_context", "enter_async_context"):
            switch = self.names.switch(node.args[0]) if node.args else None
            if switch is not None and switch.disables is not False:
                self._open(switch, "block", node)
            return switch is not None
        switch = self.names.switch(node)
        if switch is None:
            return False
        if switch.mechanism == "set_grad_enabled":
            self._switched_for_good(switch, node)
        elif not switch.wrapper and switch.disables:
            self.report(node, "GS107", f"bare {switch.mechanism}()", harmless=BARE)
        return True

    def _switched_for_good(self, switch: Switch, node: ast.Call) -> None:
        kept = [region for region in self.regions if region.how != "call"]
        for region in self.regions:
            if region.how == "call":
                self._close(region)
        self.regions = kept
        if switch.disables is not False:
            self._open(switch, "call", node)

    # --- regions --------------------------------------------------------------------------------

    def _open(self, switch: Switch, how: How, node: ast.expr) -> Region:
        conditional = switch.disables is None or bool(self._conditions)
        harmless = NOT_TRAINING if any(_is_outside_training(*each) for each in self._conditions) else ""
        end = self.node.end_lineno or node.lineno
        region = Region(switch, how, node.lineno, node.col_offset + 1, end, harmless, conditional)
        self.regions.append(region)
        return region

    def _with(self, node: ast.With | ast.AsyncWith) -> None:
        depth = len(self.regions)
        for item in node.items:
            switch = self.names.switch(item.context_expr)
            if switch is None:
                value = self.value(item.context_expr)
                if item.optional_vars is not None:
                    self.bind(item.optional_vars, value)
                continue
            region = self._open(switch, "block", item.context_expr)
            region.end_line = node.end_lineno or node.lineno
        self._run(node.body)
        while len(self.regions) > depth:
            region = self.regions.pop()
            self._keep_what_is_used_later(region)
            self._close(region)

    def _keep_what_is_used_later(self, region: Region) -> None:
        if self._last_loads is None:
            self._last_loads = {}
            for part in ast.walk(self.node):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
                    self._last_loads[part.id] = max(part.lineno, self._last_loads.get(part.id, 0))
        loads = self._last_loads
        region.names = {
            name: atoms
            for name, atoms in region.names.items()
            if loads.get(name, 0) > region.end_line or (self._loops and name in loads)
        }

    def _close(self, region: Region) -> None:
        if region.switch.disables is False:
            return
        # What a decorated function leaves in a local name is gone; what it gives back and stores is not.
        leaves = region.names.values() if region.how == "block" else ()
        depends = frozenset(region.returned).union(*leaves) if leaves else frozenset(region.returned)
        self.sites.append(
            Site(
                rule_of(region.switch, region.how), region.line, region.column, region.line, self.function,
                region.switch.wrapper or region.switch.mechanism, region.how, depends,
                frozenset(region.effects), tuple(sorted(region.names)) if region.how == "block" else (),
                region.conditional or region.switch.disables is None, region.harmless,
            )
        )  # fmt: skip

    def _inner_function(self, node: FunctionNode) -> None:
        inner = Body(node, self.names, self.klass, f"{self.function}.{node.name}", self)
        fact = inner.read()
        self.nested += [fact, *inner.nested]
        self.sites += inner.sites
        self.calls += fact.calls
        self.reads |= fact.reads
        self.env[node.name] = Value(fact.returns, "unknown")

    def _inner_class(self, node: ast.ClassDef) -> None:
        """Read the methods of a class made inside a function; nothing outside can call them by name."""
        name = f"{self.function}.{node.name}"
        bases = tuple(filter(None, (self.names.dotted(base) for base in node.bases)))
        methods = [item for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))]
        klass = Class(name, node.lineno, bases, tuple(method.name for method in methods))
        for method in methods:
            inner = Body(method, self.names, klass, f"{name}.{method.name}", self)
            self.nested += [inner.read(), *inner.nested]
            self.sites += inner.sites


_SWITCH_FORMS = (ast.Call, ast.IfExp, ast.Name, ast.Attribute, ast.BoolOp)


def add_imports(imports: dict[str, str], node: ast.Import | ast.ImportFrom, module: str) -> None:
    """Note what an import binds; relative ones are resolved (a package's own file ends in ``.__init__``)."""
    if isinstance(node, ast.Import):
        for name in node.names:
            imports[name.asname or name.name.partition(".")[0]] = (
                name.name if name.asname else name.name.partition(".")[0]
            )
        return
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        base = ".".join([*parts[: max(len(parts) - node.level, 0)], *([base] if base else [])])
    for name in node.names:
        imports[name.asname or name.name] = f"{base}.{name.name}" if base else name.name


def _signature(node: FunctionNode) -> tuple[str, ...]:
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    return tuple(names[1:] if names[:1] in (["self"], ["cls"]) else names)


def _merged(first: Value, second: Value) -> Value:
    kind = first.kind if first.kind == second.kind else "tensor" if "tensor" in (first.kind, second.kind) else "unknown"
    return Value(first.atoms | second.atoms, kind)


def _changes(method: str) -> bool:
    return method.endswith("_") or method in ("append", "extend", "add", "update", "insert", "appendleft", "put")


def _is_own_method(func: ast.Attribute) -> bool:
    return isinstance(func.value, ast.Name) and func.value.id == "self"


def _words(annotation: ast.expr | None) -> str:
    """Return the names in an annotation (``ast.unparse`` would take longer than reading the function)."""
    if annotation is None:
        return ""
    if isinstance(annotation, ast.Name):
        return annotation.id
    found = []
    for part in ast.walk(annotation):
        if isinstance(part, ast.Name):
            found.append(part.id)
        elif isinstance(part, ast.Attribute):
            found.append(part.attr)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            found.append(part.value)
    return " ".join(found)


def _asks_for_training(test: ast.expr) -> bool:
    """Tell ``self.training``, alone, negated or as one of several conditions."""
    for part in test.values if isinstance(test, ast.BoolOp) else [test]:
        asked = part.operand if isinstance(part, ast.UnaryOp) else part
        if isinstance(asked, ast.Attribute) and asked.attr == "training":
            return True
    return False


def _is_outside_training(test: ast.expr, first_arm: bool) -> bool:
    condition = ast.unparse(test)
    if not first_arm:
        return condition in ("self.training", "training", "model.training", "torch.is_grad_enabled()")
    return condition in ("not self.training", "not model.training", "not training", "not torch.is_grad_enabled()")
