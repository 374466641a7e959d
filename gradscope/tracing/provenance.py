"""Which recorded value a tensor is: by identity, by version, by shared memory, or by its way through Python.

Most tensors are known by identity from the call that made them. What arrives unknown came from where no
torch function looks: numpy, a kernel, a scripted function, ``nn.Parameter(t)``. It is linked to where its
numbers came from, as far as that can be told; what cannot be told is counted and said.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from gradscope.tracing.autograd import memory_of, reached_leaves, tag, unwatched
from gradscope.tracing.contents import DIFFERENTIABLE, gather
from gradscope.tracing.escapes import Escapes
from gradscope.tracing.frames import function_place
from gradscope.tracing.recording import Operation, Part, Place, Recording, Value, Write


class Provenance:
    """Knows the tensors of one run. Values are plain data in the recording; tensors are held weakly."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], Value, int]] = {}
        self._wrapped: set[int] = set()
        self._leaves: dict[int, int] = {}
        self._written: dict[int, tuple[int, Operation]] = {}
        self._written_unseen: set[int] = set()
        self.escapes = Escapes(recording)
        self._exposed: dict[int, Place | None] = {}
        self.made_by_function: dict[int, int] = {}
        self.lent: dict[int, str] = {}  # parameters, by id, in whose place the run has others
        self.of_lent: dict[int, str] = {}
        self.has_foreign_graph = False  # which whoever made it may go backward through once more
        self.place: Any = None
        self.strangers = 0

    # --- known tensors --------------------------------------------------------------------------

    @unwatched
    def add_leaves(self, tensors: Mapping[str, torch.Tensor], *, outside: bool = False) -> None:
        """Name the tensors that a gradient may be wanted for (``outside``: not known yet to be part of the model)."""
        named = self._recording.outside if outside else self._recording.leaves
        for name, tensor in tensors.items():
            value = self.add_leaf(tensor)
            value.name = name
            named[name] = value.id
            hooks = tensor._backward_hooks
            for hook in hooks.values() if hooks else ():
                place = function_place(hook)
                if place is not None:
                    self._recording.hooks[value.id] = place

    @unwatched
    def forget_outside(self, parameters: Iterable[torch.Tensor]) -> None:
        """Take the model's own parameters from those outside."""
        own = {self.value_of(parameter) for parameter in parameters}
        outside = self._recording.outside
        for name in [name for name, value in outside.items() if value in own]:
            del outside[name]

    @unwatched
    def add_constants(self, tensors: Iterable[tuple[torch.Tensor, str]]) -> None:
        """Know tensors that were there before the run; named where it is no buffer, whose origin nobody says.

        One with a graph says itself which parameters it was made of.
        """
        for tensor, name in tensors:
            if not self.is_known(tensor):
                self.add_constant(tensor).name = name

    def add_leaf(self, tensor: torch.Tensor) -> Value:
        """Make a tensor one that a gradient may be wanted for."""
        if id(tensor) in self._leaves and self.is_known(tensor):
            return self._recording.values[self._leaves[id(tensor)]]
        value = self.remember(tensor)
        value.connected = value.leaf = True
        self._leaves[id(tensor)] = value.id
        return value

    def leaf_of(self, tensor: torch.Tensor) -> int | None:
        """Return the first value of a leaf; None for any other tensor."""
        return self._leaves.get(id(tensor)) if self.is_known(tensor) else None

    def add_constant(self, tensor: torch.Tensor) -> Value:
        """Make a tensor one that was there before the run; one with a graph says itself what it was made of."""
        if tensor.grad_fn is None and id(tensor) not in self.lent:
            return self.remember(tensor)
        return self._recording.values[self._adopt(tensor)]

    def remember(self, tensor: torch.Tensor) -> Value:
        """Make a new value of what a tensor holds now."""
        values, key = self._recording.values, id(tensor)
        dtype, memory = tensor.dtype, memory_of(tensor)
        wrapped = not memory and is_wrapped(tensor)  # what torch.func wraps has no memory of its own
        try:
            version, inference = tensor._version, False
        except RuntimeError:
            version, inference = UNVERSIONED, tensor.is_inference()
        is_leaf = key in self._leaves
        has_graph = tensor.grad_fn is not None  # then it requires a gradient
        if wrapped:
            connected = self._is_connected(tensor)
        else:
            connected = (has_graph and not inference) or (is_leaf and tensor.requires_grad)
        value = Value(
            len(values),
            None if tensor.is_nested else tensor.shape,
            dtype,
            dtype in DIFFERENTIABLE,
            connected,
            is_leaf and not has_graph,
            inference,
            "",
            memory,
        )  # by position: this runs for every result of every call
        values.append(value)
        self._known[key] = (weakref.ref(tensor), value, version)
        if wrapped:
            self._wrapped.add(value.id)
            for each in _layers(tensor)[1:]:
                self._known[id(each)] = (weakref.ref(each), value, _version(each))
        return value

    def is_known(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor was seen before."""
        known = self._known.get(id(tensor))
        return known is not None and known[0]() is tensor

    def value_of(self, tensor: torch.Tensor) -> int:
        """Return the value that a tensor holds now, linking it to its origin where it was not seen being made."""
        known = self._known.get(id(tensor))
        if known is None or known[0]() is not tensor:
            return self._adopt(tensor)
        _, value, version = known
        try:
            is_rewritten = tensor._version != version
        except RuntimeError:  # of an inference tensor
            is_rewritten = version != UNVERSIONED
        if is_rewritten or (self._written_unseen and memory_of(tensor) in self._written_unseen):
            value = self._recording.values[self._rewritten(tensor, value)]
        if value.room and value.id in self._exposed:
            return self._filled(tensor, value.id)
        if not value.connected and (tensor.requires_grad or value.id in self._wrapped):
            self._judge_again(tensor, value)
        return value.id

    def values_of(self, value: Any) -> tuple[int, ...]:
        """Return the values of the tensors in anything that may hold some; see ``contents.py``."""
        found: list[torch.Tensor] = []
        if type(value) is tuple:  # the arguments of a call
            gather(value, found, 1)
        else:
            gather((value,), found, 0)
        return tuple([self.value_of(tensor) for tensor in found]) if found else ()

    def _judge_again(self, tensor: torch.Tensor, value: Value) -> None:
        """Note on use what was not so before: ``Function.apply`` sets the grad_fn after the tensor was first seen."""
        value.connected = self._is_connected(tensor)
        if value.connected and value.id in self.made_by_function:
            tag(tensor, self.made_by_function[value.id], self.made_by_function[value.id])

    def _is_connected(self, tensor: torch.Tensor) -> bool:
        """Tell whether autograd links the tensor to anything.

        ``requires_grad`` alone lies: a view taken under no_grad borrows it from its base and has
        no grad_fn, and a copy may be a leaf of its own.
        """
        if is_wrapped(tensor):
            return any(self._is_connected(each) for each in _layers(tensor)[1:])
        if not tensor.requires_grad:
            return False
        # A function may give out an inference tensor with a grad_fn: what uses it records nothing (pytorch#77967).
        return id(tensor) in self._leaves or (tensor.grad_fn is not None and not tensor.is_inference())

    def entered(self, tensor: torch.Tensor) -> int | None:
        """Return a value for a tensor that may be made of numbers that were out; None where it cannot be."""
        return self.escapes.entered(tensor, self.remember)

    # --- writing in place -----------------------------------------------------------------------

    def wrote(
        self, tensor: torch.Tensor, operation: Operation, part: Part | None = None, *, unseen: bool = False
    ) -> None:
        """Note that a tensor was changed in place: what shares its memory holds something else now.

        ``unseen``: through ``.data``, so that the version counter of the original did not move; ``part`` of it.
        """
        storage = memory_of(tensor)
        if storage:
            self._recording.writes.append(Write(storage, operation.index, unseen, part))
            self._written[storage] = (self.value_of(tensor), operation)
            if unseen:
                self._written_unseen.add(storage)

    def _rewritten(self, tensor: torch.Tensor, value: Value) -> int:
        written, operation = self._written.get(memory_of(tensor), (value.id, None))
        if operation is None or written == value.id:
            self._known[id(tensor)] = (weakref.ref(tensor), value, _version(tensor))
            return value.id
        self._written_unseen.discard(memory_of(tensor))
        return self._link(operation.name, (value.id, written), tensor, operation)

    def exposed(self, tensor: torch.Tensor, place: Place | None) -> None:
        """Note that the memory itself was handed out: a kernel may read it, or write into it where it is room."""
        if tensor.is_floating_point():
            known = self._known.get(id(tensor))  # told twice of the same room (to check it, to run): nothing ran yet
            is_room = known is not None and known[0]() is tensor and known[1].room
            self._exposed[known[1].id if known and is_room else self.value_of(tensor)] = place

    def changed_in_run(self, tensor: torch.Tensor) -> bool:
        """Tell whether a recorded call has written into the memory of a tensor."""
        return memory_of(tensor) in self._written

    def overwritten(self, tensor: torch.Tensor) -> None:
        """Note that all of a tensor is about to be written: a kernel that was told its memory left nothing in it."""
        known = self._known.get(id(tensor)) if self._exposed else None
        if known is not None:
            self._exposed.pop(known[1].id, None)

    def _filled(self, tensor: torch.Tensor, number: int) -> int:
        """Link room whose memory was handed out to the other memory that was: a kernel ran from these into that."""
        given = tuple(value for value in self._exposed if not self._recording.values[value].room)
        if not given:  # so far nobody was told where there is something to read
            return number
        place = self._exposed.pop(number)
        self._recording.values[number].room = False
        return self._link("kernel", given, tensor, place=place)

    # --- strangers ------------------------------------------------------------------------------

    def _adopt(self, tensor: torch.Tensor) -> int:
        """Return a value for a tensor that no recorded call gave out."""
        inner = [each for each in _layers(tensor)[1:] if self.is_known(each)]
        if inner:
            return self._link("view", (self.value_of(inner[0]),), tensor)
        base = tensor._base if not tensor.is_inference() else None
        if base is not None and self.is_known(base):
            return self._link("view", (self.value_of(base),), tensor)
        mate = self._shares_memory(tensor)
        if mate is not None and not self.escapes.left_as_array(memory_of(tensor)):
            return self._link("Parameter" if isinstance(tensor, nn.Parameter) else "shared memory", (mate,), tensor)
        if tensor.grad_fn is not None or id(tensor) in self.lent:
            return self._of_its_graph(tensor)
        entered = self.entered(tensor)
        if entered is not None:
            return entered
        # a parameter that is made in the run is known
        self.strangers += tensor.is_floating_point() and not isinstance(tensor, nn.Parameter)
        return self.remember(tensor).id

    def _of_its_graph(self, tensor: torch.Tensor) -> int:
        """Link a tensor to the leaves that its own graph shows, and note those in whose place the run has others."""
        leaves = self.leaves_behind(tensor)
        number = self._link("opaque call", leaves, tensor) if leaves else self.remember(tensor).id
        self.has_foreign_graph = True
        for leaf in reached_leaves(_layers(tensor)) if self.lent else ():
            if id(leaf) in self.lent:
                self.of_lent[number] = self.lent[id(leaf)]
        return number

    def lent_in_use(self) -> str:
        """Return the name of such a parameter that a call or the result took in; empty where there is none."""
        used = set(self._recording.sinks) if self.of_lent else set()
        for operation in self._recording.operations if self.of_lent else ():
            used.update(operation.inputs)
        return next((name for number, name in self.of_lent.items() if number in used), "")

    def leaves_behind(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Return the values of the leaves that autograd links a tensor to."""
        reached = reached_leaves(_layers(tensor))
        return tuple(self._leaves[id(leaf)] for leaf in reached if id(leaf) in self._leaves)

    def _shares_memory(self, tensor: torch.Tensor) -> int | None:
        storage = memory_of(tensor)
        if not storage:
            return None
        for reference, value, _ in list(self._known.values()):
            other = reference()
            if other is not None and other is not tensor and memory_of(other) == storage:
                return value.id
        return None

    def _link(
        self,
        name: str,
        inputs: tuple[int, ...],
        tensor: torch.Tensor,
        cause: Operation | None = None,
        place: Place | None = None,
    ) -> int:
        number = self.remember(tensor).id
        place, scope = (cause.place, cause.scope) if cause is not None else (place or self.place, None)
        self._recording.add(Operation(0, name, inputs, (number,), place, scope))
        return number


# --- pure functions ------------------------------------------------------------------------------------


is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
# The version of an inference tensor, which counts none.
UNVERSIONED = -1


def _layers(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return a tensor and what it wraps: ``torch.func`` wraps its arguments and unwraps its results unseen."""
    layers = [tensor]
    while is_wrapped(layers[-1]):
        layers.append(torch._C._functorch.get_unwrapped(layers[-1]))
    return layers


def _version(tensor: torch.Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # told so, rather than asked beforehand at every use of every tensor
        return UNVERSIONED
