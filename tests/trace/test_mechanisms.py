"""Small models, each stopped in one way, judged by a real backward; each with a look-alike that is fine."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import nn

import gradscope
from gradscope.errors import NotAnalysedError
from gradscope.session import Session
from gradscope.tracing.subject import Built, Subject, Workshop
from gradscope.tracing.tracer import trace_subject
from gradscope.tracing.workshops import open_workshop


class Two(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x)))


def no_grad_block(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x * 2


def exit_stack(x: torch.Tensor) -> torch.Tensor:
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        return x * 2


@torch.no_grad()
def no_grad_decorator(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def switched_off(x: torch.Tensor) -> torch.Tensor:
    with torch.set_grad_enabled(False):
        return x * 2


@torch.set_grad_enabled(False)
def switched_off_decorator(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def detached(x: torch.Tensor) -> torch.Tensor:
    return x.detach() * 2


def data(x: torch.Tensor) -> torch.Tensor:
    return x.data * 2


def phantom_view(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x.view(-1, 4)


def enabled_inside(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.enable_grad():
        return x * 2


def inference_off_inside(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.inference_mode(False):
        return x * 2


def unused_no_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x.norm()
    return x * 2


def straight_through(x: torch.Tensor) -> torch.Tensor:
    return x + (x.round() - x).detach()


def passed_through(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = x.contiguous()
    return y * 2


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


def custom_function(x: torch.Tensor) -> torch.Tensor:
    return Doubled.apply(x)


def run(between: Callable[[torch.Tensor], torch.Tensor], mode: str) -> Session:
    def prepare(workshop: Workshop) -> nn.Module:
        return workshop.materialise(lambda filled: Two(between))

    def build(workshop: Workshop, model: nn.Module) -> Built:
        x = workshop.tensor(torch.randn(3, 4))
        return Built(model, lambda: model(x), {"input.0": x})

    return trace_subject(Subject("two", "forward", prepare, build), open_workshop(mode, "cpu", None))


def reached_by_backward(between: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, bool]:
    """Ask torch itself, by one true backward pass."""
    model, x = Two(between), torch.randn(3, 4, requires_grad=True)
    model(x).sum().backward()
    named = {**dict(model.named_parameters()), "input.0": x}
    return {name: tensor.grad is not None for name, tensor in named.items()}


CUTS = [
    (no_grad_block, "GS104", 1), (exit_stack, "GS104", 2), (no_grad_decorator, "GS102", 0), (switched_off, "GS105", 1),
    (switched_off_decorator, "GS105", 0), (detached, "GS201", 1), (data, "GS202", 1), (phantom_view, "GS104", 1),
]  # fmt: skip
LOOK_ALIKES = [
    enabled_inside,
    inference_off_inside,
    unused_no_grad,
    straight_through,
    passed_through,
    custom_function,
]


@pytest.mark.parametrize("mode", ["structural", "real"])
@pytest.mark.parametrize(("between", "rule", "offset"), CUTS)
def test_a_cut_is_named_at_its_line(
    between: Callable[[torch.Tensor], torch.Tensor], rule: str, offset: int, mode: str
) -> None:
    session = run(between, mode)
    truth = reached_by_backward(between)
    assert {name: s.status == "flows" for name, s in session.sources.items()} == truth
    assert not all(truth.values())
    code = inspect.unwrap(between).__code__
    assert [(f.rule, f.line) for f in session.findings] == [(rule, code.co_firstlineno + offset)]
    assert session.fix_verified


def nested(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.inference_mode():
        return no_grad_decorator(x)


def parallel(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        first = x * 2
    with torch.inference_mode():
        second = x * 3
    return first.clone() + second.clone()


def test_three_nested_cuts_are_all_needed() -> None:
    session = run(nested, "real")
    assert [f.rule for f in session.findings] == ["GS104", "GS103", "GS102"]
    assert [f.behind for f in session.findings] == [None, "F1", "F2"]
    assert session.fix_set == ["F1", "F2", "F3"]
    assert session.fix_verified


def test_two_parallel_cuts_both_have_to_go_or_the_gradient_is_incomplete() -> None:
    session = run(parallel, "real")
    assert {f.rule for f in session.findings} == {"GS104", "GS103"}
    assert session.fix_set == ["F1", "F2"]
    assert session.fix_verified


def stopped_twice(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = x * 2
    return y / y.norm().detach()


@pytest.mark.parametrize("mode", ["structural", "real"])
def test_what_stays_incomplete_behind_a_cut_is_told(mode: str) -> None:
    session = run(stopped_twice, mode)
    assert [(f.rule, f.severity, f.behind) for f in session.findings] == [
        ("GS104", "error", None),
        ("GS201", "warning", "F1"),
    ]
    assert session.fix_set == ["F1"] and session.fix_verified


@pytest.mark.parametrize("mode", ["structural", "real"])
@pytest.mark.parametrize("between", LOOK_ALIKES)
def test_a_look_alike_is_no_cut(between: Callable[[torch.Tensor], torch.Tensor], mode: str) -> None:
    session = run(between, mode)
    assert all(reached_by_backward(between).values())
    assert session.verdict == "flows"
    assert session.findings == []


@pytest.mark.parametrize("error", [TypeError("two arguments"), KeyError("mask"), ValueError("")])
def test_a_model_that_fails_on_its_own_is_not_analysed(error: Exception) -> None:
    def between(x: torch.Tensor) -> torch.Tensor:
        raise error

    with pytest.raises(NotAnalysedError, match=type(error).__name__):
        run(between, "real")


class Decorated(nn.Module):
    """A forward pass that is decorated itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_the_advice_passes_self_to_methods_only() -> None:
    assert "no_grad_decorator.__wrapped__(...)" in run(no_grad_decorator, "real").findings[0].fix
    method = gradscope.trace(Decorated(), torch.ones(2), mode="real").findings[0]
    assert "Decorated.forward.__wrapped__(self, ...)" in method.fix


class Optional(nn.Module):
    """A metric that lets a gradient through where it is asked to be a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.as_loss = nn.Linear(2, 2), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(self.as_loss):
            return self.layer(x)


def test_the_argument_of_a_switch_is_told_to_decide() -> None:
    finding = gradscope.trace(Optional(), torch.ones(2)).findings[0]
    assert finding.message.startswith("Optional.forward runs under set_grad_enabled(False): ")
    assert finding.fix == "Let what set_grad_enabled is given here be True when a gradient is wanted."


def test_a_number_that_picks_a_row_is_told_what_to_ask_about_instead() -> None:
    rows = nn.Embedding(4, 2)
    session = gradscope.trace(lambda x: rows(x.long()), torch.ones(3, requires_grad=True))
    assert session.findings[0].rule == "GS403" and "the output of an embedding" in session.findings[0].fix


class Quantised(nn.Module):
    """Keeps its weight as integers that are no buffer, as quantised layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randint(0, 9, (2, 2), dtype=torch.uint8), requires_grad=False)
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) @ self.codes.view(2, 2).float()


@pytest.mark.parametrize("mode", ["structural", "real"])
def test_integers_are_no_source_whatever_they_are_kept_as(mode: str) -> None:
    session = gradscope.trace(Quantised(), torch.ones(1, 2), mode=mode, wrt="*")
    assert "codes" not in session.sources and session.verdict == "flows" and not session.findings
