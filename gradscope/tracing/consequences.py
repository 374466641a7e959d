"""What a torch call means beyond its result: numbers that left torch or came back, memory written, a derivative."""

from __future__ import annotations

from typing import Any

import torch

from gradscope.tracing.autograd import part_written
from gradscope.tracing.calls import DERIVATIVES, DERIVES, ENTRANCES, ESCAPES, FILLS
from gradscope.tracing.contents import tensors_in
from gradscope.tracing.frames import is_constant
from gradscope.tracing.provenance import Provenance
from gradscope.tracing.recording import Operation, Place, Recording


class Consequences:
    """Writes down what follows from the calls of one run."""

    def __init__(self, recording: Recording, provenance: Provenance) -> None:
        self._recording = recording
        self._provenance = provenance

    def note(
        self, pending: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, written: list[Any]
    ) -> None:
        """Note what the call means beyond its result: numbers that left for Python, came back, or were overwritten.

        Of a derivative that has a graph of its own autograd knows what it depends on.
        """
        name = pending.name
        if name in DERIVATIVES and kwargs.get("create_graph", name != DERIVES):
            pending.leads_to = tuple(map(self._provenance.leaves_behind, tensors_in(result)))
        if name in ESCAPES:
            self._provenance.escapes.escaped(pending, result)
        elif name in ENTRANCES and not pending.inputs and self._provenance.escapes.are_out:
            for tensor in tensors_in(result) if not is_constant(pending.place, name) else ():
                self._provenance.entered(tensor)
        for tensor in written:
            by_data = self._maker_of(pending).partition(".")[0] == "data"
            if by_data:  # x.data.mul_(...).add_(...): the numbers go into x, whose version counter does not move
                pending.name = f"data.{name}"
            part = part_written(name, args) if by_data else None
            # A fused optimizer moves no version counter, so that autograd goes on with weights that have changed.
            self._provenance.wrote(tensor, pending, part, unseen=by_data or name.startswith("_fused_"))

    def _maker_of(self, pending: Operation) -> str:
        """Return the call that gave out the first input, if it was the one before."""
        if pending.inputs:
            for operation in reversed(self._recording.operations[-8:]):
                if pending.inputs[0] in operation.outputs:
                    return operation.name
        return ""

    def room(self, name: str, result: Any) -> Any:
        """Know what was made to be written into, or filled with a number that may have been a tensor's."""
        if isinstance(result, torch.Tensor):
            entered = self._provenance.entered(result) if name in FILLS else None
            if entered is None:
                self._provenance.remember(result).room = True
        return result

    def flag(self, tensor: torch.Tensor) -> None:
        """Note what ``requires_grad`` of a leaf was set to."""
        leaf = self._provenance.leaf_of(tensor)
        if leaf is not None:
            self._recording.flags.append((leaf, len(self._recording.operations), tensor.requires_grad))

    def hook(self, tensor: torch.Tensor, place: Place | None) -> None:
        """Note where a hook was set on a tensor."""
        if place is not None:
            self._recording.hooks[self._provenance.value_of(tensor)] = place
