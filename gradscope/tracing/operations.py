"""The operations of one run as they are written down: what each takes in at its start, what it gives out at its end."""

from __future__ import annotations

from types import FrameType
from typing import Any

import torch

from gradscope.tracing.autograd import tag
from gradscope.tracing.calls import AS_ANOTHER, ESCAPES, ROOMS, TAKES_NUMBERS, is_in_place
from gradscope.tracing.contents import tensors_in
from gradscope.tracing.cuts import RULE_OF_OPERATION
from gradscope.tracing.frames import call_chain, inside_of
from gradscope.tracing.provenance import Provenance
from gradscope.tracing.recording import Operation, Place, Recording
from gradscope.tracing.scopes import OpenScopes, Threads


class Operations:
    """Writes operations into a recording; one that came to nothing is left out."""

    def __init__(self, recording: Recording, provenance: Provenance, threads: Threads) -> None:
        self._recording = recording
        self._provenance = provenance
        self._threads = threads

    def new(self, name: str, inputs: tuple[int, ...], place: Place | None, *, custom: bool = False) -> Operation:
        """Return an operation that starts here and now."""
        here = self._threads.here
        return Operation(len(self._recording.operations), name, inputs, (), place, here.scope, here.active, custom)

    def begin(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], place: Place | None, frame: FrameType
    ) -> Operation:
        """Note that a call starts, with what of its arguments it uses the numbers of; ``frame`` called it."""
        if name in AS_ANOTHER or name == "__deepcopy__":  # the memo of a deepcopy holds all copies made so far
            args, kwargs = args[:1], {}
        elif name in ("new_tensor", "new"):  # of the dtype and device of the first, and the numbers of the second
            args = args[1:]
        operation = self.start(name, (*args, *kwargs.values()), place, self._threads.here)
        if name in RULE_OF_OPERATION:
            operation.chain, operation.via = call_chain(frame), inside_of(frame, name)
        return operation

    def start(self, name: str, given: tuple[Any, ...], place: Place | None, here: OpenScopes) -> Operation:
        """Note that a call starts that uses the numbers of all that it is ``given``."""
        provenance, recording = self._provenance, self._recording
        provenance.place = place
        inputs = provenance.values_of(given)
        if provenance.escapes.scalars:
            inputs += provenance.escapes.scalars_in(given)
        regions = here.active if here.regions else ()
        operation = Operation(len(recording.operations), name, inputs, (), place, here.scope, regions)
        if len(inputs) < len(given) and name in TAKES_NUMBERS:
            operation.number = next(
                (each for each in given if isinstance(each, (int, float)) and not isinstance(each, bool)), None
            )
        recording.pending = operation
        return operation

    def finish(self, pending: Operation, produced: Any, here: OpenScopes | None = None) -> None:
        """Note that a call came to its end, and what it gave out."""
        recording = self._recording
        recording.pending = None
        made = [produced] if type(produced) is torch.Tensor else tensors_in(produced)
        pending.outputs = tuple([self._provenance.remember(tensor).id for tensor in made])
        if pending.name in ROOMS:
            recording.values[pending.outputs[0]].room = True
        regions = (here or self._threads.here).regions
        if pending.inputs:
            # What gives out nothing counts where it lets numbers out, or writes: what is blamed has to be there.
            counts = pending.outputs or pending.name in ESCAPES or is_in_place(pending.name)
        else:
            counts = bool(regions) and any(tensor.is_inference() for tensor in made)
        if counts:
            since, pending.index = pending.index, len(recording.operations)
            recording.operations.append(pending)
            for tensor in made:
                tag(tensor, pending.index, since)
