"""Where models are built for a run: for real, or without memory on a pretended device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from gradscope.errors import UsageError
from gradscope.tracing.inventory import Inventory
from gradscope.tracing.older_torch import PRETENDS_CUDA
from gradscope.tracing.restoring import kept, swapped
from gradscope.tracing.structural import PretendedDevice
from gradscope.tracing.subject import Workshop
from gradscope.tracing.unanalysed import CannotTell

Module = TypeVar("Module", bound=nn.Module)


def _is_there(kind: str) -> bool:
    if kind == "mps":
        return torch.backends.mps.is_available()
    backend = getattr(torch, kind, None)  # torch.cuda, torch.xpu, and those that other packages add
    return kind == "cpu" or bool(getattr(backend, "is_available", bool)())


def _why_not_pretended(kind: str) -> str:
    """Return why parameters on a pretended device of this kind would end the whole process; empty if they would not."""
    if kind in ("cpu", "meta") or _is_there(kind) or (kind == "mps" and torch.backends.mps.is_built()):
        return ""
    if kind != "cuda":
        return f"torch {torch.__version__} is built without {kind} here"
    if torch.__version__ < PRETENDS_CUDA:
        return f"torch {torch.__version__} finds no CUDA here, and only torch {PRETENDS_CUDA} can do without"
    return ""


class RealWorkshop:
    """Builds models that compute; the device has to be there.

    ``stays``: a caller's model, and what the caller gives it, remain on the devices that they are on.
    """

    mode: Literal["real", "structural"] = "real"
    goes_backward = True

    def __init__(self, device: str, dtype: torch.dtype, *, casts: bool = False, stays: bool = False) -> None:
        self.device = _present(torch.device(device))
        self.dtype = dtype
        self._casts = casts
        self._stays = stays

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one torch function."""
        return func(*args, **kwargs)

    def materialise(self, factory: Callable[[bool], Module]) -> Module:
        """Build the module with values and move it to the device and dtype of the run."""
        return factory(True).to(device=self.device, dtype=self.dtype)

    def tensor(self, real: torch.Tensor) -> torch.Tensor:
        """Move an input to the device and dtype of the run."""
        return real.to(device=self.device, dtype=self.dtype)

    def like(self, real: torch.Tensor, *, given: bool = False) -> torch.Tensor:
        """Return the tensor on the device of the run, without its history; in its dtype where one was asked for."""
        dtype = self.dtype if self._casts and real.is_floating_point() else real.dtype
        return real.detach().to(self._where(real, given), dtype)

    def lent(
        self, model: Inventory, given: tuple[Any, ...] = ()
    ) -> AbstractContextManager[Callable[[torch.Tensor], None]]:
        """Keep the model as it is, and what it is given: what is written in place is copied before.

        Elsewhere the model is lent copies.
        """
        if self._stays:
            self.device = _present(_home_of(model))
        home = self.device.type
        at_home = self._stays or {device.type for device in {tensor.device for tensor in model.tensors()}} <= {home}
        return kept(model, given) if at_home and not self._casts else swapped(model, self._moved, given)

    def _where(self, tensor: torch.Tensor, given: bool) -> torch.device:
        return tensor.device if given and self._stays else self.device

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        moved = self.like(tensor, given=True)
        return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


