"""The regions of one function: where each opens and closes, and what comes out of it.

A region is a stretch under one switch: the whole body below a decorator, the block of a ``with``, from a
bare ``set_grad_enabled(False)`` to the call that undoes it, or to the end of the function. What matters of
it is what comes out: the values that are returned, used after it, or stored on ``self``.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gradscope.scanning.calls import Calls
from gradscope.scanning.detaches import DETACH_RULES, is_within
from gradscope.scanning.facts import APART, LOSS, NOTHING, Atoms, Class, How, Site
from gradscope.scanning.outputs import losses, name_of, named_parts
from gradscope.scanning.signatures import FunctionNode
from gradscope.scanning.switches import Names, Switch, effective, off_when_not_wanted, rule_of
from gradscope.scanning.values import Value, joined

ASYNC = "a decorator on an async function covers only the making of the coroutine: gradients stay on"
BARE = "a switch that is neither entered nor applied does nothing"


@dataclass(slots=True)
class Region:
    """A stretch under a switch while it is open, and what has come out of it so far.

    ``held_by`` is the name of the exit stack or of the context object that will close it.
    """

    switch: Switch
    how: How
    line: int
    column: int
    end_line: int
    harmless: str = ""
    conditional: bool = False
    held_by: str = ""
    leaks: bool = False
    names: dict[str, Atoms] = field(default_factory=dict)
    returned: set[str] = field(default_factory=set)
    effects: set[str] = field(default_factory=set)
    runs: Atoms = NOTHING


class Regions(Calls):
    """Keeps the open regions of a function, outermost first; every one that closes becomes a site.

    ``applied`` holds the sites of switches put around a function by hand, with the function's name and
    the one that it goes by afterwards.
    """

    def __init__(self, node: FunctionNode, names: Names, klass: Class | None, name: str) -> None:
        super().__init__(names, klass, name)
        self.node = node
        self.regions: list[Region] = []
        self.returned: set[str] = set()
        self.gives_apart = False
        self.yields = False
        self.applied: list[tuple[Site, str, str]] = []
        self._loops = 0
        self._last_loads: dict[str, int] | None = None

    def _decorator_regions(self) -> list[Region]:
        node = self.node
        found = [(item, self.names.switch(item)) for item in node.decorator_list]
        switches = [(item, switch) for item, switch in found if switch]
        regions: list[Region] = []
        for position, (item, switch) in enumerate(switches):
            inward = [each for _, each in switches[position:]]
            if switch.disables is False or effective(inward) is None:
                continue
            harmless = ASYNC if isinstance(node, ast.AsyncFunctionDef) else switch.harmless
            end = node.end_lineno or node.lineno
            regions.append(Region(switch, "decorator", item.lineno, item.col_offset + 1, end, harmless))
        return regions

    # --- what comes out ---------------------------------------------------------------------------

    def note_output(self, target: ast.expr, atoms: Atoms, kind: str = "unknown") -> None:
        """Note that a name or attribute now holds what was computed in the open regions."""
        if not self.regions or not (atoms or kind == "tensor"):
            return
        open_regions = self._effective_regions()
        self._note_cached(target, atoms, open_regions)
        for part in ast.walk(target):
            if isinstance(part, ast.Name):
                for region in open_regions:
                    region.names[part.id] = region.names.get(part.id, NOTHING) | atoms
                    if part.id == "self":
                        region.effects |= atoms

    def as_computed(self, value: Value) -> Value:
        """Return a value with its atoms marked where gradients are off, and with the lines of the open blocks."""
        open_regions = self._effective_regions() if self.regions else ()
        if not open_regions:
            return value
        atoms = {atom if atom.startswith(("off:", "in:")) else f"off:{atom}" for atom in value.atoms}
        if atoms and value.kind != "array":
            atoms |= {f"in:{region.line}" for region in open_regions if region.how != "decorator"}
        return Value(frozenset(atoms), value.kind)

    def _note_cached(self, target: ast.expr, atoms: Atoms, regions: list[Region]) -> None:
        """What is kept on ``self`` inside ``inference_mode`` stays an inference tensor outside of it."""
        while isinstance(target, ast.Subscript):
            target = target.value
        name = self.names.dotted(target)
        if name.startswith("self.") and any(region.switch.mechanism == "inference_mode" for region in regions):
            line, column = target.lineno, target.col_offset + 1
            mechanism = f"{name} is kept from inside inference_mode"
            self.sites.append(Site("GS602", line, column, line, self.function, mechanism, "call", atoms, gives=(name,)))

    def keep(self, target: ast.expr, atoms: Atoms) -> None:
        """What is stored on ``self``, or in what it is not known to be, may come back: it counts as given out."""
        blocks = {atom for atom in atoms if atom.startswith("in:")}
        if blocks and not isinstance(target, ast.Name):
            root = root_of(target)
            if root == "self" or root in self.parameters:
                self.returned |= blocks
            if root == "self":
                self.mark_kept(blocks)

    def hand_over(self, node: ast.Call, func: ast.Attribute) -> None:
        """``layer.condition_on(features)``: what a part of ``self`` is given, it keeps for its own forward pass."""
        part, *given = self._silently([func.value, *node.args, *(keyword.value for keyword in node.keywords)])
        if any(atom.startswith(("attr:", "call:self.")) for atom in part.atoms):
            blocks = {atom for atom in joined(given).atoms if atom.startswith("in:")}
            self.returned |= blocks
            self.mark_kept(blocks)

    def mark_kept(self, blocks: set[str]) -> None:
        """Take note that ``self`` keeps what closed blocks, ``in:12``, have computed."""
        for number, site in enumerate(self.sites) if blocks else ():
            if site.how == "block" and f"in:{site.line}" in blocks:
                self.sites[number] = replace(site, effects=site.effects | site.depends)

    def _effective_regions(self) -> list[Region]:
        switches = [region.switch for region in self.regions]
        return [
            region
            for position, region in enumerate(self.regions)
            if region.switch.disables is not False and effective(switches[position:]) is not None
        ]

    def suspended(self, node: ast.expr, word: str) -> None:
        """Note that a ``with`` region stays on while the consumer, or another task, runs; a decorated body does not."""
        blocks = [region for region in self._effective_regions() if region.how == "block" and not region.leaks]
        decorators = {self.names.dotted(item).rpartition(".")[2] for item in self.node.decorator_list}
        if blocks and not decorators & {"contextmanager", "asynccontextmanager"}:
            blocks[-1].leaks = True
            self.report(node, "GS107", f"{word} inside {blocks[-1].switch.mechanism}", Value(frozenset(self.returned)))

    def hand_out(self, parts: Sequence[Value]) -> None:
        """Take note of a part of the result that nothing but stopped values are in, or nothing but one call's."""
        for value in parts:
            if value.atoms and _is_stopped(value) and value.kind != "array":
                self.gives_apart = True
        self.note_results_of_one_call(parts)

    def note_results_of_one_call(self, parts: Sequence[Value]) -> None:
        """Whether that call is of a stopped function is known when the files are joined."""
        for value in parts:
            if not value.atoms:
                continue
            made_of = [atom for atom in value.atoms if not atom.startswith(("arg:", "cut:", "from:"))]
            if len(made_of) == 1 and made_of[0].startswith("call:"):
                self.returned.add(f"{APART}:{made_of[0][5:]}")

    def note_names(self, node: ast.expr, targets: Sequence[ast.expr], since: int) -> None:
        """Take note of a loss among what is given out, and of the names that detached copies beside it go by."""
        if any(not _is_stopped(self.as_computed(value)) for value in self._silently(losses(node))):
            self.returned.add(LOSS)
        for number in range(since, len(self.sites)):
            site = self.sites[number]
            if site.rule in DETACH_RULES:
                names = [name for name, part in named_parts(node) if is_within(site, part)]
                names += [name_of(part) for target in targets for part in (target, *_container_and_key(target))]
                self.sites[number] = replace(site, gives=tuple(filter(None, names)))

    # --- opening and closing ----------------------------------------------------------------------

    def _open(self, switch: Switch, how: How, node: ast.expr, held_by: str = "") -> Region:
        conditional = switch.disables is None or bool(self.conditions)
        reasons = (off_when_not_wanted(test, arm) for test, arm in self.conditions)
        harmless = switch.harmless or next(filter(None, reasons), "")
        end = self.node.end_lineno or node.lineno
        region = Region(switch, how, node.lineno, node.col_offset + 1, end, harmless, conditional, held_by)
        self.regions.append(region)
        return region

    def _open_with(self, node: ast.With | ast.AsyncWith) -> set[str]:
        """Open the regions of a ``with``; return the names it binds, one of which may be an exit stack."""
        bound: set[str] = set()
        for item in node.items:
            switch = self.names.switch(item.context_expr)
            if switch is not None:
                self._open(switch, "block", item.context_expr)
                continue
            value = self.value(item.context_expr)
            if item.optional_vars is not None:
                self.bind(item.optional_vars, value)
                bound.add(self.names.dotted(item.optional_vars))
        return bound

    def _close_with(self, node: ast.With | ast.AsyncWith, depth: int, bound: set[str], runs: Atoms) -> None:
        """Close what was opened in a ``with``, but for what somebody else holds."""
        opened = self.regions[depth:]
        stay = [region for region in opened if region.how == "call" or (region.held_by and region.held_by not in bound)]
        self.regions[depth:] = stay
        for region in reversed(opened):
            if region not in stay:
                region.runs = runs
                self._end(region, node.end_lineno or node.lineno)

    def _end(self, region: Region, line: int) -> None:
        """Close a region before the function ends: what is used later comes out of it as well."""
        region.end_line = line
        region.how = "block" if region.how == "call" else region.how
        if self._last_loads is None:
            self._last_loads = _last_loads(self.node)
        loads = self._last_loads
        region.names = {
            name: atoms
            for name, atoms in region.names.items()
            if loads.get(name, 0) > region.end_line or (self._loops and name in loads)
        }
        self._close(region)

    def _close(self, region: Region) -> None:
        if region.switch.disables is False:
            return
        # What a decorated function leaves in a local name is gone; what it gives back and stores is not.
        leaves = region.names.values() if region.how == "block" else ()
        self.sites.append(
            Site(
                rule_of(region.switch, region.how), region.line, region.column, region.line, self.function,
                region.switch.wrapper or region.switch.mechanism, region.how,
                frozenset(region.returned).union(*leaves),
                frozenset(region.effects), tuple(sorted(region.names)) if region.how == "block" else (),
                region.conditional or region.switch.disables is None, region.harmless, region.runs,
            )
        )  # fmt: skip

    # --- switches in statements and calls -----------------------------------------------------------

    def _switch_statement(self, node: ast.Call) -> bool:
        """Handle a call that is a statement of its own and switches gradients off or on; tell whether it does."""
        if isinstance(node.func, ast.Attribute):
            held_by = self.names.dotted(node.func.value)
            if node.func.attr in ("__exit__", "close") and self._end_held_by(held_by, node):
                return True
            if node.func.attr in ("enter_context", "enter_async_context", "__enter__"):
                given = node.func.value if node.func.attr == "__enter__" else node.args[0] if node.args else None
                switch = self.names.switch(given) if given is not None else None
                if switch is not None and switch.disables is not False:
                    self._open(switch, "block" if held_by else "call", node, held_by)
                return switch is not None
        switch = self.names.switch(node)
        if switch is None:
            return False
        if switch.mechanism == "set_grad_enabled":
            self._switched_by_call(switch, node)
        elif not switch.wrapper and switch.disables:
            self.report(node, "GS107", f"bare {switch.mechanism}()", harmless=BARE)
        return True

    def _end_held_by(self, held_by: str, node: ast.Call) -> bool:
        held = [region for region in self.regions if held_by and region.held_by == held_by]
        for region in reversed(held):
            self.regions.remove(region)
            self._end(region, node.lineno)
        return bool(held)

    def _switched_by_call(self, switch: Switch, node: ast.Call) -> None:
        """``set_grad_enabled(...)`` as a statement ends the one before it; a stored mode given back is that end."""
        called = [region for region in self.regions if region.how == "call"]
        self.regions = [region for region in self.regions if region.how != "call"]
        for region in called:
            self._end(region, node.lineno)
        if switch.disables or (switch.disables is None and not called):
            self._open(switch, "call", node)

    def apply(self, node: ast.Call, switch: Switch) -> Value:
        """Note a switch around a function, ``torch.no_grad()(self.run)``; return what stands for the result."""
        given = node.args[0]
        dotted = self.names.dotted(given)
        atoms = self.value(given).atoms
        if dotted:
            atoms |= {f"call:{dotted}"}
        conditional = bool(self.conditions) or switch.disables is None
        self.sites.append(
            Site(rule_of(switch, "applied"), node.lineno, node.col_offset + 1, node.end_lineno or node.lineno,
                 self.function, switch.mechanism, "applied", atoms, conditional=conditional, harmless=switch.harmless)
        )  # fmt: skip
        return Value(atoms, "module")

    def _keep_applied(self, target: ast.expr, node: ast.expr) -> None:
        """``self.forward = torch.no_grad()(self.forward)``: from now on the function itself is switched off."""
        is_kept = isinstance(target, ast.Attribute) or not self.function
        if not is_kept or not isinstance(node, ast.Call) or self.names.applied(node) is None:
            return
        name, new = self.names.dotted(node.args[0]), self.names.dotted(target)
        if self.klass is not None and name.startswith("self."):
            name, new = (text.replace("self", self.klass.name, 1) for text in (name, new))
        self.applied.append((self.sites[-1], name, new))


