"""Three walks over a recording: where the numbers of each source go, where its derivative could, where autograd's does.

- *data*: the source's numbers are part of the value
- *smooth*: and on the way there is a useful derivative (no argmax, no rounding, no integer)
- *linked*: and autograd connects them

Sets of sources are integers, one bit a source: a model has hundreds of them and thousands of values.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from gradscope.tracing.calls import WHOLE, is_in_place
from gradscope.tracing.recording import Operation, Recording, Value

# The derivative exists and is zero: piecewise constant (torch's derivatives.yaml gives zeros, or none).
PIECEWISE_CONSTANT = frozenset(
    "round round_ floor floor_ ceil ceil_ trunc trunc_ fix fix_ sign sign_ sgn sgn_ bernoulli bernoulli_ heaviside "
    "floor_divide __floordiv__ __rfloordiv__ __round__".split()
)
# What comes right before all numbers of a tensor are taken out of torch.
READIES = frozenset({"detach", "cpu", "data", "float", "contiguous"})
# Values leave torch, or come back as a leaf: the numbers go on, what they were made by does not.
REPLACES_DATA = frozenset({"__set__"})
# All sources, as a set of bits.
EVERY = -1


class Walks:
    """Per value: the sources whose data, derivative and gradient link reach it; and what reaches an output.

    ``parted`` are the sources that lost a link anywhere.
    """

    def __init__(self, recording: Recording, start: dict[str, int], bits: dict[str, int]) -> None:
        self._recording = recording
        self._everything = sum(bits.values())
        self.data = [0] * len(recording.values)
        for name, value in start.items():
            self.data[value] |= bits[name]
        self.smooth, self.linked = self.data.copy(), self.data.copy()
        self.parted = 0
        for operation in recording.operations:
            _step(recording.values, operation, self)
        self.live = _live(recording)

    @functools.cached_property
    def counts(self) -> list[int]:
        """The sources that miss something where their link ends at a value.

        None where no derivative of it reaches an output, and not the parameter that is overwritten with a function of
        itself on every way there (clipped, normalised, cast), which is an update of it and no part of the graph. Where
        nothing is lost nobody asks.
        """
        return _counts(self._recording, self.linked, self._everything)


def union(sets: list[int], values: Iterable[int]) -> int:
    """Return the sources of several values."""
    result = 0
    for value in values:
        result |= sets[value]
    return result


def reaching(recording: Recording, calls: Iterable[Operation]) -> set[int]:
    """Return the values whose numbers these calls were given, or what was computed of them."""
    found = {value for call in calls for value in call.inputs}
    for operation in reversed(recording.operations if found else ()):
        if not found.isdisjoint(operation.outputs):
            found.update(operation.inputs)
    return found


def where_it_left(recording: Recording) -> tuple[list[Operation], tuple[int, ...]]:
    """Return the calls that took a result out of torch, and what they were given (before it was detached for that)."""
    escapes = [escape for escape in recording.escapes
               if any(recording.values[value].differentiable for value in escape.inputs)]  # fmt: skip
    left = [escape for escape in escapes if escape.name in WHOLE] or escapes
    made = {value: operation for operation in recording.operations for value in operation.outputs}
    sinks = []
    for given in (value for escape in left for value in escape.inputs):
        value = given
        while value in made and made[value].name in READIES:
            value = made[value].inputs[0]
        sinks.append(value)
    return left, tuple(dict.fromkeys(sinks))


def linked_sources(recording: Recording) -> frozenset[str]:
    """Return the sources that autograd connects to the sinks, as far as the recording shows it."""
    bits = {name: 1 << index for index, name in enumerate(recording.leaves)}
    reached = union(Walks(recording, recording.leaves, bits).linked, recording.sinks)
    return frozenset(name for name, bit in bits.items() if reached & bit)


def arriving(recording: Recording, ends: Iterable[int]) -> set[int]:
    """Return the values that a gradient of ``ends`` comes back to, along the links that autograd has."""
    reached = {value for value in ends if recording.values[value].connected}
    for operation in reversed(recording.operations):
        for output in reached.intersection(operation.outputs):
            reached.update(
                [value for value in linked_to(recording.values, operation, output) if recording.values[value].connected]
            )
    return reached


def linked_to(values: list[Value], operation: Operation, output: int) -> tuple[int, ...]:
    """Return the inputs of an operation that autograd links to one of its outputs."""
    value = values[output]
    if not value.connected or (operation.refusal and not operation.refusal.silent):
        return ()
    # Written in place where autograd does not look: only what was there before stays linked.
    if value.leaf or _writes_unseen(operation):
        return operation.inputs[:1]
    return operation.inputs if operation.given is None else operation.inputs[: operation.given]


def is_flat(operation: Operation) -> bool:
    """Tell whether an operation has no useful derivative whatever goes in."""
    return operation.name in PIECEWISE_CONSTANT


def _step(values: list[Value], operation: Operation, walks: Walks) -> None:
    """Carry the sources of what an operation takes in to what it gives out: some hundred times in each run."""
    data, smooth, linked = walks.data, walks.smooth, walks.linked
    carried = derived = connected = 0
    for value in operation.inputs:
        carried |= data[value]
        derived |= smooth[value]
        connected |= linked[value]
    if operation.name in PIECEWISE_CONSTANT:
        derived = 0
    depends = operation.leads_to and operation.refusal is None
    for number, output in enumerate(operation.outputs):
        without = ~_irrelevant(operation, number, connected, walks) if depends else EVERY
        data[output] |= carried & without
        if values[output].differentiable:
            smooth[output] |= derived & without
        kept = linked_to(values, operation, output)
        linked[output] |= (connected if kept is operation.inputs else union(linked, kept)) & without
        walks.parted |= smooth[output] & ~linked[output]


def _irrelevant(operation: Operation, number: int, linked: int, walks: Walks) -> int:
    """Return the sources that a derivative does not depend on: linked to what it is of, and by autograd not to it.

    Of a source that lost a link before, autograd does not know all that it does.
    """
    return linked & ~union(walks.linked, operation.leads_to[number]) & ~walks.parted


def _writes_unseen(operation: Operation) -> bool:
    return operation.name in REPLACES_DATA or (bool(operation.regions) and is_in_place(operation.name))


def _live(recording: Recording) -> set[int]:
    live = set(recording.sinks)
    for operation in reversed(recording.operations):
        if live.intersection(operation.outputs):
            live.update(operation.inputs)
    return live


def _counts(recording: Recording, linked: list[int], everything: int) -> list[int]:
    """Walk back from the outputs, along what has a derivative."""
    values, counts = recording.values, [0] * len(recording.values)
    for sink in recording.sinks:
        if values[sink].differentiable:
            counts[sink] = everything
    for operation in reversed(recording.operations):
        found = union(counts, operation.outputs)
        if not found or is_flat(operation):
            continue
        overwrites = True in [values[output].leaf for output in operation.outputs]
        own = union(linked, operation.inputs[:1]) if overwrites else 0
        for number, value in enumerate(operation.inputs):
            if values[value].differentiable:
                counts[value] |= found & ~own if number else found
    return counts
