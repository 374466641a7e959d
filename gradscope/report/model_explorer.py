"""The whole flow graph as JSON for Google's Model Explorer, which stays quick with ten thousand nodes.

Format: ``graph_builder.py`` of ai-edge-model-explorer (https://github.com/google-ai-edge/model-explorer).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from gradscope.flow import FlowGraph, FlowNode
from gradscope.session import Session

# (background, border) by status, the same as in the other pictures.
COLOURS = {"flows": ("#e3f4e6", "#1a7f37"), "blocked": ("#fde7e4", "#c62828"), "none": ("#f2f2f2", "#8c8c8c")}
RED = "#c62828"

Json = dict[str, Any]


def render(session: Session, *, full: bool = False) -> str:
    """Return the graph of a session; nothing is folded, since Model Explorer folds by itself."""
    return render_several([session], full=full)


def render_several(sessions: Sequence[Session], *, full: bool = False) -> str:
    """Return a graph for each session, to choose from in the viewer, and the graph with the fix where there is one."""
    graphs = []
    for session in sessions:
        name = ".".join(str(session.target[key]) for key in ("name", "entry") if session.target.get(key))
        graphs.append(_graph(session, session.graph, f"{name}: {session.verdict}"))
        if session.healed is not None:
            graphs.append(_graph(session, session.healed, f"{name}, with the fix"))
    seen: Counter[str] = Counter()
    for graph in graphs:
        seen[graph["id"]] += 1
        if seen[graph["id"]] > 1:
            graph["id"] += f" ({seen[graph['id']]})"
    return json.dumps({"label": "gradscope", "graphs": graphs}, indent=1) + "\n"


# --- the parts -------------------------------------------------------------------------------------


def _graph(session: Session, graph: FlowGraph, name: str) -> Json:
    inside = _Nesting(graph)
    incoming: dict[str, list[str]] = {}
    lost = []
    for edge in graph.edges:
        # Model Explorer draws edges between what has nothing inside: a group stands for its first or last node.
        source, target = inside.last(edge.source), inside.first(edge.target)
        if source != target and source not in incoming.setdefault(target, []):
            incoming[target].append(source)
            if edge.status == "blocked":
                lost.append({"sourceNodeId": source, "targetNodeId": target})
    result: Json = {
        "id": name,
        "nodes": [_node(session, node, inside, incoming.get(node.id, [])) for node in graph.nodes
                  if node.id not in inside.children],
        "groupNodeAttributes": {"": _about(session)},
        "groupNodeConfigs": [],
    }  # fmt: skip
    for node in graph.nodes:
        if node.id in inside.children:
            space = inside.space[node.id]
            result["groupNodeAttributes"][space] = _facts(session, node)
            if node.kind == "region":
                result["groupNodeConfigs"].append(
                    {"namespaceRegex": f"^{re.escape(space)}$", "backgroundColor": COLOURS["blocked"][0],
                     "borderColor": RED}
                )  # fmt: skip
    if lost:
        overlay = {"name": "blocked: the gradient does not pass", "edgeColor": RED, "edges": lost}
        result["tasksData"] = {"edgeOverlaysDataListLeftPane": [
            {"name": "Lost gradients", "type": "edge_overlays", "overlays": [overlay]}
        ]}  # fmt: skip
    return result


class _Nesting:
    """What lies in what, and under which name: the labels of the nodes around it, told apart where they are alike."""

    def __init__(self, graph: FlowGraph) -> None:
        self.children: dict[str, list[str]] = {}
        self.space: dict[str, str] = {}
        used: Counter[tuple[str, str]] = Counter()
        known = {node.id for node in graph.nodes}
        for node in graph.nodes:
            if node.parent in known:
                self.children.setdefault(node.parent or "", []).append(node.id)
        self.above = {node.id: node.parent if node.parent in known else None for node in graph.nodes}
        for node in graph.nodes:
            around = self.space.get(node.parent or "", "")
            label = node.label.replace("/", "∕")
            used[around, label] += 1
            if used[around, label] > 1:
                label = f"{label} ({used[around, label]})"
            self.space[node.id] = f"{around}/{label}" if around else label

    def namespace(self, node: FlowNode) -> str:
        """Return the groups around a node, as ``a/b``."""
        return self.space.get(self.above[node.id] or "", "")

    def first(self, node_id: str) -> str:
        """Return the first node in a group; a node itself."""
        while node_id in self.children:
            node_id = self.children[node_id][0]
        return node_id

    def last(self, node_id: str) -> str:
        """Return the last node in a group; a node itself."""
        while node_id in self.children:
            node_id = self.children[node_id][-1]
        return node_id


def _node(session: Session, node: FlowNode, inside: _Nesting, sources: list[str]) -> Json:
    fill, line = COLOURS[node.status]
    tensor = [{"key": "__tensor_tag", "value": node.id}]
    if node.detail:
        tensor.append({"key": "tensor_shape", "value": node.detail})
    return {
        "id": node.id,
        "label": f"{node.label}  {node.type}" if node.type and node.kind == "module" else node.label,
        "namespace": inside.namespace(node),
        "attrs": [{"key": key, "value": value} for key, value in _facts(session, node).items()],
        "incomingEdges": [{"sourceNodeId": source} for source in sources],
        "outputsMetadata": [{"id": "0", "attrs": tensor}],
        "style": {"backgroundColor": fill, "borderColor": line, "hoveredBorderColor": line},
    }


def _facts(session: Session, node: FlowNode) -> dict[str, str]:
    """Return what is shown beside a node that is selected."""
    finding = next((each for each in session.findings if each.id == node.finding), None)
    facts = {
        "status": node.status,
        "module": node.module,
        "class": node.type,
        "frozen": "yes, which blocks nothing" if node.frozen else "",
        "parameters": str(node.parameters) if node.parameters else "",
        "place": f"{node.path}:{node.line}" if node.path else "",
        "finding": f"{finding.id} {finding.rule} {finding.name}: {finding.message}" if finding else "",
        "fix": finding.fix if finding else "",
    }
    return {key: value for key, value in facts.items() if value}


def _about(session: Session) -> dict[str, str]:
    """Return what is shown where nothing is selected: the verdict and the findings."""
    facts = {"verdict": session.verdict}
    facts |= {key: str(session.target[key]) for key in ("mode", "device", "dtype") if key in session.target}
    for finding in session.findings:
        facts[f"{finding.id} {finding.severity}"] = f"{finding.rule} {finding.name} {finding.path}:{finding.line}"
    return facts
