"""The statuses of the graph, against what autograd gives to the very same places."""

from __future__ import annotations

import sys

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
