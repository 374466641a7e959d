"""The flow graph as boxes in boxes, the form in which a page lays it out, folds it and opens it again."""

from __future__ import annotations

from collections import Counter
from typing import Any

from gradscope.flow import FlowGraph, FlowNode
from gradscope.report.views import ViewNode, fold
from gradscope.session import Session

# Boxes that are open when the page is: what fits a screen or two.
MOST_VISIBLE = 60
DEEPEST_OPEN = 3

Box = dict[str, Any]


def build(graph: FlowGraph, session: Session, *, full: bool = False) -> dict[str, Any]:
    """Return ``{"boxes": [...], "edges": [[from, to, status], ...]}``, ready for JSON.

    A box names its parent by index (``up``, -1 at the top) and stands behind it, in execution order. Repeats
    and preparation are boxes of their own (``kind`` ``group``) with all their members inside. Edges join boxes
    with the same parent. ``open`` marks what is unfolded at first: everything with ``full``.
    """
    views = fold(graph, None)
    drawing = _Drawing(_marks(graph, session))
    drawing.add_all(views, -1)
    boxes = drawing.boxes
    for index in range(len(boxes)) if full else _open_at_first(boxes):
        if boxes[index].pop("holds", 0):
            boxes[index]["open"] = 1
    for box in boxes:
        box.pop("holds", None)
    edges: dict[tuple[int, int], str] = {}
    for edge in graph.edges:
        pair = drawing.siblings(edge.source, edge.target)
        if pair is not None:
            # Of several edges that fold into one, the one that breaks is the one to see.
            known = edges.get(pair, "none")
            edges[pair] = known if known == "blocked" or edge.status == "none" else edge.status
    return {"boxes": boxes, "edges": [[a, b, status] for (a, b), status in edges.items()]}


# --- the parts -------------------------------------------------------------------------------------


def _marks(graph: FlowGraph, session: Session) -> dict[str, str]:
    """Return the finding of each node: its own, or for an operation the one that blames its line."""
    marks = {node.id: node.finding for node in graph.nodes if node.finding}
    by_line = {
        (finding.path, line): finding.id
        for finding in reversed(session.findings)
        if finding.id not in marks.values()
        for line in range(finding.line, max(finding.line, finding.end_line) + 1)
    }
    for node in graph.nodes:
        if node.kind == "operation" and (node.path, node.line) in by_line:
            marks[node.id] = by_line[node.path, node.line]
    return marks


class _Drawing:
    def __init__(self, marks: dict[str, str]) -> None:
        self.marks = marks
        self.boxes: list[Box] = []
        self.index: dict[str, int] = {}
        self.seen: Counter[str] = Counter()

    def add_all(self, views: list[ViewNode], up: int) -> None:
        for view in views:
            self._add(view, up)

    def _add(self, view: ViewNode, up: int) -> None:
        inside = view.members or view.children
        box = self._box(view, "group" if view.members else view.node.kind, up)
        box["holds"] = len(inside)
        self.boxes.append(box)
        index = len(self.boxes) - 1
        if not view.members:
            self.index[view.node.id] = index
        self.add_all(inside, index)

    def _box(self, view: ViewNode, kind: str, up: int) -> Box:
        node = view.node
        name = f"{kind} {node.module or view.label}"
        self.seen[name] += 1
        said = {
            # The same step of another run has the same key: that is how two runs are laid side by side.
            "key": f"{name} {self.seen[name]}",
            "type": node.type if node.type not in (view.label, "constructor") else "",
            "detail": node.detail,
            "module": "" if view.members else node.module,
            "frozen": int(node.frozen),
            "parameters": node.parameters,
            "place": "" if view.members else _place(node),
            "finding": "" if view.members else self.marks.get(node.id, ""),
            "aside": int(node.type == "constructor"),
        }
        box: Box = {"up": up, "label": view.label, "kind": kind, "status": node.status}
        return box | {name: value for name, value in said.items() if value}

    def siblings(self, first: str, second: str) -> tuple[int, int] | None:
        """Return the two boxes with one parent that hold two nodes; None where one holds the other."""
        if first not in self.index or second not in self.index:
            return None
        for left, right in zip(self._lineage(first), self._lineage(second), strict=False):
            if left != right:
                return (left, right)
        return None

    def _lineage(self, node_id: str) -> list[int]:
        line = [self.index[node_id]]
        while (up := self.boxes[line[-1]]["up"]) >= 0:
            line.append(up)
        return line[::-1]


def _place(node: FlowNode) -> str:
    return f"{node.path}:{node.line}" if node.path and node.line else node.path


def _open_at_first(boxes: list[Box]) -> list[int]:
    """Return the boxes to open: regions, and modules to the greatest depth that keeps the page short."""
    chosen: list[int] = []
    for depth in range(DEEPEST_OPEN, -1, -1):
        chosen, visible = _opened_to(boxes, depth)
        if visible <= MOST_VISIBLE:
            break
    return chosen


def _opened_to(boxes: list[Box], most: int) -> tuple[list[int], int]:
    """Return what is open with modules open for ``most`` levels, and how many boxes that shows."""
    depth = {-1: 0}  # of open boxes only
    chosen, visible = [], 0
    for index, box in enumerate(boxes):
        if box["up"] not in depth:
            continue
        visible += 1
        level = depth[box["up"]] + (box["kind"] == "module")
        # One lone operation inside a module says no more than the module itself.
        worth = box["holds"] > (1 if box["kind"] == "module" else 0)
        closed = box["kind"] == "group" or "aside" in box or not worth
        if not closed and (box["kind"] == "region" or level <= most):
            depth[index] = level
            chosen.append(index)
    return chosen, visible
