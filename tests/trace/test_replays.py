"""Replays of CUDA graphs: the graph here is an imitation, whose kernels are a plain function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import gradscope
from gradscope.tracing import replays


class Graph:
    """Stands for a captured graph: ``replay`` runs what was captured where no torch function looks."""

    def __init__(self, kernels: Callable[[], None]) -> None:
        self.kernels = kernels

    def pool(self) -> tuple[int, int]:
        return (0, 1)


class Captured(nn.Module):
    """``second(graph of middle(first(x)))``, as a model that captured a part of itself runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.second = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self._given, self._made = torch.zeros(3, 4), torch.zeros(3, 4)
        self._graph = Graph(self._captured)

    def _captured(self) -> None:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            self._made.copy_(nn.functional.linear(self._given, self.middle.weight, self.middle.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._given.copy_(self.first(x).detach())
        torch.cuda.CUDAGraph.replay(self._graph)
        return self.second(self._made)


@pytest.fixture(autouse=True)
def _imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: graph.kernels())
    monkeypatch.setattr(replays, "_spans", lambda pool: SPANS)


SPANS: list[tuple[int, int]] = []


@pytest.fixture
def model() -> Captured:
    made = Captured()
    start = made._made.data_ptr()
    SPANS[:] = [(start, start + made._made.numel() * 4)]
    return made


def test_a_replay_stops_the_gradient_of_what_it_reads(model: Captured) -> None:
    x = torch.randn(3, 4)
    model(x).sum().backward()
    arrives = {name: parameter.grad is not None for name, parameter in model.named_parameters()}
    session = gradscope.trace(model, x, mode="real")
    assert arrives == {name: session.sources[name].status == "flows" for name in arrives}
    assert {session.sources[name].status for name in ("first.weight", "middle.weight")} == {"blocked"}
    errors = [each for each in session.findings if each.severity == "error"]
    assert [(each.rule, each.source.strip()) for each in errors] == [
        ("GS201", "self._given.copy_(self.first(x).detach())"),
        ("GS503", "torch.cuda.CUDAGraph.replay(self._graph)"),
    ]
    assert {"middle.weight", "middle.bias"} <= set(errors[1].cuts) and "make_graphed_callables" in errors[1].fix


def test_what_a_replay_writes_is_put_back(model: Captured) -> None:
    model(torch.randn(3, 4))
    before = model._given.clone(), model._made.clone()
    gradscope.trace(model, torch.randn(3, 4), mode="real")
    assert torch.equal(model._given, before[0]) and torch.equal(model._made, before[1])
    assert torch.cuda.CUDAGraph.replay.__name__ == "<lambda>"


def test_a_replay_whose_result_is_not_used_stops_nothing(model: Captured) -> None:
    class Beside(Captured):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            super().forward(x)
            return self.second(self.middle(self.first(x)))

    beside = Beside()
    SPANS[:] = [(beside._made.data_ptr(), beside._made.data_ptr() + 48)]
    session = gradscope.trace(beside, torch.randn(3, 4), mode="real")
    assert session.verdict == "flows"
    assert {source.status for source in session.sources.values()} == {"flows"}
