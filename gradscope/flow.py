"""The flow graph that reports draw: what flows where, nested by region and module, as plain data."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

NodeKind: TypeAlias = Literal["input", "region", "module", "operation", "output"]
FlowStatus: TypeAlias = Literal["flows", "blocked", "none"]


@dataclass(slots=True)
class FlowNode:
    """One step of the forward pass, in execution order.

    A *region* is a stretch of code in which gradients are switched off (it carries the id of its
    finding and nests what ran inside it), a *module* is one call of an ``nn.Module``, an
    *operation* one or more torch calls of one source line outside any leaf module, or a call that is
    blamed itself (it carries the id of its finding), wherever it is.
    ``status``: ``flows`` (autograd connects it to the output), ``blocked`` (data passes, autograd
    does not), ``none`` (nothing here could carry a gradient: preprocessing, tables).
    ``detail`` is the shape and dtype of what it gives out, ``type`` the class of a module.
    """

    id: str
    label: str
    kind: NodeKind
    status: FlowStatus = "none"
    parent: str | None = None
    module: str = ""
    type: str = ""
    detail: str = ""
    frozen: bool = False
    parameters: int = 0
    path: str = ""
    line: int = 0
    finding: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the node as in ``gradscope.session/1``; fields that say nothing are left out."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        always = ("id", "label", "kind", "status")
        return {name: value for name, value in data.items() if value or name in always}


@dataclass(frozen=True, slots=True)
class FlowEdge:
    """Data passing from one node to another that has the same parent."""

    source: str
    target: str
    status: FlowStatus = "none"

    def to_dict(self) -> dict[str, Any]:
        """Return the edge as in ``gradscope.session/1``."""
        return {"from": self.source, "to": self.target, "status": self.status}


@dataclass(slots=True)
class FlowGraph:
    """Nodes in execution order and the edges between siblings."""

    nodes: list[FlowNode] = field(default_factory=list)
    edges: list[FlowEdge] = field(default_factory=list)

    def children(self, parent: str | None) -> list[FlowNode]:
        """Return the nodes directly inside ``parent`` (``None``: the top level)."""
        return [node for node in self.nodes if node.parent == parent]

    def without_source(self) -> FlowGraph:
        """Return the graph with operations named by their line: their labels are expressions of the source."""
        nodes = [
            replace(node, label=f"line {node.line}" if node.line else "operation") if node.kind == "operation" else node
            for node in self.nodes
        ]
        return FlowGraph(nodes, self.edges)

    def pointing_at(self, findings: Container[str]) -> FlowGraph:
        """Return the graph whose nodes name no findings but these."""
        nodes = [node if node.finding in findings else replace(node, finding=None) for node in self.nodes]
        return FlowGraph(nodes, self.edges)

    def to_dict(self) -> dict[str, Any]:
        """Return the graph as in ``gradscope.session/1``."""
        return {
            "nodes": [node.to_dict() for node in self.nodes],
            "edges": [edge.to_dict() for edge in self.edges],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FlowGraph:
        """Read a graph back from :meth:`to_dict`."""
        return cls(
            nodes=[FlowNode(**node) for node in data.get("nodes", [])],
            edges=[FlowEdge(e["from"], e["to"], e["status"]) for e in data.get("edges", [])],
        )
