"""From a recording to the flow graph: regions and modules nested, what lies between them as operations."""

from __future__ import annotations

import linecache
import os
from collections.abc import Callable
from typing import Any, TypeAlias

from gradscope.flow import FlowEdge, FlowGraph, FlowNode, FlowStatus
from gradscope.paths import short_path
from gradscope.tracing.diagnose import Diagnosis
from gradscope.tracing.frames import expression, source_site
from gradscope.tracing.propagation import arriving, linked_to
from gradscope.tracing.recording import CONSTRUCTOR, Operation, Place, Recording, Scope, Site

LONGEST_LABEL = 52
MODULE_DEPTH = 4
# A scope and the node that it is drawn as.
_Shown: TypeAlias = tuple[Scope, FlowNode]


def draw(
    recording: Recording,
    diagnosis: Diagnosis,
    ids: dict[Site, str],
    frozen: set[str],
    described: tuple[str, ...] = (),
) -> FlowGraph:
    """Return the graph of one run.

    ``ids`` names the finding of each blamed site; ``described`` are the inputs in words, shown
    where an input is no tensor (an image) and so has no value in the recording.
    """
    files = _Files(recording)
    if recording.error is not None or recording.raised_in is not None:  # an exception holds frames, and they tensors
        return _Drawing(recording, diagnosis, ids, frozen, files).graph(described)
    return _DrawnLater(lambda: _Drawing(recording, diagnosis, ids, frozen, files).graph(described))


class _DrawnLater(FlowGraph):
    """A graph that is drawn when it is first looked at: who asks for a verdict alone does not wait for it."""

    __slots__ = ("_draw",)

    def __init__(self, draw: Callable[[], FlowGraph]) -> None:
        self._draw: Callable[[], FlowGraph] | None = draw

    def __getattr__(self, name: str) -> Any:
        """Draw; asked only for what is not there yet."""
        draw = self._draw
        if name not in ("nodes", "edges") or draw is None:
            raise AttributeError(name)
        drawn = draw()
        self.nodes, self.edges = drawn.nodes, drawn.edges
        self._draw = None  # last: another thread that looks meanwhile draws as well
        return getattr(drawn, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlowGraph) and (self.nodes, self.edges) == (other.nodes, other.edges)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return FlowGraph, (self.nodes, self.edges)


class _Files:
    """The files of a recording as they were when it was made: how each is named to the user, and its lines."""

    def __init__(self, recording: Recording) -> None:
        calls = [*recording.operations, recording.pending] if recording.pending is not None else recording.operations
        found = {each.place.code.co_filename for each in calls if each.place is not None}
        found.update(scope.region.site.path for scope in recording.scopes if scope.region is not None)
        self.names = {path: short_path(path) for path in found}
        self.lines = {path: linecache.getlines(path) for path in found}


