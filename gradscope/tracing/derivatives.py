"""Custom functions whose own backward is not the derivative of their forward, each asked alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from gradscope.tracing.contents import results_in
from gradscope.tracing.frames import source_site, user_place
from gradscope.tracing.recording import Region, Site

# Central differences: the error is of the order STEP**2 and 1e-16 / STEP, relative to the size of the tensor.
STEP = 1e-6
TOLERANCE = 1e-3
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Derivative:
    """A custom function whose own backward is not the derivative of its forward; ``surrogate``: that one is zero."""

    site: Site
    surrogate: bool


class FunctionChecker:
    """Observes ``autograd.Function.apply`` and compares each one's backward with its forward, at its own operands."""

    is_here = True

    def __init__(self) -> None:
        self.found: list[Derivative] = []
        self.is_watching = True
        self.is_in_function = False

    def custom_function(
        self, name: str, args: tuple[Any, ...], call: Callable[..., Any], apply: Callable[..., Any]
    ) -> Any:
        """Check one function, then run it."""
        place = user_place(sys._getframe(2))
        self.is_watching = False
        try:
            if place is not None:
                # One that needs what stands around it (the weights that its own derivative is taken of) is not judged.
                with torch.enable_grad(), suppress(Exception):
                    self._check(source_site(place, name), args, apply)
            return call(*args)
        finally:
            self.is_watching = True

    def _check(self, site: Site, args: tuple[Any, ...], call: Callable[..., Any]) -> None:
        given = [each.detach().clone().requires_grad_() if _is_real(each) else each for each in args]
        tensors = [each for each in given if _is_real(each)]
        outputs = [each for each in results_in(call(*given)) if each.requires_grad]
        if not tensors or not outputs:
            return
        generator = torch.Generator().manual_seed(0)
        weights = [drawn(each, generator) for each in outputs]
        directions = [drawn(each, generator) for each in tensors]
        grads = torch.autograd.grad(outputs, tensors, weights, allow_unused=True)

        def value(step: float, only: int | None = None) -> float:
            steps = [step if only in (None, index) else 0.0 for index in range(len(tensors))]
            with torch.no_grad():
                moved = iter([each + way * far for each, way, far in zip(tensors, directions, steps, strict=True)])
                result = call(*[next(moved) if _is_real(each) else each for each in given])
                pairs = zip(weights, results_in(result), strict=False)
                return float(sum((weight * output).sum() for weight, output in pairs))

        told = [float((grad * way).sum()) if grad is not None else 0.0
                for grad, way in zip(grads, directions, strict=True)]  # fmt: skip
        if not _differ((value(STEP) - value(-STEP)) / (2 * STEP), sum(told)):
            return
        for index, grad in enumerate(grads):  # one may be rounded, and another one given no gradient
            slope = (value(STEP, index) - value(-STEP, index)) / (2 * STEP)
            if grad is not None and _differ(slope, told[index]):
                self.found.append(Derivative(site, surrogate=abs(slope) < 1e-8))

    # What else there is to observe does not matter here.
    def enter_region(self, key: object, region: Region) -> None: ...
    def leave_region(self, key: object) -> None: ...
    def enter_module(self, module: torch.nn.Module, args: Any, kwargs: Any) -> bool:
        return False

    def leave_module(self, module: torch.nn.Module, output: Any) -> None: ...
    def replayed(self, graph: Any, place: Any, replay: Callable[[], None]) -> None:
        """Replay the graph."""
        replay()

    def pickled(self, tensor: torch.Tensor, place: Any) -> None: ...
    def unpickled(self, tensor: torch.Tensor) -> None: ...
    def step(self, optimizer: Any, place: Any, *, begins: bool) -> None: ...
    def in_thread(self) -> AbstractContextManager[None]:
        """Watch nothing more in another thread."""
        return nullcontext()

    def parameter(self, data: Any, place: Any, make: Callable[[], torch.nn.Parameter]) -> torch.nn.Parameter:
        """Make the parameter."""
        return make()


def drawn(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random numbers for a tensor, the same on every device."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64, device=CPU).to(like)


def _differ(slope: float, told: float) -> bool:
    return abs(slope - told) > TOLERANCE * max(abs(slope), abs(told)) + 1e-8


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
