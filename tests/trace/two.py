"""Two layers with something between them, and what a real backward pass says about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import gradscope
from gradscope.session import Session

Between = Callable[[torch.Tensor], torch.Tensor]


class Two(nn.Module):
    """``second(between(first(x)))``, with the same weights each time it is made."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x)))


class Doubled(torch.autograd.Function):
    """A custom function whose backward is its derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


class ZeroBackward(torch.autograd.Function):
    """A custom function that gives back zeros."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(grad)


class Straight(torch.autograd.Function):
    """A straight-through estimator: the step forward, the identity back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def given() -> torch.Tensor:
    """Return the input of every case."""
    torch.manual_seed(1)
    return torch.randn(3, 4, requires_grad=True)


def arriving(between: Between) -> dict[str, torch.Tensor | None]:
    """Ask torch itself which gradients arrive."""
    model, x = Two(between), given()
    model(x).mul(torch.linspace(1, 2, 12).view(3, 4)).sum().backward()
    return {**{name: parameter.grad for name, parameter in model.named_parameters()}, "input.0": x.grad}


def traced(between: Between, mode: str = "real", **options: Any) -> Session:
    """Trace the two layers."""
    return gradscope.trace(Two(between), given(), mode=mode, **options)


def named(session: Session, between: Callable[..., Any]) -> list[tuple[str, str, int]]:
    """Return severity, rule and line (from the ``def``) of every finding that is no note."""
    first = between.__code__.co_firstlineno
    return [(each.severity, each.rule, each.line - first) for each in session.findings if each.severity != "note"]
