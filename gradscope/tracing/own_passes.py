"""What a target goes backward from by itself, taken down while it is called: that, not what it gives out, is judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gradscope.errors import GradscopeError
from gradscope.tracing.contents import tensors_in


class CannotCheck(GradscopeError):
    """The model does not run in float64 where it was tried, or cannot be copied."""


class OwnPasses(TorchFunctionMode):
    """Gathers the tensors that the target goes backward from, their weights, and the gradients of ``sources``.

    The gradients are taken before the target's own pass, which frees the graph, and before an optimizer's step, which
    changes what it was computed of.
    """

    def __init__(self, sources: Mapping[str, torch.Tensor], *, derives: bool) -> None:
        super().__init__()
        self.outputs: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self._sources = sources
        self._derives = derives
        self._versions: list[int] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "backward" and (args or "tensors" in kwargs):
            given = args[1:2] or [kwargs.get("gradient", kwargs.get("grad_tensors"))]
            self._take_down(tensors_in(args[:1] or kwargs["tensors"]), tensors_in(given))
        return func(*args, **kwargs)

    def _take_down(self, tensors: list[torch.Tensor], given: list[torch.Tensor]) -> None:
        versions = [each._version for each in self._sources.values() if not each.is_inference()]
        if self._versions and versions != self._versions:
            raise CannotCheck("It makes a step between its backward passes: the later ones depend on the earlier ones.")
        self._versions = versions
        weights = given if len(given) == len(tensors) else [torch.ones_like(each) for each in tensors]
        self.outputs += [each.detach().clone() for each in tensors]
        self.weights += [each.detach().clone() for each in weights]
        if self._derives:
            self._derive(tensors, weights)

    def _derive(self, tensors: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
        asked = {name: each for name, each in self._sources.items() if each.requires_grad}
        found = torch.autograd.grad(tensors, list(asked.values()), weights, retain_graph=True, allow_unused=True)
        for name, gradient in zip(asked, found, strict=True):
            if gradient is not None:
                before = self.gradients.get(name)
                self.gradients[name] = gradient if before is None else before + gradient