class _Drawing:
    def __init__(
        self, recording: Recording, diagnosis: Diagnosis, ids: dict[Site, str], frozen: set[str], files: _Files
    ) -> None:
        self.recording = recording
        self.diagnosis = diagnosis
        self.ids = ids
        self.blamed_lines = {(site.path, site.line) for site in ids}
        self.frozen = frozen
        self.files = files
        self.nodes: dict[str, FlowNode] = {}
        self.order: dict[str, int] = {}
        self.home: dict[int, str] = {}
        self.edges: dict[tuple[str, str], FlowStatus] = {}
        self.carrying = self._carrying_values()
        self.arriving = arriving(recording, self._ends())
        self.names: dict[str, list[str]] = {}
        self.opened: dict[int, tuple[list[_Shown], int]] = {}
        self.lineages: dict[str, list[str]] = {}
        self.owned = self._owned_leaves()
        self.containers = {scope.parent for scope in recording.scopes}

    def graph(self, described: tuple[str, ...]) -> FlowGraph:
        for name, value in self.recording.leaves.items():
            if name.startswith("input."):
                status = self._status(value)
                self._add(FlowNode(name, name, "input", status, detail=self.recording.values[value].detail))
                self.home[value] = name
        if not self.nodes:
            for index, text in enumerate(described):
                self._add(FlowNode(f"input.{index}", text, "input"))
        for operation in self.recording.operations:
            if self.diagnosis.live.intersection(operation.outputs):
                self._place(operation)
        self._finish()
        return FlowGraph(list(self.nodes.values()), [FlowEdge(a, b, s) for (a, b), s in self.edges.items()])

    # --- nodes ------------------------------------------------------------------------------

    def _place(self, operation: Operation) -> None:
        around, _ = self._opened(operation.scope)
        innermost, node = around[-1] if around else (None, None)
        finding = self._finding_at(operation) if self.ids else None
        if node is None or innermost is None or not innermost.module or finding is not None:
            node = self._operation_node(operation, node.id if node else None)
            node.finding = node.finding or finding
        output = operation.outputs[0] if operation.outputs else operation.inputs[0]
        status = self._status(output)
        if status != "none":  # the latest thing that is known; silence overrides nothing
            for _, each in around:
                each.status = status
            node.status = status
        if node.kind == "operation" or not node.detail:
            node.detail = self.recording.values[output].detail
        self._connect(operation, node.id)
        home = self._home(operation, innermost.id, node) if innermost else node.id
        for value in operation.outputs:
            self.home[value] = home

    def _finding_at(self, operation: Operation) -> str | None:
        """Return the finding that blames this very call: it is drawn also where it is one step inside a module."""
        place = operation.place
        if place is None or (place.code.co_filename, place.line) not in self.blamed_lines:
            return None
        return self.ids.get(source_site(place, operation.name))

    def _home(self, operation: Operation, scope: int, node: FlowNode) -> str:
        """Return the node that a result comes from, as drawn.

        An operation between the children of a module (a residual sum) is not drawn: what it gives
        out counts as coming from the child that was last to contribute.
        """
        if scope not in self.containers or not node.module:
            return node.id
        inside = [home for value in operation.inputs if (home := self.home.get(value)) in self.nodes]
        inside = [home for home in inside if node.id in self._lineage(home)[:-1]]
        return max(inside, key=self.order.__getitem__, default=node.id)

    def _opened(self, scope: int | None) -> tuple[list[_Shown], int]:
        """Return the scopes around an operation that are shown, drawn by now, and how many modules it is inside."""
        if scope is None:
            return [], 0
        if scope not in self.opened:
            innermost = self.recording.scopes[scope]
            shown, named = self._opened(innermost.parent)
            named += bool(innermost.module)
            if self._is_shown(innermost, named):
                shown = [*shown, (innermost, self._open(innermost, shown[-1][0] if shown else None))]
            self.opened[scope] = (shown, named)
        return self.opened[scope]

    def _is_shown(self, scope: Scope, named: int) -> bool:
        if scope.kind == "region":
            return scope.region is not None and scope.region.site in self.ids
        if scope.module:
            return named <= MODULE_DEPTH and scope.module.count(".") < MODULE_DEPTH
        return bool(scope.label) and not named  # without a label it is the model itself: the whole picture is inside it

    def _open(self, scope: Scope, parent: Scope | None) -> FlowNode:
        node_id = f"s{scope.id}"
        above = f"s{parent.id}" if parent else None
        if scope.kind == "region" and scope.region is not None:
            site = scope.region.site
            path, line = self.files.names[site.path], site.line
            return self._add(
                FlowNode(
                    node_id, _region_label(site), "region", "none", above, path=path, line=line, finding=self.ids[site]
                )
            )
        label = scope.module.removeprefix(f"{parent.module}." if parent and parent.module else "") or scope.label
        owned = self.owned.get(scope.module, ())
        detail = self.recording.values[scope.outputs[0]].detail if scope.outputs else ""
        return self._add(
            FlowNode(
                node_id, label, "module", "none", above, module=scope.module, type=scope.type, detail=detail,
                frozen=bool(owned) and self.frozen.issuperset(owned), parameters=len(owned),
            )
        )  # fmt: skip

    def _operation_node(self, operation: Operation, parent: str | None) -> FlowNode:
        place = operation.place
        line = place.line if place else 0
        last = next(reversed(self.nodes.values()), None)
        path = place.code.co_filename if place else ""
        if last and last.kind == "operation" and last.parent == parent and (last.path, last.line) == (path, line):
            self.names[last.id].append(operation.name)
            last.label = self._label(operation, self.names[last.id])
            return last
        node = FlowNode(f"o{operation.index}", self._label(operation, [operation.name]), "operation", "none", parent)
        node.path, node.line = path, line
        self.names[node.id] = [operation.name]
        return self._add(node)

    def _label(self, operation: Operation, names: list[str]) -> str:
        text = self._expression(operation.place)
        if text and len(text) <= LONGEST_LABEL:
            return text
        kept = [name for name in names if not name.startswith("__")] or names
        return " · ".join(kept)[-LONGEST_LABEL:]

    def _expression(self, place: Place | None) -> str:
        return expression(place, self.files.lines[place.code.co_filename]) if place is not None else ""

    def _add(self, node: FlowNode) -> FlowNode:
        self.order[node.id] = len(self.order)
        self.nodes[node.id] = node
        return node

    # --- statuses and edges -----------------------------------------------------------------

    def _carrying_values(self) -> set[int]:
        """Return the values that the data of some source reaches."""
        carrying = set(self.recording.leaves.values())
        for operation in self.recording.operations:
            if carrying.intersection(operation.inputs):
                carrying.update(operation.outputs)
        return carrying

    def _owned_leaves(self) -> dict[str, list[str]]:
        """Return, for every module, the names of the sources inside it."""
        owned: dict[str, list[str]] = {}
        for name in self.recording.leaves:
            module = name.rpartition(".")[0]
            while module:
                owned.setdefault(module, []).append(name)
                module = module.rpartition(".")[0]
        return owned

    def _status(self, value: int) -> FlowStatus:
        if value not in self.carrying:
            return "none"
        return "flows" if value in self.arriving else "blocked"

    def _status_into(self, operation: Operation, value: int) -> FlowStatus:
        """Return the status of a value on its way into one operation: the gradient may come back by another."""
        status = self._status(value)
        if status != "flows":
            return status
        for output in operation.outputs:
            if output in self.arriving and value in linked_to(self.recording.values, operation, output):
                return "flows"
        return "blocked"

    def _ends(self) -> tuple[int, ...]:
        """Return the values that a gradient would start from: the outputs, or what the call that raised was given."""
        pending = self.recording.pending
        return tuple(self.recording.sinks) or (tuple(pending.inputs) if pending is not None else ())

    def _connect(self, operation: Operation, node_id: str) -> None:
        for value in operation.inputs:
            origin = self.home.get(value)
            if origin is not None and origin != node_id:
                pair = self._siblings(origin, node_id)
                if pair is not None:
                    self.edges[pair] = self._status_into(operation, value)

    def _siblings(self, first: str, second: str) -> tuple[str, str] | None:
        """Return the ancestors of two nodes (or the nodes) that have the same parent."""
        a, b = self._lineage(first), self._lineage(second)
        for left, right in zip(a, b, strict=False):
            if left != right:
                return (left, right)
        return None

    def _lineage(self, node_id: str) -> list[str]:
        """Return what a node is inside of, outermost first, and the node."""
        if node_id not in self.lineages:
            parent = self.nodes[node_id].parent
            self.lineages[node_id] = [*(self._lineage(parent) if parent is not None else ()), node_id]
        return self.lineages[node_id]

    def _finish(self) -> None:
        self._connect_untraced_inputs()
        if self.recording.error is not None:
            self._add_crash(self.recording.error)
        else:
            for index, value in enumerate(self.recording.sinks):
                detail = self.recording.values[value].detail
                self._add(FlowNode(f"output.{index}", f"output.{index}", "output", self._status(value), detail=detail))
                self._lead_to(f"output.{index}", value)
        for node in self.nodes.values():
            if os.path.isabs(node.path):
                node.path = self.files.names.get(node.path, node.path)

    def _add_crash(self, error: BaseException) -> None:
        """End the picture with the call that raised."""
        pending = self.recording.pending
        place = pending.place if pending is not None else None
        modules = [scope.label for scope in self.recording.ancestors(pending.scope) if scope.module] if pending else []
        where = modules[-1] if modules else self._expression(place)
        label = f"{where or 'the run'}  raises {type(error).__name__}"
        node = FlowNode("crash", label, "output", "blocked")
        node.path, node.line = (place.code.co_filename, place.line) if place else ("", 0)
        self._add(node)
        for value in pending.inputs if pending is not None else ():
            self._lead_to("crash", value)

    def _lead_to(self, node_id: str, value: int) -> None:
        """Draw an edge from where a value comes from to one of the last nodes."""
        if value in self.home:
            pair = self._siblings(self.home[value], node_id)
            if pair is not None:
                self.edges[pair] = self._status(value)

    def _connect_untraced_inputs(self) -> None:
        """Lead an image to the first step of the forward pass."""
        top = [node for node in self.nodes.values() if node.parent is None and node.type != CONSTRUCTOR]
        steps = [node for node in top if node.kind != "input"]
        for node in top:
            if node.kind == "input" and steps and node.id not in {source for source, _ in self.edges}:
                self.edges[(node.id, steps[0].id)] = "none"


def _region_label(site: Site) -> str:
    if site.how == "decorator":
        return f"{site.function.rpartition('.')[2]}  @{site.mechanism}"
    return f"{site.function}  {'with ' if site.how == 'block' else ''}{site.mechanism}"
