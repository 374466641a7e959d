"""One file to facts: the classes and functions with a hit, what they call, and the sites in them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from gradscope.scanning.blanking import CONSTRUCTORS
from gradscope.scanning.body import Body
from gradscope.scanning.copies import Copies, CopiesInFile
from gradscope.scanning.facts import Class, FileFacts, Function, Site
from gradscope.scanning.ignores import ignores
from gradscope.scanning.keeping import Keeping, called_on_self
from gradscope.scanning.lines import count_within, line_numbers, within
from gradscope.scanning.makers import Making, gives, is_named, one_of, own_statements, table
from gradscope.scanning.operators import is_custom_op, without_autograd, without_gradient
from gradscope.scanning.optimizers import frozen, optimizers
from gradscope.scanning.reading import (
    GRAD_MODE,
    INITIALISERS,
    Needles,
    buffers_registered,
    calls_of_backward,
    kept_parameters,
    made_by_script,
    parameters_made,
    parse,
    places,
    tensor_ops,
)
from gradscope.scanning.signatures import GIVE_LOSS, FunctionNode
from gradscope.scanning.switches import Names, Switch, add_imports, rule_of
from gradscope.scanning.wrappers import statements, wrapper_of_class, wrapper_of_function


class FileReader:
    """Reads one file: parses the blocks that hold a needle, and reads whole the classes with a deep one."""

    def __init__(
        self,
        facts: FileFacts,
        is_package: bool,
        roots: frozenset[str],
        wrappers: Mapping[str, str],
        known: Copies,
        makers: Iterable[str] = (),
    ) -> None:
        self.facts = facts
        self._known = known
        self._makers = makers
        module = f"{facts.module}.__init__" if is_package else facts.module
        self.names = Names(facts.imports, wrappers, module, roots)
        self._lines: list[int] = []
        self._deep: list[int] = []
        self._switches: list[int] = []
        self._left_out: dict[str, list[str]] = {}
        self._source = ""
        self._kept_parameters: dict[str, list[str]] = {}
        self._registering: list[int] | None = None
        self._applied: list[tuple[Site, str, str]] = []

    def read(self, source: str, needles: Needles) -> FileFacts:
        """Fill the facts from the source; a file that cannot be parsed says so in ``skipped``."""
        # In a file that names none of the wrappers, what was read of its functions before still holds.
        self.names.wrappers = {
            name: mechanism for name, mechanism in self.names.wrappers.items() if name.rpartition(".")[2] in source
        }
        # Scripts and what makes a model are read with an eye on what each name is an instance of.
        self.names.makers = frozenset(name for name in self._makers if is_named(name, self.facts.module, source))
        backward = calls_of_backward(source)
        trains = bool(self._makers) and needles.operations and bool(backward)
        self.names.is_glue = trains or bool(self.names.makers)
        switches = Needles().deep(source)
        needles = needles.with_renames(source, switches)
        deep = needles.deep(source) if len(needles.names) > len(GRAD_MODE) else switches
        parameters = parameters_made(source)
        others = tensor_ops(source, parameters) if needles.operations else []
        others += made_by_script(source, backward, self.names.is_glue) if needles.operations else []
        offsets = sorted([*deep, *others])
        parsed = parse(source, offsets, deep, () if self.names.wrappers or self.names.is_glue else self._known)
        self.facts.skipped = parsed.skipped
        tree = parsed.tree
        if tree is None:
            return self.facts
        self._left_out = parsed.blanked.left_out
        self._copies = CopiesInFile(self._known, self.names, source, parsed.blanked)
        self._source = self.names.source = source
        self._kept_parameters = kept_parameters(source, parameters)
        self.facts.parsed = True
        self._lines = line_numbers(source, offsets)
        line_of = dict(zip(offsets, self._lines, strict=True))
        self._deep = [line_of[at] for at in deep]
        self._switches = [line_of[at] for at in switches]
        self.facts.ignores = ignores(source)
        self._note_steps(source, backward, tree.body)
        if self.names.is_glue:
            self._made_at_top(tree.body)
        loose = self._top_level(tree.body)
        if any(within(self._lines, node) for node in loose):
            self._module_body(loose)
        self._land_applied()
        self.facts.sites = list({(site.line, site.column, site.rule): site for site in self.facts.sites}.values())
        self.facts.sites.sort(key=lambda site: (site.line, site.column))
        return self.facts

    def _note_steps(self, source: str, backward: list[int], body: Sequence[ast.stmt]) -> None:
        """Take note of where a file goes backward, and of what it hands to optimizers if it does."""
        self.facts.frozen = frozen(source)
        self.names.backward = line_numbers(source, sorted([*backward, *places(source, "manual_backward(")]))
        if self.names.backward or _gives_loss(body):
            self.facts.optimizers = optimizers(source)
            self.names.handed = frozenset(name for each in self.facts.optimizers for name in each.given)

    # --- the top level --------------------------------------------------------------------------

    def _top_level(self, body: Sequence[ast.stmt], *, whole: bool = False) -> list[ast.stmt]:
        """Read definitions; return the statements that run when the module does: ``whole``, or those with a hit.

        What a module does as a program counts where that is to train.
        """
        loose: list[ast.stmt] = []
        for node in body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                add_imports(self.names.imports, node, self.names.module)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self._function(node)
            elif isinstance(node, ast.ClassDef):
                self._class(node, "")
            elif isinstance(node, (ast.If, ast.Try)):
                is_program = isinstance(node, ast.If) and _is_main(node.test)
                if is_program and not within(self.names.backward, node):
                    continue
                for part in _branches(node):
                    loose += self._top_level(part, whole=is_program)
            elif any(isinstance(part, _DEFINITIONS) for part in statements(getattr(node, "body", ()))):
                loose += self._top_level(node.body)  # type: ignore[attr-defined]
            elif whole or within(self._lines, node):
                self._module_alias(node)
                loose.append(node)
        return loose

    def _made_at_top(self, body: Sequence[ast.stmt]) -> None:
        """Take note of what a script's own names are instances of, and of the tables that models are got from."""
        making = Making(self.names)
        for node in statements(body):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                add_imports(self.names.imports, node, self.names.module)
        for node in own_statements(body):
            if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
                continue
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                making.assign(target, node.value)
                kept = table(node.value, self.names) if isinstance(target, ast.Name) else {}
                if kept and isinstance(target, ast.Name):
                    self.facts.tables[target.id] = kept
        self.names.instances = {name: made for name, kinds in making.held.items() if (made := one_of(kinds))}

    def _module_alias(self, node: ast.stmt) -> None:
        """``inference = torch.no_grad``: a name of the package's own for a switch."""
        if not isinstance(node, ast.Assign) or not within(self._deep, node):
            return
        switch = self.names.switch(node.value)
        for target in node.targets:
            if switch is not None and isinstance(target, ast.Name):
                self.names.aliases[target.id] = switch
                if switch.disables and not switch.called:
                    self.facts.wrappers[f"{self.facts.module}.{target.id}"] = switch.mechanism

    def _module_body(self, loose: list[ast.stmt]) -> None:
        """Read what runs at import as if it were a function without a name."""
        template = ast.parse("def _(): pass").body[0]
        assert isinstance(template, ast.FunctionDef)
        template.body, template.name = loose, ""
        template.end_lineno = max(node.end_lineno or 0 for node in loose)
        body = Body(template, self.names, None, "", None)
        own = body.read()
        if own.goes_backward:  # a script that trains
            self._keep(replace(own, name="<module>", line=loose[0].lineno))
        self._take(body)

    # --- functions and classes ------------------------------------------------------------------

    def _function(self, node: FunctionNode) -> None:
        if within(self._lines, node):
            self._definition(node, None, node.name)

    def _definition(self, node: FunctionNode, klass: Class | None, name: str) -> None:
        """Read a function or method, if none like it was read before; a wrapper becomes a name to look for."""
        none_here = self._none_in(node)
        known = self._copies.known(node, klass, none_here)
        if known is not None:
            function, sites = known.at(name, node.lineno)
            self._keep(function)
            self.facts.sites += sites
            return
        node = self._copies.whole(node)
        self.names.asked.clear()
        mechanism = wrapper_of_function(node, self.names) if within(self._deep, node) else ""
        if mechanism:
            self.facts.wrappers[f"{self.facts.module}.{name}"] = mechanism
            return
        operators = [item for item in node.decorator_list if klass is None and is_custom_op(item, self.names)]
        self.facts.sites += (site for item in operators for site in without_autograd(item, node.name, self._source))
        body = Body(node, self.names, klass, name, None)
        self.names.none_here = none_here
        own = body.read()
        if self.names.makers:
            own.gives = gives(node, self.names)
        self.names.none_here = False
        for fact in (own, *body.nested):
            self._keep(fact)
        self._take(body)
        if not operators:  # whether it is registered with autograd is said elsewhere
            self._copies.note(body, own, klass, none_here)

    def _only_builds(self, method: FunctionNode) -> bool:
        """Tell a constructor of which only the attributes are of interest: no pass runs it, and it stops nothing."""
        if method.name != "__init__" or not self._none_in(method):
            return False
        return not any(isinstance(part, _BINDERS) for part in statements(method.body))

    def _none_in(self, node: FunctionNode) -> bool:
        """Tell whether a function names no switch at all."""
        return not (self.names.wrappers or self.names.aliases or within(self._deep, node))

    def _keep(self, function: Function) -> None:
        if function.kind != "overload" or function.name not in self.facts.functions:
            self.facts.functions[function.name] = function

    def _take(self, body: Body) -> None:
        self.facts.sites += body.sites
        self._applied += body.applied
        self.facts.classes.update({klass.name: klass for klass in body.classes})

    def _land_applied(self) -> None:
        """Move the site of ``self.forward = no_grad()(self.forward)`` to the function that is switched off by it."""
        for site, name, new in self._applied:
            function = self.facts.functions.get(name)
            if function is not None:
                self.facts.sites.remove(site)
                conditional = site.conditional or name != new
                if "." not in new and name != new:
                    self.facts.imports[new] = name
                self.facts.sites.append(replace(site, function=name, depends=function.returns, conditional=conditional))

    def _class(self, node: ast.ClassDef, prefix: str) -> None:
        if not within(self._lines, node):
            return
        name = f"{prefix}{node.name}"
        deep = self._is_deep(node)
        bases = tuple(filter(None, (self.names.dotted(_bare(base)) for base in node.bases)))
        klass = Class(name, node.lineno, bases)
        self.facts.classes[name] = klass
        if deep:
            mechanism = wrapper_of_class(node, self.names)
            if mechanism:
                self.facts.wrappers[f"{self.facts.module}.{name}"] = mechanism
                return
            self._decorated_class(node, name)
        methods = [item for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))]
        klass.methods = (*(method.name for method in methods), *(self._left_out.get(name, ())))
        self._attributes(node, klass, methods, deep)
        outside = self.names.aliases
        self.names.aliases = {**outside, **(self._kept_switches(node, klass, methods) if deep else {})}
        for method in methods:
            if within(self._lines, method) or (deep and not self._only_builds(method)):
                self._definition(method, klass, f"{name}.{method.name}")
        self.names.aliases = outside
        for item in node.body:
            if isinstance(item, ast.ClassDef):
                self._class(item, f"{name}.")
        if any(base.endswith("autograd.Function") or base == "Function" for base in bases):
            self.facts.sites += without_gradient(node, name)

    def _kept_switches(self, node: ast.ClassDef, klass: Class, methods: list[FunctionNode]) -> dict[str, Switch]:
        """Return the switches that a class keeps under names of its own: ``self.guard = torch.no_grad()``.

        A copy of what was read before keeps none, or it would not have been noted.
        """
        kept: dict[str, Switch] = {}
        methods = [
            self._copies.whole(method)
            for method in methods
            if not self._none_in(method) and self._copies.known(method, klass, none_here=False) is None
        ]
        for part in (*node.body, *(each for method in methods for each in statements(method.body))):
            if isinstance(part, ast.Assign) and isinstance(part.value, (ast.Name, ast.Attribute, ast.Call, ast.IfExp)):
                switch = self.names.switch(part.value)
                for target in part.targets if switch else ():
                    name = self.names.dotted(target)
                    own = name if name.startswith("self.") else f"self.{name}"
                    if switch and (part in node.body or name == own):
                        known = kept.get(own, switch)
                        kept[own] = switch if known.disables == switch.disables else replace(switch, disables=None)
                        if part in node.body:
                            kept[name] = kept[own]
        return kept

    def _is_deep(self, node: ast.ClassDef) -> bool:
        """Tell whether a class is to be read whole: a switch in ``_init_weights`` alone is no reason."""
        if not within(self._deep, node):
            return False
        setup = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name in INITIALISERS]
        in_setup = sum(count_within(self._switches, method) for method in setup)
        return count_within(self._deep, node) > in_setup

    def _decorated_class(self, node: ast.ClassDef, name: str) -> None:
        for item in node.decorator_list:
            switch = self.names.switch(item)
            if switch is not None and switch.disables is not False:
                harmless = "on a class it covers only the constructor: the methods keep their gradients"
                self.facts.sites.append(
                    Site(rule_of(switch, "class"), item.lineno, item.col_offset + 1, item.lineno, name,
                         switch.mechanism, "class",
                         harmless="" if switch.mechanism == "inference_mode" else harmless)
                )  # fmt: skip

    def _attributes(self, node: ast.ClassDef, klass: Class, methods: list[FunctionNode], deep: bool) -> None:
        kept = Keeping(klass, self.names, self.facts)
        if not deep:  # the constructor is not looked into
            klass.attributes.update(dict.fromkeys(self._kept_parameters.get(klass.name, ()), "parameter"))
        kept.read_body(node.body)
        constructors = [method for method in methods if method.name in CONSTRUCTORS] if deep else []
        called = {name for method in constructors for name in called_on_self(method)}
        for method in methods if deep else ():
            if method in constructors or method.name in called:
                kept.read_constructor(self._copies.whole(method))
            elif self._registers(method):
                kept.read_registered(self._copies.whole(method))

    def _registers(self, method: FunctionNode) -> bool:
        if self._registering is None:
            self._registering = line_numbers(self._source, buffers_registered(self._source))
        return within(self._registering, method)


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# What others in the file may use by its name.
_BINDERS = (*_DEFINITIONS, ast.Import, ast.ImportFrom)


def _branches(node: ast.If | ast.Try) -> Iterator[list[ast.stmt]]:
    yield node.body
    if isinstance(node, ast.Try):
        yield from (handler.body for handler in node.handlers)
        yield node.finalbody
    yield node.orelse


def _is_main(test: ast.expr) -> bool:
    """``if __name__ == "__main__":``, also with more to it."""
    return any(isinstance(part, ast.Constant) and part.value == "__main__" for part in ast.walk(test))


def _gives_loss(body: Iterable[ast.stmt]) -> bool:
    """Tell whether a class has a method that gives a trainer what it goes backward from."""
    classes = (node for node in body if isinstance(node, ast.ClassDef))
    return any(getattr(method, "name", "") in GIVE_LOSS for node in classes for method in node.body)


def _bare(base: ast.expr) -> ast.expr:
    """``Base[T]`` is ``Base``."""
    return base.value if isinstance(base, ast.Subscript) else base
