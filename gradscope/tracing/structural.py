"""Structural mode: no weight memory, and an accelerator that is only pretended.

Parameters and inputs become fake tensors on the pretended device; the CPU stays real, so that PIL,
numpy and every branch on CPU values run as they would. ``backward`` does not run on a pretended
CUDA device: connection is read from ``grad_fn``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from gradscope.tracing.calls import ROOMS, is_in_place, operation_name
from gradscope.tracing.contents import tensors_in
from gradscope.tracing.provenance import is_wrapped

Module = TypeVar("Module", bound=nn.Module)
Made = TypeVar("Made")


SAME_DTYPE = frozenset("linear matmul __matmul__ __rmatmul__ mm bmm mv dot addmm addmv baddbmm addbmm".split())
# What hands out the memory itself, or loops over it; the null pointer of a fake tensor ends the process there.
MEMORY = frozenset({"data_ptr", "__cuda_array_interface__", "__dlpack__", "apply_", "map_", "map2_"})
# What initialisers do to a weight. On a tensor without values there is nothing to do, and torch takes
# milliseconds to find that out for each of them.
INITIALISERS = frozenset(
    "fill_ zero_ normal_ uniform_ trunc_ clamp_ clamp_min_ clamp_max_ erfinv_ mul_ add_ sub_ div_ copy_ exponential_ "
    "bernoulli_ __imul__ __iadd__ __isub__ __itruediv__".split()
)


_DEVICE = torch.Tensor.device.__get__


class CannotFollow(RuntimeError):
    """Structural mode would have to know numbers that it does not compute."""


class PretendedDevice:
    """Run torch calls as if ``device`` were there."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.kinds = frozenset({self.device.type})  # those on which tensors have no values; the CPU may be among them
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func``, under fake tensors where it takes one or asks for the device."""
        name = getattr(func, "__name__", "")
        if name == "__get__" and args[0].is_cuda:  # elsewhere a tensor has no such attribute
            name = operation_name(func) or name
        if name in MEMORY and _has_fake(args, kwargs):
            raise CannotFollow("the memory of a tensor that has none is asked for")
        if name in SAME_DTYPE:
            self._refuse_mixed_dtypes(args, kwargs)
        # The memo of a deepcopy holds all copies made so far: a real tensor is not pretended for their sake.
        given = args[:1] if name == "__deepcopy__" else args
        if self._asks_for_device(given, kwargs) or _has_fake(given, kwargs) or self._makes_room(func, kwargs):
            if args and _is_real(args[0]) and name and is_in_place(name):
                raise CannotFollow("numbers that do not exist are written into a tensor that does")
            with self._mode:
                if args and _is_real(args[0]) and not args[0].requires_grad:
                    # Moving a real tensor would start the driver: constants are folded for real. (A tensor that
                    # requires a gradient is left as it is, or the graph would begin at the copy.)
                    args = (self._mode.from_tensor(args[0]), *args[1:])
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def materialise(self, factory: Callable[[], Module], dtype: torch.dtype) -> Module:
        """Build a module without memory for its weights and place it on the pretended device.

        Ties between parameters, shapes and strides are kept; values do not exist.
        """
        module = hollow(factory)
        made: dict[int, torch.Tensor] = {}
        for owner in module.modules():
            for store in ("_parameters", "_buffers"):
                # On a pretended CPU a buffer keeps its numbers: index tables, on which code branches.
                keeps = self.device.type == "cpu" and store == "_buffers"
                for name, tensor in list(owner.__dict__[store].items()):
                    if tensor is not None and (tensor.is_meta or not keeps):
                        owner.__dict__[store][name] = made.setdefault(id(tensor), self.pretend(tensor, dtype))
        return module

    def pretend(self, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
        """Return a fake tensor of the same shape and strides on the device; integers keep their dtype."""
        dtype = dtype if tensor.is_floating_point() else tensor.dtype
        with torch.inference_mode(tensor.is_inference()):  # one that was made for inference stays one
            with self._mode:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device or self.device)
            if isinstance(tensor, nn.Parameter):
                return nn.Parameter(fake, requires_grad=tensor.requires_grad)
            return fake

    def _refuse_mixed_dtypes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise as the device would: fake tensors multiply matrices of any two dtypes."""
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors_in((args, kwargs))}
        if len(dtypes) > 1 and not any(map(torch.is_autocast_enabled, self.kinds)):
            raise RuntimeError(
                f"matrices are multiplied that are {' and '.join(sorted(dtypes))}: expected the same dtype"
            )

    def _makes_room(self, func: Any, kwargs: dict[str, Any]) -> bool:
        """Tell ``torch.zeros(...)`` and the like on a pretended CPU: made to be written into, so it is made fake."""
        if "cpu" not in self.kinds or getattr(func, "__name__", "") not in ROOMS or kwargs.get("device") is not None:
            return False
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        return isinstance(dtype, torch.dtype) and dtype.is_floating_point

    def _asks_for_device(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        kinds = tuple(self.kinds - {"cpu"})
        if not kinds:
            return False
        wanted = [kwargs.get("device"), *args[:2]]
        return any(isinstance(item, (str, torch.device)) and str(item).startswith(kinds) for item in wanted)


def hollow(factory: Callable[[], Made]) -> Made:
    """Build modules whose parameters have shapes and no values: each goes to the meta device as it is registered.

    Constructors run as they would (drop-path rates by ``.item()``, index tables in numpy); only the
    initialisers of ``torch.nn.init``, and those that timm and others write themselves, do nothing.
    Untouched memory of ``torch.empty`` costs none.
    """
    register = nn.Module.register_parameter

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        held = self._parameters[name]
        if isinstance(held, nn.Parameter) and not held.is_meta and not is_lazy(held):
            self._parameters[name] = nn.Parameter(held.to("meta"), requires_grad=held.requires_grad)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(nn.Module, "register_parameter", register_parameter))
        for name in dir(nn.init):
            if name.endswith("_") and not name.startswith("_") and callable(getattr(nn.init, name)):
                stack.enter_context(mock.patch.object(nn.init, name, _untouched))
        stack.enter_context(_Constructing())
        return factory()


class _Constructing(TorchFunctionMode):
    """Hide from a constructor that its weights have no values.

    Writing into them or from them does nothing, and asked where they lie they say the CPU, since tables are made
    there. A call that takes a weight and a tensor with values (a constructor that runs its backbone once to see the
    shapes) gives one without.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _DEVICE and _is_meta(args[0]):
            return torch.device("cpu")
        name = getattr(func, "__name__", "")
        # The memo of a deepcopy holds all copies made so far, and has to stay the one that it is.
        tensors = tensors_in((args[:1] if name == "__deepcopy__" else args, kwargs))
        if any(map(_is_meta, tensors)):
            if name in INITIALISERS:
                return tensors[0]
            if not all(map(_is_meta, tensors)):
                args, kwargs = tree_map_only(torch.Tensor, _to_meta, (args, kwargs))
        return func(*args, **kwargs)


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def _untouched(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _is_real(value: Any) -> bool:
    """Tell a tensor with values; what ``torch.func`` has wrapped may hold one without."""
    return isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and not is_wrapped(value)


def _has_fake(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(tensor, FakeTensor) for tensor in tensors_in((args, kwargs)))
