"""Pure transforms from the flow graph to what is worth showing: folded, cut at a depth, never too long."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from gradscope.flow import FlowGraph, FlowNode, FlowStatus

MOST_LINES = 44
# Further in, indents leave no room for words; and Python's own stack ends somewhere.
DEEPEST_LEVEL = 40
FEWEST_NAMED_ALIKE = 3


@dataclass(slots=True)
class ViewNode:
    """A node to show: one flow node, or several folded into one (``ids`` has them all).

    ``members`` are the views that were folded into this one, for pages that can open it again.
    """

    node: FlowNode
    label: str
    ids: list[str]
    children: list[ViewNode] = field(default_factory=list)
    members: list[ViewNode] = field(default_factory=list)

    def walk(self) -> Iterator[ViewNode]:
        """Yield this node and everything below it."""
        yield self
        for child in self.children:
            yield from child.walk()


def fold(graph: FlowGraph, most_lines: int | None = MOST_LINES) -> list[ViewNode]:
    """Return the graph as a tree with repeats folded, no longer than ``most_lines`` where given.

    Where it is too long, the deepest modules are closed first; the places where the gradient breaks stay in sight.
    """
    whole = _build(_children(graph), None)
    if most_lines is None:
        return whole
    for depth in (3, 2, 1, 0):
        shown = [_closed(node, depth) for node in whole]
        if sum(1 for top in shown for _ in top.walk()) <= most_lines:
            return shown
    return _shortened(shown, most_lines)


def edges_between(views: list[ViewNode], graph: FlowGraph) -> list[tuple[ViewNode, ViewNode, FlowStatus]]:
    """Return the edges between what is shown, one for each pair: what is folded away counts as what stands for it."""
    visible = {node_id: view for top in views for view in top.walk() for node_id in view.ids}
    pairs: dict[tuple[str, str], tuple[ViewNode, ViewNode, FlowStatus]] = {}
    for edge in graph.edges:
        source, target = visible.get(edge.source), visible.get(edge.target)
        if source is None or target is None:
            continue
        # What is hidden in a module stands for no box of its own beside the break that is shown in it.
        if not (_holds(source, target) or _holds(target, source)):
            pairs.setdefault((source.ids[0], target.ids[0]), (source, target, edge.status))
    return list(pairs.values())


# --- the parts -------------------------------------------------------------------------------------


def _children(graph: FlowGraph) -> dict[str | None, list[FlowNode]]:
    """Return the nodes by parent; what lies deeper than ``DEEPEST_LEVEL`` stands beside its parent."""
    children: dict[str | None, list[FlowNode]] = {}
    placed: dict[str | None, tuple[str | None, int]] = {None: (None, -1)}
    for node in graph.nodes:
        parent = node.parent
        above, level = placed.get(parent, (None, 0))
        if level == DEEPEST_LEVEL:
            parent, level = above, level - 1
        placed[node.id] = (parent, level + 1)
        children.setdefault(parent, []).append(node)
    return children


def _build(children: dict[str | None, list[FlowNode]], parent: str | None) -> list[ViewNode]:
    nodes = [ViewNode(node, node.label, [node.id], _build(children, node.id)) for node in children.get(parent, [])]
    return _fold_preparation(_fold_repeats(nodes))


def _fold_repeats(nodes: list[ViewNode]) -> list[ViewNode]:
    """Fold ``blocks.0`` to ``blocks.11`` into one where they are alike."""
    folded: list[ViewNode] = []
    start = 0
    while start < len(nodes):
        end = start + 1
        while end < len(nodes) and _alike(nodes[start], nodes[end]):
            end += 1
        run = nodes[start:end]
        # A list counts its members with dots; a name such as layer_1 has to be one of several to count as a list.
        listed = "." in run[0].node.label or len(run) >= FEWEST_NAMED_ALIKE
        folded += [_merged(run)] if listed else run
        start = end
    return folded


def _alike(first: ViewNode, other: ViewNode) -> bool:
    a, b = first.node, other.node
    same = _shape(first) == _shape(other)
    stem, number = _numbered(a.label)
    other_stem, other_number = _numbered(b.label)
    return same and a.kind == "module" and bool(number and other_number) and stem == other_stem


def _numbered(label: str) -> tuple[str, str]:
    """Return what comes before the number at the end of ``blocks.3`` or ``layer_3``, and the number."""
    found = re.fullmatch(r"(|.*[._])(\d+)", label)
    return (found[1], found[2]) if found else (label, "")


def _shape(view: ViewNode) -> tuple[object, ...]:
    """Return what two nodes must share to be shown as one; a break inside one of them keeps it apart."""
    node = view.node
    return (node.kind, node.type, node.status, node.frozen, node.finding, *map(_shape, view.children))


def _merged(run: list[ViewNode]) -> ViewNode:
    first = run[0]
    if len(run) == 1:
        return first
    last = _numbered(run[-1].node.label)[1]
    node = replace(first.node, detail=run[-1].node.detail, parameters=sum(n.node.parameters for n in run))
    label = f"{first.label}-{last}  x{len(run)}"
    return ViewNode(node, label, [i for member in run for i in _ids(member)], first.children, run)


def _fold_preparation(nodes: list[ViewNode]) -> list[ViewNode]:
    """Fold the steps before the first one that could carry a gradient into ``preprocess``."""
    steps = [n for n in nodes if n.node.kind != "input" and n.node.type != "constructor"]
    count = 0
    while count < len(steps) and steps[count].node.kind != "region" and steps[count].node.status == "none":
        count += 1
    if count < 2 or count == len(steps):
        return nodes
    group = steps[:count]
    last = group[-1].node
    node = FlowNode(group[0].node.id, "preprocess", "operation", "none", last.parent, detail=last.detail)
    merged = ViewNode(
        node, f"preprocess  ({count} steps)", [i for member in group for i in _ids(member)], members=group
    )
    position = nodes.index(group[0])
    return [*nodes[:position], merged, *nodes[position + count :]]


def _ids(view: ViewNode) -> list[str]:
    return [i for node in view.walk() for i in node.ids]


def _closed(view: ViewNode, depth: int) -> ViewNode:
    """Return the node with modules open for ``depth`` levels only, and further only on the way to a break."""
    is_module = view.node.kind == "module"
    if is_module and depth == 0:
        broken = [_closed(child, 0) for child in view.children if _is_broken(child)]
        hidden = [i for child in view.children if not _is_broken(child) for i in _ids(child)]
        return ViewNode(view.node, view.label, [*view.ids, *hidden], broken)
    below = depth - 1 if is_module else depth
    children = [_closed(child, below) for child in view.children]
    # One lone operation inside a module says no more than the module itself.
    if (
        is_module
        and len(children) < 2
        and not any(child.children or len(child.ids) > 1 or child.node.finding for child in children)
    ):
        return ViewNode(view.node, view.label, _ids(view))
    return ViewNode(view.node, view.label, view.ids, children)


def _holds(view: ViewNode, other: ViewNode) -> bool:
    return any(each is other for each in view.walk())


def _is_broken(view: ViewNode) -> bool:
    return any(each.node.finding for each in view.walk())


def _shortened(nodes: list[ViewNode], most_lines: int) -> list[ViewNode]:
    """Keep the first lines of a tree that is too long even when closed, and say how many are left out."""
    total = sum(1 for top in nodes for _ in top.walk())
    kept, _ = _first_lines(nodes, most_lines - 1)
    shown = sum(1 for top in kept for _ in top.walk())
    more = FlowNode("more", "more", "operation")
    return [*kept, ViewNode(more, f"... {total - shown} more (--full shows them)", ["more"])]


def _first_lines(nodes: list[ViewNode], room: int) -> tuple[list[ViewNode], int]:
    kept: list[ViewNode] = []
    for view in nodes:
        if room <= 0:
            break
        children, room = _first_lines(view.children, room - 1)
        kept.append(ViewNode(view.node, view.label, view.ids, children))
    return kept, room
