"""Numbers on their way through Python: taken out of tensors by ``item()`` or ``numpy()``, and made tensors again.

In between nothing sees them. A floating tensor that comes from nowhere may be made of any of them; whole numbers
(ids, indices, bytes) and truth values are looked up, since a model makes many a tensor of sizes and settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from gradscope.tracing.calls import WHOLE
from gradscope.tracing.recording import Operation, Recording, Value

# Of more numbers than these nobody's origin is looked up.
MOST_NUMBERS = 65_536


class Escapes:
    """The numbers of one run that are out."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._calls: list[Operation] = []
        self._gathered: tuple[int, ...] = ()
        self._gathered_from = 0
        self.scalars: dict[int, tuple[float, int]] = {}
        self._whole: dict[int, Operation] = {}  # by number: the call that took it out last
        self._truths: dict[int, Operation] = {}

    def escaped(self, operation: Operation, result: Any) -> None:
        """Note that an operation took floating-point numbers out of a tensor, or whole ones that were made of such."""
        are_floats = any(self._recording.values[number].differentiable for number in operation.inputs)
        if not are_floats and not any(map(self._recording.comes_of_floats, operation.inputs)):
            return
        self._recording.escapes.append(operation)
        if not are_floats:
            self._look_up(operation, result)
        if are_floats or operation.name in WHOLE:  # one index, or count, rarely becomes a floating number
            self._calls.append(operation)
        if isinstance(result, float):
            out = self._number()
            self._recording.add(
                Operation(0, operation.name, operation.inputs, (out,), operation.place, operation.scope)
            )
            self.scalars[id(result)] = (result, out)

    def _look_up(self, operation: Operation, result: Any) -> None:
        found = _numbers_in([result.ravel().tolist() if hasattr(result, "ravel") else result])
        for number in found if len(found) <= MOST_NUMBERS else ():
            (self._truths if isinstance(number, bool) else self._whole)[int(number)] = operation

    @property
    def are_out(self) -> bool:
        """Whether numbers were taken out so far."""
        return bool(self._calls or self._whole or self._truths)

    def entered(self, tensor: torch.Tensor, remember: Callable[[torch.Tensor], Value]) -> int | None:
        """Return a value for a tensor of unknown origin, linked to the calls that took out what it may be made of.

        None where it cannot be made of any. ``remember`` makes a value of what a tensor holds.
        """
        if tensor.is_floating_point():
            return self._of_floats(remember(tensor).id) if self._calls else None
        calls = self._takers_of(tensor)
        if not calls:
            return None
        taken = tuple(dict.fromkeys(number for call in calls for number in call.inputs))
        number = remember(tensor).id
        self._recording.add(Operation(0, calls[-1].name, taken, (number,), calls[-1].place, calls[-1].scope))
        return number

    def _of_floats(self, number: int) -> int:
        *before, last = self._calls
        for call in before[self._gathered_from :]:
            gathered = self._number()
            self._recording.add(
                Operation(0, call.name, (*self._gathered, *call.inputs), (gathered,), call.place, call.scope)
            )
            self._gathered = (gathered,)
        self._gathered_from = len(before)
        inputs = (*self._gathered, *last.inputs)
        self._recording.add(Operation(0, last.name, inputs, (number,), last.place, last.scope))
        return number

    def _takers_of(self, tensor: torch.Tensor) -> list[Operation]:
        """Return the calls that took out all numbers of a tensor; none where one of them was never out."""
        out = self._truths if tensor.dtype == torch.bool else self._whole
        is_there = type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta and not tensor.is_complex()
        if not out or not is_there or not 0 < tensor.numel() <= MOST_NUMBERS:
            return []
        calls = [out.get(int(number)) for number in set(tensor.flatten().tolist())]
        found = {id(call): call for call in calls if call is not None}
        return sorted(found.values(), key=lambda call: call.index) if None not in calls else []

    def _number(self) -> int:
        """Return a new value for a number that Python holds."""
        out = Value(len(self._recording.values), None, float, differentiable=True)
        self._recording.values.append(out)
        return out.id

    def scalars_in(self, arguments: tuple[Any, ...]) -> tuple[int, ...]:
        """Return the values of the Python numbers among the arguments that came straight out of a tensor."""
        return tuple(self.scalars[id(item)][1] for item in arguments if id(item) in self.scalars)

    def left_as_array(self, memory: int) -> bool:
        """Tell whether an array was made of a memory: a tensor there may have come by way of that."""
        values = self._recording.values
        return any(
            values[number].memory == memory
            for call in self._calls if call.name != "__dlpack__"  # torch.from_dlpack asks for it, too
            for number in call.inputs
        )  # fmt: skip


def _numbers_in(items: Iterable[Any]) -> list[int]:
    """Return the whole numbers and truth values in nested lists."""
    found: list[int] = []
    for item in items:
        if isinstance(item, list):
            found += _numbers_in(item)
        elif isinstance(item, int):
            found.append(item)
    return found
