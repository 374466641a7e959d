"""Where models are built for a run: for real, or without memory on a pretended device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from gradscope.errors import UsageError
from gradscope.tracing.structural import PretendedDevice
from gradscope.tracing.subject import Workshop

Module = TypeVar("Module", bound=nn.Module)


def _is_there(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_available()
    return torch.backends.mps.is_available() if kind == "mps" else kind == "cpu"


class RealWorkshop:
    """Builds models that compute; the device has to be there."""

    mode: Literal["real", "structural"] = "real"

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        kind = torch.device(device).type
        if not _is_there(kind):
            raise UsageError(
                f"Real mode on {device} needs that device, and torch {torch.__version__} finds none here.",
                hint="Use `--device cpu`, or leave out `--mode real`: structural mode pretends the device.",
            )
        self.device = torch.device(device)
        self.dtype = dtype

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one torch function."""
        return func(*args, **kwargs)

    def materialise(self, factory: Callable[[bool], Module]) -> Module:
        """Build the module with values and move it to the device and dtype of the run."""
        return factory(True).to(device=self.device, dtype=self.dtype)

    def tensor(self, real: torch.Tensor) -> torch.Tensor:
        """Move an input to the device and dtype of the run."""
        return real.to(device=self.device, dtype=self.dtype)


class StructuralWorkshop:
    """Builds models without values; nothing is computed, shapes and autograd are true."""

    mode: Literal["real", "structural"] = "structural"

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._pretended = PretendedDevice(device)
        self.run = self._pretended.run
        self.device = self._pretended.device
        self.dtype = dtype

    def materialise(self, factory: Callable[[bool], Module]) -> Module:
        """Build the module without memory for its weights."""
        return self._pretended.materialise(lambda: factory(False), self.dtype)

    def tensor(self, real: torch.Tensor) -> torch.Tensor:
        """Return a fake tensor of the same shape on the pretended device."""
        return self._pretended.pretend(real, self.dtype)


def open_workshop(mode: str, device: str, dtype: str | None = None) -> Workshop:
    """Return the workshop for a mode and a device; ``auto`` means structural on pretended CUDA.

    Without a wish for the dtype it is bfloat16 on an accelerator and float32 on the CPU, as the
    libraries traced here choose themselves.
    """
    if device == "auto":
        device = "cuda" if mode != "real" or torch.cuda.is_available() else "cpu"
    chosen: torch.dtype = getattr(torch, dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16"))
    if mode == "real":
        return RealWorkshop(device, chosen)
    return StructuralWorkshop(device, chosen)