class StructuralWorkshop:
    """Builds models without values; nothing is computed, shapes and autograd are true."""

    mode: Literal["real", "structural"] = "structural"

    def __init__(self, device: str, dtype: torch.dtype, *, casts: bool = False, stays: bool = False) -> None:
        why = _why_not_pretended(torch.device(device).type)
        if why:
            raise UsageError(
                f"{why}, so that it cannot even be pretended.",
                hint="Use another device, such as cpu: gradients flow the same way on all of them.",
            )
        self._casts = casts
        self._stays = stays
        self._pretended = PretendedDevice(device)
        self.run = self._pretended.run
        self.device = self._pretended.device
        self.dtype = dtype

    @property
    def goes_backward(self) -> bool:
        """Whether the devices pretended are there: autograd starts a thread for each, which asks its driver."""
        return all(map(_is_there, self._pretended.kinds))

    def materialise(self, factory: Callable[[bool], Module]) -> Module:
        """Build the module without memory for its weights."""
        return self._pretended.materialise(lambda: factory(False), self.dtype)

    def tensor(self, real: torch.Tensor) -> torch.Tensor:
        """Return a fake tensor of the same shape on the pretended device."""
        return self._pretended.pretend(real, self.dtype)

    def like(self, real: torch.Tensor, *, given: bool = False) -> torch.Tensor:
        """Return a fake of a floating tensor; integers and masks stay, so that branches on them run as they would."""
        device = self._where(real) if given else self.device
        stays_real = not real.is_floating_point() or "cpu" not in self._pretended.kinds
        if device.type == "cpu" and not real.is_meta and stays_real:
            return real.detach() if real.is_floating_point() else real
        return self._pretended.pretend(real, self.dtype if self._casts else real.dtype, device)

    @contextmanager
    def lent(self, model: Inventory, given: tuple[Any, ...] = ()) -> Iterator[Callable[[torch.Tensor], None]]:
        """Put fake tensors in the place of the model's own."""
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules):
            raise CannotTell(
                "The model holds a scripted module, which keeps its own weights and computes.", hint="Use --mode real."
            )
        if self._stays:
            home = _home_of(model)
            self.device = self.device if home.type == "meta" else home
            self._pretended.kinds = frozenset({self.device.type, *(self._where(each).type for each in model.tensors())})
        with swapped(model, self._fake, given) as before_write:
            yield before_write

    def _where(self, tensor: torch.Tensor) -> torch.device:
        """Return the device that a tensor is pretended on; on meta it is nowhere, and few kernels know that device."""
        return tensor.device if self._stays and not tensor.is_meta else self.device

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        device = self._where(tensor)
        if device.type == "cpu" and not tensor.is_floating_point() and not tensor.is_meta:
            return tensor
        return self._pretended.pretend(tensor, self.dtype if self._casts else tensor.dtype, device)


def _present(device: torch.device) -> torch.device:
    if device.type == "meta":
        raise UsageError(
            "The model's weights are on the meta device, which keeps no numbers: there is nothing to compute with.",
            hint="Use structural mode. Where a run fetches the weights (offloading), trace a model that is loaded: "
            "where gradients flow is the same.",
        )
    if not _is_there(device.type):
        raise UsageError(
            f"Real mode on {device} needs that device, and torch {torch.__version__} finds none here.",
            hint="Use `--device cpu`, or leave out `--mode real`: structural mode pretends the device.",
        )
    return device


def _home_of(model: Inventory) -> torch.device:
    """Return the device of a model's first parameter; the CPU where it has none."""
    first = next(iter(model.tensors()), None)
    return first.device if first is not None else torch.device("cpu")


def open_workshop(
    mode: str, device: str, dtype: str | None = None, *, casts: bool = False, stays: bool = False
) -> Workshop:
    """Return the workshop for a mode and a device; ``auto`` means structural on CUDA, pretended where that can be.

    ``casts``: a caller's own model and inputs are brought to the dtype as well; ``stays``: they stay where they are.

    Without a wish for the dtype it is bfloat16 on an accelerator and float32 on the CPU, as the
    libraries traced here choose themselves.
    """
    if device == "auto":
        is_possible = _is_there("cuda") if mode == "real" else not _why_not_pretended("cuda")
        device = "cuda" if is_possible else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"torch knows no device {device!r}.", hint="Use auto, cpu, cuda or mps.") from error
    chosen: torch.dtype = getattr(torch, dtype or ("float32" if kind == "cpu" else "bfloat16"))
    if mode == "real":
        return RealWorkshop(device, chosen, casts=casts, stays=stays)
    return StructuralWorkshop(device, chosen, casts=casts, stays=stays)
