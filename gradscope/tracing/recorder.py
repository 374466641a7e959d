"""Record one forward pass: every torch call, what it took in and gave out, and where.

The recorder is a ``TorchFunctionMode`` and the observer of ``instrument.observe``. Tensors are known
by identity and held weakly; nothing is inserted into the graph under test.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gradscope.tracing.frames import user_place
from gradscope.tracing.recording import CONSTRUCTOR, Operation, Place, Recording, Region, Scope, Value
from gradscope.tracing.subject import Caller

# Calls that take a tensor and use none of its numbers: no data flows (timm's drop-path masks,
# ``x.new_empty(shape).bernoulli_(p)``, would be false alarms otherwise).
SHAPE_ONLY = frozenset(
    "new_empty new_zeros new_ones new_full empty_like zeros_like ones_like full_like rand_like randn_like "
    "size stride dim numel is_floating_point is_complex is_contiguous is_inference requires_grad_ storage_offset "
    "data_ptr untyped_storage is_same_size result_type retain_grad register_hook _set_grad_enabled".split()
)
# Property reads; ``data``, ``real``, ``imag``, ``T``, ``mT`` and ``H`` do carry numbers.
DATA_PROPERTIES = frozenset({"data", "real", "imag", "T", "mT", "H", "mH"})
# Calls that leave the tensor world with numbers in hand.
ESCAPES = frozenset({"numpy", "tolist", "item", "__float__", "__int__", "__bool__", "__array__", "__index__"})


class Recorder(TorchFunctionMode):
    """See every torch call while active; the result is :attr:`recording`.

    ``module_names`` maps ``id(module)`` to its ``named_modules`` path, ``run`` is called for each torch
    function (structural mode runs it on a pretended device).
    """

    def __init__(self, run: Caller) -> None:
        super().__init__()
        self.recording = Recording()
        self.module_names: dict[int, str] = {}
        self._run = run
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._leaf_ids: set[int] = set()
        self._regions: list[tuple[object, Region, int]] = []
        self._scopes: list[int] = []
        self._module_calls: list[tuple[nn.Module, int]] = []

    # --- leaves -----------------------------------------------------------------------------

    def add_leaf(self, name: str, tensor: torch.Tensor, *, outside: bool = False) -> None:
        """Name a tensor that a gradient may be wanted for (``outside``: not part of the model)."""
        value = self._remember(tensor)
        value.name = name
        value.connected = True
        self._leaf_ids.add(id(tensor))
        (self.recording.outside if outside else self.recording.leaves)[name] = value.id

    def name_modules(self, model: nn.Module) -> None:
        """Learn the ``named_modules`` paths of the model under test."""
        self.module_names = {id(module): name for name, module in model.named_modules()}

    # --- torch calls ------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _operation_name(func)
        if name is None:  # shape, dtype, device: nine calls of ten
            is_read = func.__name__ == "__get__"
            return func(*args, **kwargs) if is_read else self._run(func, args, kwargs)
        pending = self._begin(name, (args, kwargs), user_place(sys._getframe(1)))
        result = self._run(func, args, kwargs)
        self._finish(pending, args[0] if name in ("__setitem__", "__set__") else result)
        return result

    def custom_function(self, name: str, args: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        """Record one ``autograd.Function.apply`` as a single operation."""
        pending = self._begin(name, args, user_place(sys._getframe(2)))
        result = call()
        # What ran inside is the function's own business: its gradient is its backward.
        del self.recording.operations[pending.index :]
        self._finish(pending, result)
        return result

    def _begin(self, name: str, arguments: Any, place: Place | None) -> Operation:
        inputs = tuple(self._value_of(tensor) for tensor in tensors_in(arguments))
        scope = self._scopes[-1] if self._scopes else None
        regions = responsible_regions([region for _, region, _ in self._regions])
        pending = Operation(len(self.recording.operations), name, inputs, (), place, scope, regions)
        self.recording.pending = pending
        return pending

    def _finish(self, pending: Operation, produced: Any) -> None:
        self.recording.pending = None
        pending.outputs = tuple(self._remember(tensor).id for tensor in tensors_in(produced))
        if pending.inputs and (pending.outputs or pending.name in ESCAPES):
            pending.index = len(self.recording.operations)
            self.recording.operations.append(pending)

    # --- regions and modules ----------------------------------------------------------------

    def enter_region(self, key: object, region: Region) -> None:
        """Note that a grad-mode switch took effect."""
        scope = self._push_scope("region", region.site.function, region=region) if region.disables else -1
        self._regions.append((key, region, scope))

    def leave_region(self, key: object) -> None:
        """Note that a grad-mode switch was undone."""
        for index in range(len(self._regions) - 1, -1, -1):
            if self._regions[index][0] is key:
                scope = self._regions.pop(index)[2]
                self._pop_scope(scope)
                return

    @contextmanager
    def constructing(self) -> Iterator[None]:
        """Gather what runs meanwhile under one scope: it is done once, not in every forward pass."""
        scope = self._push_scope("module", "made once, in the constructor", type=CONSTRUCTOR)
        yield
        self._pop_scope(scope)

    def enter_module(self, module: nn.Module) -> None:
        """Note the call of a module."""
        name = self.module_names.get(id(module), "")
        kind = type(module).__name__
        is_model = self.module_names.get(id(module)) == ""
        label = "" if is_model else name or kind
        scope = self._push_scope("module", label, module=name, type=kind)
        self._module_calls.append((module, scope))

    def leave_module(self, module: nn.Module, output: Any) -> None:
        """Note the return of a module; also called when its forward raised."""
        while self._module_calls:
            entered, scope = self._module_calls.pop()
            if entered is module:
                found = tuple(self._value_of(tensor) for tensor in tensors_in(output))
                self.recording.scopes[scope].outputs = found
                self._pop_scope(scope)
                return

    def _push_scope(self, kind: Any, label: str, **fields: Any) -> int:
        parent = self._scopes[-1] if self._scopes else None
        scope = Scope(len(self.recording.scopes), parent, kind, label, **fields)
        self.recording.scopes.append(scope)
        self._scopes.append(scope.id)
        return scope.id

    def _pop_scope(self, scope: int) -> None:
        if scope in self._scopes:
            self._scopes.remove(scope)

    # --- tensors ----------------------------------------------------------------------------

    def _value_of(self, tensor: torch.Tensor) -> int:
        known = self._known.get(id(tensor))
        if known is None or known[0]() is not tensor:
            return self._remember(tensor).id
        value = self.recording.values[known[1]]
        # Judged again on use: ``Function.apply`` sets the grad_fn after the tensor was first seen.
        if not value.connected:
            value.connected = self._is_connected(tensor)
        return value.id

    def _remember(self, tensor: torch.Tensor) -> Value:
        value = Value(
            id=len(self.recording.values),
            detail=describe(tensor),
            differentiable=tensor.is_floating_point() or tensor.is_complex(),
            connected=self._is_connected(tensor),
            inference=tensor.is_inference(),
        )
        self.recording.values.append(value)
        self._known[id(tensor)] = (weakref.ref(tensor), value.id)
        return value

    def value_ids(self, result: Any) -> tuple[int, ...]:
        """Return the values of the floating tensors in a (nested) result."""
        found = (tensor for tensor in tensors_in(result) if tensor.is_floating_point())
        return tuple(self._value_of(tensor) for tensor in found)

    def _is_connected(self, tensor: torch.Tensor) -> bool:
        """Tell whether autograd links the tensor to anything.

        ``requires_grad`` alone lies: a view taken under no_grad borrows it from its base and has
        no grad_fn, and a copy may be a leaf of its own.
        """
        return tensor.requires_grad and (tensor.grad_fn is not None or id(tensor) in self._leaf_ids)


# --- pure functions ----------------------------------------------------------------------------------


def responsible_regions(regions: list[Region]) -> tuple[Region, ...]:
    """Return the active regions that all have to go before grad mode is on, outermost first.

    An ``enable_grad`` inside a ``no_grad`` wins over it, but not over an ``inference_mode``;
    ``inference_mode(False)`` undoes both.
    """
    blamed: list[Region] = []
    grad_undone = inference_undone = False
    for region in reversed(regions):
        is_inference = region.site.mechanism == "inference_mode"
        if region.disables and not (inference_undone if is_inference else grad_undone):
            blamed.append(region)
        elif not region.disables:
            grad_undone = True
            inference_undone = inference_undone or is_inference
    return tuple(blamed[::-1])


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested tuples, lists, dicts and dataclass-like outputs."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def describe(tensor: torch.Tensor) -> str:
    """Return shape and dtype in words, such as ``1x256x1024 bfloat16``."""
    shape = "x".join(str(int(size)) for size in tensor.shape) or "scalar"
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def _operation_name(func: Any) -> str | None:
    """Return the name of a call that moves numbers, or None for one that does not."""
    name = getattr(func, "__name__", None) or type(func).__name__
    if name == "__get__":
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return attribute if attribute in DATA_PROPERTIES else None
    return None if name in SHAPE_ONLY else str(name)
