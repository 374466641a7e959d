"""Recognise an expression that switches gradients off or on, however it is written.

Aliases, factories, conditional expressions, ``functools.partial`` and the package's own wrappers are
followed; what only run time can tell is marked ``conditional``.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, replace

OFF = {"no_grad": "no_grad", "inference_mode": "inference_mode"}
MECHANISMS = {**OFF, "enable_grad": "enable_grad", "set_grad_enabled": "set_grad_enabled",
              "_set_grad_enabled": "set_grad_enabled"}  # fmt: skip
# The torch modules that export them (torch/__init__.py, torch/autograd/__init__.py, grad_mode.py, _C).
HOMES = {"torch", "torch.autograd", "torch.autograd.grad_mode", "torch._C", "torch.inference_mode"}
NEUTRAL = {"contextlib.nullcontext", "nullcontext", "contextlib.suppress"}


@dataclass(frozen=True, slots=True)
class Switch:
    """What an expression does to grad mode once it is entered, called or applied.

    ``disables`` is None where a value known only at run time decides; ``wrapper`` is the dotted name of
    the package's own wrapper; ``called`` says that the expression is an instance, not the class itself.
    """

    mechanism: str
    disables: bool | None
    wrapper: str = ""
    called: bool = False


class Names:
    """What the names of one file stand for: imports, aliases of switches, the package's wrappers."""

    def __init__(self, imports: dict[str, str], wrappers: Mapping[str, str], module: str) -> None:
        self.imports = imports
        self.wrappers = wrappers
        self.module = module
        self.aliases: dict[str, Switch] = {}

    def dotted(self, node: ast.expr) -> str:
        """Return the dotted name of an expression with its imports resolved; empty for other expressions."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            parts.append(self.imports.get(node.id, node.id))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super":
            parts.append("super()")
        else:
            return ""
        return ".".join(reversed(parts))

    def switch(self, node: ast.expr) -> Switch | None:
        """Return the switch that an expression is, or None."""
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._named(node)
        if isinstance(node, ast.Call):
            return self._called(node)
        if isinstance(node, ast.IfExp):
            return _either(self.switch(node.body), self.switch(node.orelse))
        if isinstance(node, ast.BoolOp):
            found = [switch for switch in map(self.switch, node.values) if switch]
            return replace(found[0], disables=None) if found else None
        if isinstance(node, (ast.List, ast.Tuple)):
            found = [switch for switch in map(self.switch, node.elts) if switch]
            return found[-1] if found else None
        if isinstance(node, ast.NamedExpr):
            return self.switch(node.value)
        return None

    def _named(self, node: ast.Name | ast.Attribute) -> Switch | None:
        dotted = self.dotted(node)
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
        here = f"{self.module.removesuffix('.__init__')}.{dotted}"
        last = dotted.rpartition(".")[2]
        root = self.module.partition(".")[0]
        for name, mechanism in self.wrappers.items():
            same_name = name.rpartition(".")[2] == last
            if name in (here, dotted) or (same_name and (dotted.startswith((f"{root}.", "self.", "super()")))):
                return Switch(mechanism, True, wrapper=name)
        return None

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
        inner = self.switch(node.func)
        if inner is None or inner.called:
            return None  # switch()(function) is an application, see ``walk``
        return _instance(inner, node)


def _instance(switch: Switch | None, call: ast.Call) -> Switch:
    assert switch is not None
    arguments = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg in (None, "mode"))]
    if switch.mechanism in ("inference_mode", "set_grad_enabled") and not switch.wrapper and arguments:
        given = arguments[0].value if isinstance(arguments[0], ast.Constant) else None
        off = switch.mechanism == "inference_mode"
        disables = None if given is None else (bool(given) if off else not given)
        return replace(switch, disables=disables, called=True)
    return replace(switch, called=True)


def _either(first: Switch | None, second: Switch | None) -> Switch | None:
    """Return what a conditional expression may be: off in one arm and not in the other is conditional."""
    if first and second and first.disables == second.disables:
        return first
    off = [switch for switch in (first, second) if switch and switch.disables is not False]
    if off:
        return replace(off[0], disables=None)
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
