"""Recognise an expression that switches gradients off or on, however it is written.

Aliases, factories, conditional expressions, ``functools.partial`` and the package's own wrappers are
followed; what only run time can tell is marked ``conditional``.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

OFF = {"no_grad": "no_grad", "inference_mode": "inference_mode"}
MECHANISMS = {**OFF, "enable_grad": "enable_grad", "set_grad_enabled": "set_grad_enabled",
              "_set_grad_enabled": "set_grad_enabled"}  # fmt: skip
# The torch modules that export them (torch/__init__.py, torch/autograd/__init__.py, grad_mode.py, _C).
HOMES = {"torch", "torch.autograd", "torch.autograd.grad_mode", "torch._C", "torch.inference_mode"}
_BUILTINS = frozenset(dir(builtins))
_CLASS_OF_SELF = ast.dump(ast.parse("type(self)", mode="eval").body)
_DEFINED = re.compile(r"def (\w+)\(")
NOT_TRAINING = "only outside training"
FOLLOWS = "off only where nothing requires a gradient"


@dataclass(frozen=True, slots=True)
class Switch:
    """What an expression does to grad mode once it is entered, called or applied.

    ``disables`` is None where a value known only at run time decides; ``wrapper`` is the dotted name of
    the package's own wrapper; ``called`` says that the expression is an instance, not the class itself;
    ``harmless`` why gradients are off only where nobody wants any.
    """

    mechanism: str
    disables: bool | None
    wrapper: str = ""
    called: bool = False
    harmless: str = ""


class Names:
    """What the names of one file stand for: imports, aliases of switches, the package's wrappers.

    ``roots`` are the top-level packages of the scan; ``makers`` what models are got from (``makers.py``).
    """

    def __init__(
        self, imports: dict[str, str], wrappers: Mapping[str, str], module: str, roots: frozenset[str]
    ) -> None:
        self.imports = imports
        self.wrappers = wrappers
        self.module = module
        self.roots = roots
        self.makers: frozenset[str] = frozenset()
        self.is_glue = False  # the file trains, or puts models together that functions of others make
        self.instances: dict[str, str] = {}  # what the names of a script are instances of
        self.source = ""
        self.backward: list[int] = []  # the lines that go backward
        self.handed: frozenset[str] = frozenset()  # what the optimizers of the file are given
        self._elsewhere: set[str] = set()
        self._own_builtins: frozenset[str] | None = None
        self._known_imports = 0
        self._imported_roots: frozenset[str] = frozenset()
        self.aliases: dict[str, Switch] = {}
        self.asked: set[str] = set()  # the names looked up since this was last cleared
        self.none_here = False  # what is read now names no switch: it is not looked for

    def dotted(self, node: ast.expr) -> str:
        """Return the dotted name of an expression with its imports resolved; empty for other expressions."""
        if isinstance(node, ast.Name):
            self.asked.add(node.id)
            return self.imports.get(node.id, node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            root = node.value.id
            self.asked.add(root)
            return f"{self.imports.get(root, root)}.{node.attr}"
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            self.asked.add(node.id)
            parts.append(self.imports.get(node.id, node.id))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("super", "type"):
            if node.func.id == "type" and ast.dump(node) != _CLASS_OF_SELF:
                return ""
            parts.append("self" if node.func.id == "type" else "super()")
        else:
            return ""
        return ".".join(reversed(parts)).replace("self.__class__.", "self.", 1)

    def is_maker(self, dotted: str) -> bool:
        """Tell whether a dotted name means a function, or a table of some, that a model is got from."""
        if not self.makers:
            return False
        return dotted in self.makers or f"{self.module.removesuffix('.__init__')}.{dotted}" in self.makers

    def is_elsewhere(self, root: str) -> bool:
        """Tell whether a dotted name that begins so means a builtin or something of a package outside the scan."""
        if root in self._elsewhere:
            return True
        if root in _BUILTINS:
            found = root not in self._replaced_builtins()
        else:
            found = root not in self.roots and root in self._imported()
        if found:
            self._elsewhere.add(root)
        return found

    def _replaced_builtins(self) -> frozenset[str]:
        """Return the builtins that the file may have of its own, by one search (one for each took 3 % of a scan)."""
        if self._own_builtins is None:
            starred = "import *" in self.source
            self._own_builtins = _BUILTINS if starred else frozenset(_DEFINED.findall(self.source))
        return self._own_builtins

    def _imported(self) -> frozenset[str]:
        if len(self.imports) != self._known_imports:
            self._known_imports = len(self.imports)
            self._imported_roots = frozenset(name.partition(".")[0] for name in self.imports.values())
        return self._imported_roots

    def switch(self, node: ast.expr) -> Switch | None:
        """Return the switch that an expression is, or None."""
        if self.none_here:
            return None
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._named(node)
        if isinstance(node, ast.Call):
            return self._called(node)
        if isinstance(node, ast.IfExp):
            return _either(node.test, self.switch(node.body), self.switch(node.orelse))
        if isinstance(node, ast.Lambda):
            inner = self.switch(node.body)
            return replace(inner, called=False) if inner else None
        if isinstance(node, ast.BoolOp):
            found = [switch for switch in map(self.switch, node.values) if switch]
            return replace(found[0], disables=None) if found else None
        if isinstance(node, (ast.List, ast.Tuple)):
            found = [switch for switch in map(self.switch, node.elts) if switch]
            return found[-1] if found else None
        if isinstance(node, ast.NamedExpr):
            return self.switch(node.value)
        return None

    def applied(self, node: ast.expr) -> Switch | None:
        """Return the switch that a call wraps a function in: ``torch.no_grad()(run)``, ``torch.no_grad(run)``."""
        if self.none_here or not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords:
            return None
        func = node.func
        if isinstance(func, ast.Call):
            switch = self.switch(func)
            return switch if switch and switch.called and switch.disables is not False else None
        # Without the second pair of brackets only no_grad takes a function: the others take a mode.
        is_bare = "no_grad" in (getattr(func, "attr", ""), self.imports.get(getattr(func, "id", ""), "")[-7:])
        return self._named(func) if is_bare and isinstance(func, (ast.Name, ast.Attribute)) else None

    def _named(self, node: ast.Name | ast.Attribute) -> Switch | None:
        return self._meant_by(self.dotted(node))

    def _meant_by(self, dotted: str) -> Switch | None:
        home, _, last = dotted.rpartition(".")
        if last in MECHANISMS and home in HOMES:
            mechanism = MECHANISMS[last]
            return Switch(mechanism, None if mechanism == "set_grad_enabled" else mechanism in OFF)
        if dotted in self.aliases:
            return self.aliases[dotted]
        return self._wrapper(dotted)

    def _wrapper(self, dotted: str) -> Switch | None:
        if not self.wrappers or not dotted:
            return None
        last = dotted.rpartition(".")[2]
        for name, mechanism in self.wrappers.items():
            if name.rpartition(".")[2] == last and (self._is_own(dotted) or name in self._full_names(dotted)):
                return Switch(mechanism, True, wrapper=name)
        return None

    def _is_own(self, dotted: str) -> bool:
        return dotted.startswith((f"{self.module.partition('.')[0]}.", "self.", "super()"))

    def _full_names(self, dotted: str) -> tuple[str, ...]:
        """Return what a name may be in full: of this module, as it is, or of a module imported with a star."""
        starred = (f"{base}.{dotted}" for key, base in self.imports.items() if key.startswith("*"))
        return (f"{self.module.removesuffix('.__init__')}.{dotted}", dotted, *starred)

    def _called(self, node: ast.Call) -> Switch | None:
        dotted = self.dotted(node.func)
        if dotted in ("functools.partial", "partial") and node.args:
            inner = self.switch(node.args[0])
            rest = ast.Call(node.args[0], node.args[1:], node.keywords)
            return replace(_instance(inner, rest), called=False) if inner else None
        if dotted == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            name = node.args[1].value
            if isinstance(name, str) and name in MECHANISMS and self.dotted(node.args[0]) in HOMES:
                return Switch(MECHANISMS[name], name in OFF)
            return None
        if dotted.endswith("ContextManagers"):
            found = [switch for switch in map(self.switch, node.args) if switch]
            return found[0] if found else None
        inner = self._meant_by(dotted) if dotted else self.switch(node.func)
        takes_function = inner is not None and inner.mechanism == "no_grad" and not inner.wrapper and node.args
        if inner is not None and inner.called and inner.wrapper and not (node.args or node.keywords):
            return inner  # mode = self.mode(); with mode(): the method gives the class, and no instance
        if inner is None or inner.called or takes_function:
            return None  # switch()(function) and no_grad(function) are applications
        return _instance(inner, node)


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
        if name.name != "*":
            imports[name.asname or name.name] = f"{base}.{name.name}" if base else name.name
        elif base in HOMES:
            imports.update({switch: f"{base}.{switch}" for switch in MECHANISMS})
        else:
            imports[f"*{base}"] = base


def _instance(switch: Switch | None, call: ast.Call) -> Switch:
    assert switch is not None
    arguments = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg in (None, "mode"))]
    if switch.mechanism in ("inference_mode", "set_grad_enabled") and not switch.wrapper and arguments:
        given = arguments[0].value if isinstance(arguments[0], ast.Constant) else None
        off = switch.mechanism == "inference_mode"
        disables = None if given is None else (bool(given) if off else not given)
        if not off and _is_current_mode(arguments[0]):
            disables = False
        harmless = "" if off else off_when_not_wanted(arguments[0], False)
        return replace(switch, disables=disables, called=True, harmless=harmless)
    return replace(switch, called=True)


def _is_current_mode(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "is_grad_enabled"


def off_when_not_wanted(test: ast.expr, first_arm: bool) -> str:
    """Return why gradients are off only where nobody wants them, if they are off when ``test`` is ``first_arm``."""
    while isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test, first_arm = test.operand, not first_arm
    if first_arm:
        return ""
    name = getattr(test, "attr", "") or getattr(test, "id", "")
    if name == "training" or _is_current_mode(test):
        return NOT_TRAINING
    asks = any(isinstance(part, ast.Attribute) and part.attr == "requires_grad" for part in ast.walk(test))
    return FOLLOWS if asks and not isinstance(test, ast.BoolOp) else ""


def _either(test: ast.expr, first: Switch | None, second: Switch | None) -> Switch | None:
    """Return what a conditional expression may be: off in one arm and not in the other is conditional."""
    if first and second and first.disables == second.disables:
        return first
    for switch, arm in ((first, True), (second, False)):
        if switch and switch.disables is not False:
            return replace(switch, disables=None, harmless=off_when_not_wanted(test, arm))
    return first or second


def effective(switches: list[Switch]) -> Switch | None:
    """Return the switch that decides among nested ones (outermost first): the innermost wins.

    ``enable_grad`` undoes ``no_grad`` and not ``inference_mode``; ``inference_mode(False)`` undoes both.
    """
    grad_on = False
    for switch in reversed(switches):
        if switch.disables is False:
            if switch.mechanism == "inference_mode":
                return None
            grad_on = True
        elif not grad_on or switch.mechanism == "inference_mode":
            return switch
    return None


def rule_of(switch: Switch, how: str) -> str:
    """Return the rule that a switch falls under, by what it is and how it is put to work."""
    if switch.wrapper:
        return "GS106"
    if switch.mechanism == "set_grad_enabled":
        return "GS105"
    codes = {"inference_mode": ("GS101", "GS103"), "no_grad": ("GS102", "GS104")}
    return codes.get(switch.mechanism, ("GS105", "GS105"))[0 if how in ("decorator", "applied", "class") else 1]
