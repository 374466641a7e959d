"""Models whose output is a derivative: forces, Jacobians, inner steps; what such an output does not depend on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import gradscope
from gradscope.session import Session

Derivative = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Potential(nn.Module):
    """An energy of positions; the output is what ``derivative`` makes of it."""

    def __init__(self, derivative: Derivative) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.derivative = derivative

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return self.derivative(self.energy, positions)


def positions() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(5, 3, requires_grad=True)


def force(energy: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return -torch.autograd.grad(energy(x).sum(), x, create_graph=True)[0]


def force_without_graph(energy: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return -torch.autograd.grad(energy(x).sum(), x)[0]


def force_by_func(energy: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return -torch.func.grad(lambda each: energy(each).sum())(x)


def force_by_rows(energy: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return -torch.func.vmap(torch.func.jacrev(energy))(x)


def force_forward(energy: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return -torch.func.jvp(energy, (x,), (torch.ones_like(x),))[1]


def jacobian(energy: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.functional.jacobian(lambda each: energy(each).sum(0), x, create_graph=True)


def jacobian_without_graph(energy: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.functional.jacobian(lambda each: energy(each).sum(0), x)


def detached_force(energy: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return force(energy, x).detach()


def force_past_a_cut(energy: nn.Module, x: torch.Tensor) -> torch.Tensor:
    e = energy(x)
    (slope,) = torch.autograd.grad((e * e.detach()).sum(), x, create_graph=True)
    return slope


def arriving(derivative: Derivative) -> dict[str, bool]:
    """Ask torch itself which gradients arrive."""
    model, x = Potential(derivative), positions()
    output = model(x)
    if output.requires_grad:
        output.square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad is not None for name, grad in {**found, "input.0": x.grad}.items()}


def is_irrelevant(derivative: Derivative, name: str) -> bool:
    """Tell by differences whether a parameter has no influence on the output at all."""
    model, x = Potential(derivative), positions()
    before = model(x).detach()
    with torch.no_grad():
        model.get_parameter(name).add_(0.5)
    return torch.equal(model(x).detach(), before)


def traced(derivative: Derivative, mode: str) -> Session:
    return gradscope.trace(Potential(derivative), positions(), mode=mode)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("derivative", [force, force_by_func, force_by_rows, force_forward, jacobian])
def test_what_a_derivative_does_not_depend_on_is_unused_and_not_blocked(derivative: Derivative, mode: str) -> None:
    truth = arriving(derivative)
    assert [name for name, arrives in truth.items() if not arrives] == ["energy.2.bias"]
    assert is_irrelevant(derivative, "energy.2.bias") and not is_irrelevant(derivative, "energy.2.weight")
    session = traced(derivative, mode)
    assert (session.verdict, session.findings) == ("flows", [])
    statuses = {name: source.status for name, source in session.sources.items()}
    assert statuses == {name: "flows" if arrives else "unused" for name, arrives in truth.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("derivative", [force_without_graph, jacobian_without_graph])
def test_a_derivative_without_a_graph_is_named_and_the_fix_is_proved(derivative: Derivative, mode: str) -> None:
    assert not any(arriving(derivative).values())
    session = traced(derivative, mode)
    (found,) = [each for each in session.findings if each.rule == "GS207"]
    assert (found.severity, found.line) == ("error", derivative.__code__.co_firstlineno + 1)
    assert "create_graph=True" in found.fix
    assert session.fix_verified and found.id in session.fix_set


@pytest.mark.parametrize("mode", ["real", "auto"])
def test_a_cut_after_a_derivative_takes_only_what_the_derivative_depends_on(mode: str) -> None:
    assert not any(arriving(detached_force).values())
    session = traced(detached_force, mode)
    assert [(each.rule, each.cuts) for each in session.findings] == [
        ("GS201", ("energy.0.bias", "energy.0.weight", "energy.2.weight", "input.0"))
    ]
    assert session.sources["energy.2.bias"].status == "unused"
    assert session.fix_verified


@pytest.mark.parametrize("mode", ["real", "auto"])
def test_a_cut_before_a_derivative_is_not_taken_for_irrelevance(mode: str) -> None:
    """The bias matters here by the value that is detached; by the other one it does not."""
    assert not arriving(force_past_a_cut)["energy.2.bias"]
    assert not is_irrelevant(force_past_a_cut, "energy.2.bias")
    session = traced(force_past_a_cut, mode)
    assert session.sources["energy.2.bias"].status == "blocked"
    assert [(each.rule, each.line) for each in session.findings if "energy.2.bias" in each.cuts] == [
        ("GS201", force_past_a_cut.__code__.co_firstlineno + 2)
    ]
