"""One cut, one place named: what stood beside a cut in real models and was named with it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import gradscope
from gradscope.tracing.borrowed import Question, subject_of
from gradscope.tracing.frames import code_name
from gradscope.tracing.runner import Runner
from gradscope.tracing.workshops import open_workshop

Forward = Callable[["Block", torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """Two layers; what happens between and behind them is the case."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.middle = Middle()
        self.second = nn.Linear(4, 4)
        self.case = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.case(self, x)


class Middle(nn.Module):
    """Goes through numpy inside a module that is called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)  # the cut


def numpy_inside_a_module(block: Block, x: torch.Tensor) -> torch.Tensor:
    return block.second(block.middle(block.first(x)))


def shape_of_another(block: Block, x: torch.Tensor) -> torch.Tensor:
    h = block.first(x)
    cut = h.flatten().detach()  # the cut
    return block.second(cut.reshape_as(h).type_as(h).view_as(h))


def dtype_of_a_weight(block: Block, x: torch.Tensor) -> torch.Tensor:
    which = nn.functional.one_hot(torch.tensor([0, 2, 3]), 4).to(block.first.weight)
    return block.second(which @ block.first.weight + block.first.bias)


def numbers_beside(block: Block, x: torch.Tensor) -> torch.Tensor:
    h = block.first(x)
    return block.second(h * h.new_tensor([1.0, 2.0, 3.0, 4.0]))


@dataclass
class Sizes:
    """A configuration that refuses to tell one of its sizes."""

    width: int = 4
    heads: int = 2

    def __getattribute__(self, name: str) -> object:
        if name == "heads":
            raise RuntimeError("heads differ from layer to layer")
        return super().__getattribute__(name)


def test_an_attribute_that_raises_is_not_asked_for() -> None:
    model = Block(lambda block, x: block.second(block.first(x)))
    model.sizes = Sizes()
    assert gradscope.trace(model, torch.randn(3, 4)).verdict == "flows"


@pytest.mark.parametrize("mode", ["real", "structural"])
@pytest.mark.parametrize("case", [dtype_of_a_weight, numbers_beside])
def test_what_a_tensor_is_only_asked_for_is_no_path(case: Forward, mode: str) -> None:
    model = Block(case)
    model(torch.randn(3, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    session = gradscope.trace(model, torch.randn(3, 4), mode=mode)
    assert session.findings == []
    assert session.verdict == "flows"


@pytest.mark.parametrize("case", [numpy_inside_a_module, shape_of_another])
def test_the_cut_and_nothing_else_is_named(case: Forward) -> None:
    model = Block(case)
    model(torch.randn(3, 4)).sum().backward()
    truth = {name: parameter.grad is not None for name, parameter in model.named_parameters()}
    session = gradscope.trace(model, torch.randn(3, 4))
    said = {name: source.status == "flows" for name, source in session.sources.items() if name in truth}
    assert said == truth == {name: name.startswith("second") for name in truth}
    assert {finding.source.endswith("# the cut") for finding in session.findings} == {True}


def normalised_with_old_statistics(block: Block, x: torch.Tensor) -> torch.Tensor:
    old = torch.zeros(4), torch.ones(4)
    h = block.second(block.first(x) * old[1])
    return nn.functional.batch_norm(h, *old, training=False)


def test_statistics_that_are_only_read_are_not_written() -> None:
    model = Block(normalised_with_old_statistics)
    workshop = open_workshop("real", "cpu")
    run = Runner(subject_of(model, (torch.randn(3, 4),), {}, Question()), workshop).run()
    assert run.recording.writes == []


class CopiesItsEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        encoder = copy.deepcopy(self.encoder)
        h = encoder(x)
        h = h.detach()
        return self.head(h)


@pytest.mark.parametrize("mode", ["structural", "real"])
def test_a_copied_module_is_one_cut_and_what_lies_behind_is_found(mode: gradscope.tracing.library.Mode) -> None:
    model = CopiesItsEncoder()
    session = gradscope.trace(model, torch.randn(3, 4), wrt="encoder", mode=mode)
    first = inspect.getsourcelines(CopiesItsEncoder.forward)[1]
    found = [(each.rule, each.line - first, each.behind, each.severity) for each in session.findings]
    assert found == [("GS203", 1, None, "error"), ("GS201", 3, "F1", "error")]
    assert (session.fix_set, session.fix_verified) == (["F1", "F2"], True)
    assert session.findings[0].message.startswith(f"deepcopy in {code_name(CopiesItsEncoder.forward.__code__)}")
    assert all(parameter.grad is None and parameter.is_leaf for parameter in model.parameters())
