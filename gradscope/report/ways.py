"""The way of a gradient from the result back to the place that stops it, step by step: for readers that draw one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from gradscope.findings import Finding
from gradscope.flow import FlowGraph, FlowNode
from gradscope.report.places import place_of
from gradscope.session import Session


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a way: what it is, where, the module it belongs to, and how deep it lies in others."""

    label: str
    path: str = ""
    line: int = 0
    name: str = ""
    depth: int = 0


def ways_to(session: Session, finding: Finding) -> list[list[Step]]:
    """Return the ways to a finding, each ending there: in a trace from an output, in a scan from each entry."""
    path, line = place_of(session, finding)
    if session.kind == "scan":
        ways = [_calls(entry, finding) for entry in session.entries if finding.id in entry["findings"]]
    else:
        ways = [_backward(session.graph, finding)]
    last = Step(f"{finding.rule} {finding.name}: the gradient ends here", path, line, finding.function)
    return [[*_placed(way, last), replace(last, depth=len(way) and way[-1].depth + 1)] for way in ways if way]


# --- the parts -------------------------------------------------------------------------------------


def _calls(entry: dict[str, Any], finding: Finding) -> list[Step]:
    """Return the calls from an entry to the function of the finding, outermost first."""
    steps: list[Step] = []
    for depth, step in enumerate(entry["chain"]):
        steps.append(Step(f"calls {step['function']}" if depth else step["function"],
                          step["path"], step["line"], step["function"], depth))  # fmt: skip
        if step["function"] == finding.function and step["path"] == finding.path:
            break
    return steps


def _backward(graph: FlowGraph, finding: Finding) -> list[Step]:
    """Return the nodes from an output back to the finding's own, walking into the modules around it."""
    nodes = {node.id: node for node in graph.nodes}
    cut = _node_of(graph, finding)
    if cut is None:
        return []
    before: dict[str, list[str]] = {}
    for edge in graph.edges:
        before.setdefault(edge.target, []).append(edge.source)
    steps: list[Step] = []
    for depth, goal in enumerate(_lineage(cut, nodes)):
        inside = [node for node in graph.nodes if node.parent == goal.parent]
        ends = [node for node in inside if node.kind == "output"]
        if not ends:  # inside a module its results are what nothing in it uses
            used = {source for node in inside for source in before.get(node.id, ())}
            ends = [node for node in inside if node.id not in used]
        way = _shortest([node.id for node in ends], goal.id, _through_the_cut(goal.id, before, graph))
        steps += [_step(nodes[each], depth) for each in way or [goal.id]]
    # The cut's own node is the finding itself, which the caller puts last.
    return steps[:-1] if cut.finding == finding.id else steps


def _node_of(graph: FlowGraph, finding: Finding) -> FlowNode | None:
    """Return the node of a finding: marked with it, or of its line, or the module that it happens in."""
    best: FlowNode | None = None
    nearest = 0
    for node in graph.nodes:
        near = _nearness(node, finding)
        if near > nearest:
            best, nearest = node, near
    return best


def _nearness(node: FlowNode, finding: Finding) -> int:
    """Return how well a node fits a finding: more than any module if marked with it or of its line; 0 if not at all."""
    if node.finding == finding.id:
        return 1_000_002
    if finding.path and (node.path, node.line) == (finding.path, finding.line):
        return 1_000_001
    inside = node.module and f"{finding.module}.".startswith(f"{node.module}.")
    return len(node.module) if inside else 0


def _lineage(node: FlowNode, nodes: dict[str, FlowNode]) -> list[FlowNode]:
    """Return a node and what it lies in, outermost first."""
    line = [node]
    while line[-1].parent in nodes:
        line.append(nodes[line[-1].parent or ""])
    return line[::-1]


def _through_the_cut(goal: str, before: dict[str, list[str]], graph: FlowGraph) -> dict[str, list[str]]:
    """Return the edges without those that leave the goal and carry a gradient, where others lose it."""
    lost = {edge.target for edge in graph.edges if edge.source == goal and edge.status == "blocked"}
    if not lost:
        return before
    return {target: [each for each in sources if each != goal or target in lost] for target, sources in before.items()}


def _shortest(starts: Iterable[str], goal: str, before: dict[str, list[str]]) -> list[str]:
    """Return the shortest way from one of the starts to the goal against the edges; empty where there is none."""
    came: dict[str, str] = {start: "" for start in starts}
    queue = deque(came)
    while queue and goal not in came:
        current = queue.popleft()
        for source in before.get(current, ()):
            if source not in came:
                came[source] = current
                queue.append(source)
    if goal not in came:
        return []
    way = [goal]
    while came[way[-1]]:
        way.append(came[way[-1]])
    return way[::-1]


def _step(node: FlowNode, depth: int) -> Step:
    kind = f" ({node.type})" if node.type not in ("", "constructor") and node.kind == "module" else ""
    return Step(f"{node.label}{kind}", node.path, node.line, node.module, depth)


def _placed(steps: list[Step], last: Step) -> list[Step]:
    """Give steps without a line (modules, outputs) that of the next one on the way that has one."""
    placed: list[Step] = []
    here = last
    for step in reversed(steps):
        if step.path:
            here = step
        placed.append(replace(step, path=here.path, line=max(1, here.line)))
    return placed[::-1]