def _is_stopped(value: Value) -> bool:
    return all("off:" in atom or atom.startswith("in:") for atom in value.atoms)


def _container_and_key(target: ast.expr) -> tuple[ast.expr, ...]:
    return (target.value, target.slice) if isinstance(target, ast.Subscript) else ()


def _last_loads(node: ast.AST) -> dict[str, int]:
    """Return the last line on which every name is read (``ast.walk`` takes four times as long)."""
    found: dict[str, int] = {}
    pending = [node]
    while pending:
        part = pending.pop()
        if isinstance(part, ast.Name):
            if isinstance(part.ctx, ast.Load) and part.lineno > found.get(part.id, 0):
                found[part.id] = part.lineno
        elif isinstance(part, ast.Attribute):
            pending.append(part.value)
        elif not isinstance(part, ast.Constant):
            for value in vars(part).values():
                if isinstance(value, list):
                    pending += [item for item in value if isinstance(item, ast.AST)]
                elif isinstance(value, ast.AST):
                    pending.append(value)
    return found


def root_of(target: ast.expr) -> str:
    """Return the name that an attribute or an item begins with: ``self`` of ``self.parts[0].cache``."""
    while isinstance(target, (ast.Attribute, ast.Subscript)):
        target = target.value
    return target.id if isinstance(target, ast.Name) else ""
