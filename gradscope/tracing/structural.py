"""Structural mode: no weight memory, and an accelerator that is only pretended.

Parameters and inputs become fake tensors on the pretended device; the CPU stays real, so that PIL,
numpy and every branch on CPU values run as they would. ``backward`` does not run on a pretended
CUDA device: connection is read from ``grad_fn``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from gradscope.tracing.recorder import tensors_in

Module = TypeVar("Module", bound=nn.Module)


class PretendedDevice:
    """Run torch calls as if ``device`` were there."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func``, under fake tensors where it takes one or asks for the device."""
        if self._asks_for_device(args, kwargs) or _has_fake(args, kwargs):
            with self._mode:
                if args and _is_real(args[0]):
                    # Moving a real tensor would start the driver: constants are folded for real.
                    args = (self._mode.from_tensor(args[0]), *args[1:])
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def materialise(self, factory: Callable[[], Module], dtype: torch.dtype) -> Module:
        """Build a module without memory for its weights and place it on the pretended device.

        Ties between parameters, shapes and strides are kept; values do not exist.
        """
        with torch.device("meta"):
            module = factory()
        made: dict[int, torch.Tensor] = {}
        for owner in module.modules():
            for store in ("_parameters", "_buffers"):
                for name, tensor in list(owner.__dict__[store].items()):
                    if tensor is not None:
                        owner.__dict__[store][name] = made.setdefault(id(tensor), self.pretend(tensor, dtype))
        return module

    def pretend(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a fake tensor of the same shape and strides on the device; integers keep their dtype."""
        dtype = dtype if tensor.is_floating_point() else tensor.dtype
        with self._mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=self.device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake

    def _asks_for_device(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if self.device.type == "cpu":
            return False
        wanted = [kwargs.get("device"), *args[:2]]
        return any(isinstance(item, (str, torch.device)) and str(item).startswith(self.device.type) for item in wanted)


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)


def _has_fake(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(tensor, FakeTensor) for tensor in tensors_in((args, kwargs)))
