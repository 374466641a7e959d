"""Replays of CUDA graphs: kernels that were captured before run again, and no torch function sees them.

What a graph reads and writes is fixed at its capture. What it writes lies in the memory pool of the graph. What it
reads is not told by torch: what this run has written into the tensors that the model keeps beside its parameters and
buffers (the static inputs), and the parameters that nothing else uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from gradscope.tracing.autograd import memory_of
from gradscope.tracing.provenance import Provenance
from gradscope.tracing.recording import Operation, Recording
from gradscope.tracing.structural import CannotFollow

NAME = "CUDAGraph.replay"


class Replays:
    """Notes the replays of one run; ``held`` are the tensors that the model keeps in plain attributes."""

    def __init__(self, recording: Recording, provenance: Provenance) -> None:
        self._recording = recording
        self._provenance = provenance
        self._noted: list[Operation] = []
        self.held: Callable[[], Iterable[torch.Tensor]] = tuple
        self.computes = True

    def begin(self, graph: Any, before_write: Callable[[torch.Tensor], None]) -> list[torch.Tensor]:
        """Return the tensors that the graph is about to write, told to ``before_write`` as well.

        Raises:
            CannotFollow: nothing is computed in this run, and its tensors are none of the graph's.
        """
        if not self.computes:
            raise CannotFollow("a CUDA graph is replayed")
        spans = _spans(graph.pool())
        written = [tensor for tensor in self._static() if _lies_in(memory_of(tensor), spans)]
        for tensor in written:
            before_write(tensor)
        return written

    def end(self, written: list[torch.Tensor], new: Callable[[str, tuple[int, ...]], Operation]) -> None:
        """Note that they hold something else now, made of what the run has put in place for it."""
        provenance = self._provenance
        changed = {id(tensor): tensor for tensor in self._static() if provenance.changed_in_run(tensor)}
        read = [*changed.values(), *written]  # one captured in this run was made of what it is made of again
        operation = new(NAME, tuple(dict.fromkeys(provenance.value_of(tensor) for tensor in read)))
        operation.outputs = tuple(provenance.remember(tensor).id for tensor in written)
        self._recording.add(operation)
        self._noted.append(operation)

    def forward_is_over(self) -> None:
        """Let the replays have read the parameters that nothing else used: captured kernels work with weights."""
        if not self._noted:
            return
        used = {number for operation in self._recording.operations for number in operation.inputs}
        unused = tuple(number for number in self._recording.leaves.values() if number not in used)
        for operation in self._noted:
            operation.inputs = (*operation.inputs, *unused)

    def _static(self) -> list[torch.Tensor]:
        found = {id(tensor): tensor for tensor in self.held() if tensor.is_floating_point()}
        return list(found.values())


def _spans(pool: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the pieces of GPU memory of a pool, each as its first address and the one after its last."""
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return [(each["address"], each["address"] + each["total_size"]) for each in segments
            if tuple(each["segment_pool_id"]) == tuple(pool)]  # fmt: skip


def _lies_in(address: int, spans: list[tuple[int, int]]) -> bool:
    return any(first <= address < end for first, end in spans)
