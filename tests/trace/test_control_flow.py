"""Control flow of torch: what a branch or a step computes is judged like any other line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gradscope
from gradscope.session import Session
from gradscope.tracing.control_flow import meaning_of

scan_module = pytest.importorskip("torch._higher_order_ops.scan")
map_module = pytest.importorskip("torch._higher_order_ops.map")
while_module = pytest.importorskip("torch._higher_order_ops.while_loop")
if meaning_of(scan_module.scan_op) is None:
    pytest.skip("this torch has no derivative of them", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")
Flow = Callable[["Two", torch.Tensor], torch.Tensor]


class Two(nn.Module):
    """Two layers that are used in what is given to an operator, and not given to it."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.flow = flow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.flow(self, x)


def given() -> torch.Tensor:
    return torch.linspace(-1, 1, 12).view(3, 4)


def branching(model: Two, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.cond(x.sum() < 9, lambda x: model.first(x).tanh(), lambda x: x.tanh(), (x,))
    return model.second(hidden)


def looping(model: Two, x: torch.Tensor) -> torch.Tensor:
    start = (torch.tensor(0), x)
    _, hidden = while_module.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, model.first(h).tanh()), start)
    return model.second(hidden)


def mapping(model: Two, x: torch.Tensor) -> torch.Tensor:
    return model.second(map_module.map(lambda row, shift: model.first(row) * shift, x, model.second.bias))


def scanning(model: Two, x: torch.Tensor) -> torch.Tensor:
    def step(state: dict[str, torch.Tensor], row: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any]:
        state = {"h": torch.tanh(model.first(state["h"]) + row)}
        return state, (state["h"] * 2, state["h"].sum())

    state, (rows, sums) = scan_module.scan(step, {"h": torch.zeros(4)}, x)
    return model.second(rows) + sums[:, None] + state["h"]


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("flow", [branching, looping, mapping, scanning])
def test_parameters_of_a_branch_get_their_gradient(flow: Flow, mode: str) -> None:
    model, x = Two(flow), given()
    output = model(x)
    output.sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in model.parameters())
    session = gradscope.trace(Two(flow), x, mode=mode)
    assert session.verdict == "flows" and session.findings == []
    assert {source.status for source in session.sources.values()} == {"flows"}


def cut_in_a_branch(model: Two, x: torch.Tensor) -> torch.Tensor:
    hidden = model.first(x)
    hidden = torch.cond(x.sum() < 9, lambda h: h.detach() * 2, lambda h: h * 3, (hidden,))
    return model.second(hidden)


def cut_in_a_step(model: Two, x: torch.Tensor) -> torch.Tensor:
    def step(state: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = torch.tanh(state.detach() + row)
        return state, state.clone()

    return scan_module.scan(step, model.first.bias * 1, model.second(x))[1]


def named(session: Session, flow: Flow) -> list[tuple[str, int]]:
    return [(each.rule, each.line - flow.__code__.co_firstlineno) for each in session.findings]


@pytest.mark.parametrize(("flow", "line", "source"), [
    (cut_in_a_branch, 2, "first.weight"), (cut_in_a_step, 2, "first.bias"),
])  # fmt: skip
def test_a_cut_in_a_branch_is_named_by_its_line(flow: Flow, line: int, source: str) -> None:
    session = gradscope.trace(Two(flow), given(), mode="real")
    assert session.sources[source].status == "blocked" and session.fix_verified
    assert named(session, flow) == [("GS201", line)]
