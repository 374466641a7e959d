"""The graph for Model Explorer: by its own types where it is installed, and true to the session everywhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
from real import detected, traced

from gradscope.flow import FlowEdge, FlowGraph, FlowNode
from gradscope.report import model_explorer
from gradscope.session import Session


def graphs(*sessions: Session) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(model_explorer.render_several(sessions))["graphs"]
    return found


@pytest.mark.parametrize("real", [traced, detected])
def test_model_explorer_reads_it_as_its_own_graphs(real: Any) -> None:
    """Its viewer takes what its types describe; a field that they do not know fails here."""
    builder = pytest.importorskip("model_explorer.graph_builder", reason="pip install ai-edge-model-explorer")
    dacite = pytest.importorskip("dacite")
    data = json.loads(model_explorer.render(real()))
    collection = dacite.from_dict(builder.GraphCollection, data, dacite.Config(strict=True))
    assert [len(graph.nodes) for graph in collection.graphs] == [len(graph["nodes"]) for graph in data["graphs"]]


@pytest.mark.parametrize("real", [traced, detected])
def test_every_edge_ends_at_nodes_and_no_node_is_a_group(real: Any) -> None:
    for graph in graphs(real()):
        nodes = {node["id"]: node for node in graph["nodes"]}
        assert len(nodes) == len(graph["nodes"])
        ends = [edge["sourceNodeId"] for node in graph["nodes"] for edge in node["incomingEdges"]]
        overlays = graph.get("tasksData", {}).get("edgeOverlaysDataListLeftPane", [])
        ends += [end for each in overlays for one in each["overlays"] for edge in one["edges"] for end in edge.values()]
        assert ends and set(ends) <= set(nodes)
        spaces = {node["namespace"] for node in graph["nodes"]}
        groups = {space[:end] for space in spaces for end in [*_ends(space), len(space)]}
        assert set(graph["groupNodeAttributes"]) <= groups | {""}


def _ends(space: str) -> list[int]:
    return [index for index, letter in enumerate(space) if letter == "/"]


def test_the_whole_graph_is_there_with_its_cuts_and_with_the_fix() -> None:
    real = traced()
    broken, healed = graphs(real)
    inner = {node.parent for node in real.graph.nodes}
    assert {node["id"] for node in broken["nodes"]} == {n.id for n in real.graph.nodes if n.id not in inner}
    facts = [each for each in broken["groupNodeAttributes"].values() if "finding" in each]
    assert [each["finding"].partition(":")[0] for each in facts] == [
        f"{f.id} {f.rule} {f.name}" for f in real.findings[:2]
    ]
    assert len(broken["groupNodeConfigs"]) == 2
    statuses = {attr["value"] for node in healed["nodes"] for attr in node["attrs"] if attr["key"] == "status"}
    assert "flows" in statuses and "with the fix" in healed["id"]


def test_like_labels_and_slashes_make_groups_of_their_own() -> None:
    nodes = [FlowNode("a", "conv", "module"), FlowNode("b", "conv", "module"), FlowNode("c", "x/y", "module")]
    nodes += [FlowNode(f"{each}1", "op", "operation", parent=each, status="blocked") for each in "abc"]
    edges = [FlowEdge("a", "b", "blocked"), FlowEdge("b", "c", "flows")]
    (graph,) = graphs(Session("trace", "blocked", target={"name": "m"}, graph=FlowGraph(nodes, edges)))
    assert [node["namespace"] for node in graph["nodes"]] == ["conv", "conv (2)", "x∕y"]
    assert [node["incomingEdges"] for node in graph["nodes"]] == [
        [], [{"sourceNodeId": "a1"}], [{"sourceNodeId": "b1"}],
    ]  # fmt: skip
    (overlay,) = graph["tasksData"]["edgeOverlaysDataListLeftPane"][0]["overlays"]
    assert overlay["edges"] == [{"sourceNodeId": "a1", "targetNodeId": "b1"}]


def test_sessions_of_one_name_are_told_apart() -> None:
    names = [graph["id"] for graph in graphs(detected(), detected())]
    assert len(set(names)) == 2
