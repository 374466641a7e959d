"""The statuses of the graph, against what autograd gives to the very same places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gradscope


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
