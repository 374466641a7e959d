"""The statuses of the graph, against what autograd gives to the very same places."""

from __future__ import annotations

import copy
import gc
import importlib
import linecache
import pickle
import sys
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch
import torchvision
from torch import Tensor, nn

import gradscope
from gradscope.report import dot, mermaid
from gradscope.report.views import MOST_LINES, edges_between, fold


class Ways(nn.Module):
    """One of each: a gate under no_grad, codes by argmax, a detached branch, a branch beside it that flows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.gate = nn.Linear(8, 8)
        self.codes = nn.Linear(8, 4)
        self.table = nn.Embedding(4, 8)
        self.teacher = nn.Linear(8, 8)
        self.side = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        with torch.no_grad():
            gate = self.gate(h).sigmoid()
        code = self.codes(h).argmax(-1)
        taught = self.teacher(h).detach()
        out: Tensor = self.head(self.table(code) + self.side(h) * gate + taught)
        return out


def gradients(model: nn.Module, x: Tensor) -> dict[str, bool]:
    """Return for each module whether the gradient comes back to what it gave out."""
    given: dict[str, Tensor] = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda m, i, out, name=name: given.setdefault(name, out))  # type: ignore[misc]
    result = model(x)
    for out in given.values():
        if out.requires_grad:
            out.retain_grad()
    result.sum().backward()
    return {name: out.grad is not None for name, out in given.items()}


@pytest.mark.parametrize("mode", ["structural", "real"])
def test_a_box_flows_where_autograd_gives_its_output_a_gradient(mode: str) -> None:
    x = torch.randn(3, 8)
    session = gradscope.trace(Ways(), x, mode=mode)
    statuses = {node.module: node.status for node in session.graph.nodes if node.kind == "module"}
    assert {name: status == "flows" for name, status in statuses.items()} == gradients(Ways(), x)
    assert {name for name, status in statuses.items() if status == "blocked"} == {"gate", "codes", "teacher"}


def test_an_edge_is_blocked_where_the_gradient_comes_back_by_another() -> None:
    session = gradscope.trace(Ways(), torch.randn(3, 8))
    module = {node.id: node.module for node in session.graph.nodes}
    from_stem = {module[edge.target] or edge.target: edge.status for edge in session.graph.edges
                 if module[edge.source] == "stem"}  # fmt: skip
    assert from_stem["side"] == "flows"
    assert {from_stem["codes"], from_stem["teacher"]} == {"blocked"}


class Quiet(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 2).detach()


def test_a_call_that_cuts_is_drawn_inside_the_module_that_makes_it() -> None:
    session = gradscope.trace(nn.Sequential(nn.Linear(4, 4), Quiet(), nn.Linear(4, 4)), torch.randn(2, 4))
    inside = next(node for node in session.graph.nodes if node.module == "1")
    cut = next(node for node in session.graph.nodes if node.finding)
    assert (cut.parent, cut.kind, cut.status, cut.finding) == (inside.id, "operation", "blocked", "F1")
    finding = session.finding("F1")
    assert (cut.path, cut.line) == (finding.path, finding.line)
    # A graph without a cut shows no more than it did: one box for each module.
    assert {node.kind for node in session.graph.nodes if node is not cut} == {"input", "module", "output"}


def test_a_cut_deep_in_a_large_model_stays_in_sight_in_every_picture() -> None:
    model = torchvision.models.vit_b_16()
    forward = model.encoder.layers.encoder_layer_6.mlp.forward
    model.encoder.layers.encoder_layer_6.mlp.forward = lambda x: forward(x).detach()
    session = gradscope.trace(model, torch.randn(1, 3, 224, 224))
    shown = [view for top in fold(session.graph) for view in top.walk()]
    assert len(shown) <= MOST_LINES
    (cut,) = (view for view in shown if view.node.finding)
    call = "forward(x).detach()" if sys.version_info >= (3, 11) else "detach"  # before, code tells no columns
    assert cut.node.label == call
    assert f"CUT  {call}  GS201" in dot.build(session).source
    assert mermaid.render(session).count("GS201") == 1
    # What is hidden beside it is no neighbour of it.
    hidden = [(a.label, b.label) for a, b, _ in edges_between(fold(session.graph, 12), session.graph)
              if a in b.walk() or b in a.walk()]  # fmt: skip
    assert hidden == []


SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            hidden = self.linear(x) * 2
        return (hidden + 1) * x.mean()
"""


def test_a_graph_that_is_looked_at_later_shows_files_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "drawn_later.py"
    file.write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    model, x = importlib.import_module("drawn_later").Net(), torch.randn(2, 4, requires_grad=True)
    now, later = (gradscope.trace(model, x, mode="real") for _ in range(2))
    expected = now.to_dict()["graph"]
    assert "(hidden + 1) * x.mean()" in [node["label"] for node in expected["nodes"]]
    file.write_text("\n" * 40)
    linecache.checkcache()
    monkeypatch.undo()  # another working folder, and none of the imports
    assert later.to_dict()["graph"] == expected


def test_a_graph_that_nobody_looked_at_yet_can_be_compared_copied_and_pickled() -> None:
    sessions = [gradscope.trace(Ways(), torch.randn(3, 8), mode="real", verify=False) for _ in range(4)]
    drawn = sessions[0].graph.to_dict()
    assert sessions[0].graph == sessions[1].graph
    assert copy.deepcopy(sessions[2].graph).to_dict() == drawn
    assert pickle.loads(pickle.dumps(sessions[3].graph)).to_dict() == drawn
    assert not hasattr(sessions[3].graph, "vertices")


def test_a_session_holds_no_tensor_and_no_module() -> None:
    session = gradscope.trace(Ways(), torch.randn(3, 8, requires_grad=True), mode="real")
    pending, seen = [session], set()
    while pending:
        each = pending.pop()
        if id(each) in seen or isinstance(each, (type, ModuleType)):
            continue
        seen.add(id(each))
        assert not isinstance(each, (Tensor, nn.Module)), each
        inside = (each.__closure__, each.__defaults__) if isinstance(each, FunctionType) else (each,)
        pending += gc.get_referents(*inside)
    assert len(seen) > 500
