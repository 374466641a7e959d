"""Walk the autograd graph from the outputs to the leaves: which ones does a gradient reach, and what refuses?

Nodes carry the index of the recorded operation that made them (``Node.metadata``, which lives as long as the
node itself does), so that what is seen in the graph can be told as a line of the model.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import BackwardCFunction

from gradscope.tracing.recording import Part, Refusal, Write

TAG = "gradscope.operation"
Writes: TypeAlias = "Callable[[int], list[Write]]"
# So many nodes can be freed in any order.
SHALLOW = 500
# The names of torch's own stand-ins for a derivative that nobody wrote (torch/csrc/autograd/functions/basic_ops.h,
# torch/csrc/autograd/autograd_not_implemented_fallback.cpp): the first raises in backward, the second only warns.
RAISES = "torch::autograd::NotImplemented"
WARNS = "torch::autograd::WarnNotImplemented"
WRITE_IT = "Compute it with calls that have a derivative, or give it one in a torch.autograd.Function."
GENERATED = "GeneratedBackwardFor_"
AccumulateGrad = torch._C._functions.AccumulateGrad
P = ParamSpec("P")
R = TypeVar("R")


def tag(tensor: torch.Tensor, operation: int, since: int) -> None:
    """Write on the tensor's node which operation made it.

    A call that recorded others from ``since`` on contains them and takes over what they made; one that hands its
    argument through does not.
    """
    node: Any = tensor.grad_fn
    if node is not None:
        metadata = node.metadata
        if metadata.get(TAG, since) >= since:
            metadata[TAG] = operation


@dataclass(slots=True)
class AutogradGraph:
    """The graph behind some tensors, walked once. The nodes are kept, since ``id`` of a dropped wrapper repeats.

    ``operations`` tells the recorded operation of each node; one call may make several nodes, of which the last
    carries its number, so that the others have it from the node above them. ``refusals`` are the operations at
    which a backward pass raises or comes to nothing, and ``leaves`` the tensors it arrives at all the same.
    """

    nodes: list[Any] = field(default_factory=list)
    operations: dict[Any, int | None] = field(default_factory=dict)
    refusals: dict[int, Refusal] = field(default_factory=dict)
    leaves: list[torch.Tensor] = field(default_factory=list)
    custom: bool = False

    def release(self) -> None:
        """Free the nodes, each after all that lead to it, when nothing else holds them any more.

        Of nodes that Python has seen, each frees the following one from within its own end (torch 2.14): a recurrent
        network of some thousand steps would overflow the stack and end the process.
        """
        if len(self.nodes) > SHALLOW:
            order = _from_above(self.nodes)
            self.operations.clear()
            self.nodes.clear()
            order.reverse()
            while order:
                order.pop()


def _from_above(nodes: list[Any]) -> list[Any]:
    """Return the nodes in an order in which each comes after all that lead to it."""
    above = Counter(following for node in nodes for following, _ in node.next_functions)
    order = [node for node in nodes if node not in above]
    for node in order:  # grows meanwhile
        for following, _ in node.next_functions:
            above[following] -= 1
            if following is not None and not above[following]:
                order.append(following)
    return order


def walk_graph(sinks: Iterable[torch.Tensor], written: Writes | None = None) -> AutogradGraph:
    """Return the autograd graph behind the sinks.

    Asks ``grad_fn.next_functions`` and never ``requires_grad``. What lies behind a node that gives no gradient is
    reached only where another way leads to it. ``written`` gives the later writes into what an operation took in
    or gave out.
    """
    graph = AutogradGraph()
    leaves: dict[int, torch.Tensor] = {}
    pending: list[tuple[Any, int | None]] = []
    for sink in sinks:
        if sink.grad_fn is not None:
            pending.append((sink.grad_fn, None))
        elif sink.requires_grad and sink.is_leaf:
            leaves[id(sink)] = sink
    operations = graph.operations
    while pending:
        node, above = pending.pop()
        if node in operations:
            continue
        kind = type(node)
        if kind is AccumulateGrad:  # half of all nodes: nothing is saved there, nothing follows
            operations[node] = above
            variable = node.variable
            leaves[id(variable)] = variable
            continue
        operation = operations[node] = node.metadata.get(TAG, above)
        writes = written(operation) if written is not None and operation is not None else None
        refusal = None
        if writes or kind not in _ORDINARY:
            graph.custom = graph.custom or isinstance(node, BackwardCFunction)
            refusal = _refusal(node, writes)
        if refusal is not None and operation is not None:
            graph.refusals.setdefault(operation, refusal)
        if refusal is None or refusal.silent:
            pending += [(following, operation) for following, _ in node.next_functions if following is not None]
    graph.nodes, graph.leaves = list(operations), list(leaves.values())
    return graph


def reached_leaves(sinks: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors whose ``AccumulateGrad`` nodes lie behind the sinks."""
    return walk_graph(sinks).leaves


# --- nodes that give no gradient -----------------------------------------------------------------------


def _refusal(node: Any, writes: list[Write] | None) -> Refusal | None:
    kind = type(node)
    if kind not in _ORDINARY:
        name = _name(node)
        if name == RAISES:
            said = "its derivative is not implemented"
            return Refusal("GS502", "torch has no derivative for it.", said, True, advice=WRITE_IT)
        if name == WARNS:
            return Refusal("GS502", "the operator has no autograd formula: backward warns and gives no gradient.")
        if name.startswith(GENERATED):
            if name in _operators_without_backward():
                said = "no autograd formula was registered for it"
                return Refusal("GS502", f"{said} (torch.library.register_autograd).", said, True)
        elif kind in _NAMES and not issubclass(kind, BackwardCFunction):
            _ORDINARY.add(kind)
    return _spoiled(node, writes) if writes else None


def _name(node: Any) -> str:
    """Return the name of a node; that of a class made for one kind of node is found once, since C++ takes it apart."""
    kind = type(node)
    name = _NAMES.get(kind)
    if name is None:
        name = str(node.name())
        if name.rpartition("::")[2] == kind.__name__:
            _NAMES[kind] = name
    return name


_NAMES: dict[type, str] = {}
# The kinds among them whose derivative is torch's own.
_ORDINARY: set[type] = set()


def _operators_without_backward() -> set[str]:
    """Return the names of the nodes of custom operators that nobody registered an autograd formula for.

    ``torch._library.custom_ops.OPDEFS`` is private; where it is gone, only a backward pass tells.
    """
    registry = getattr(sys.modules.get("torch._library.custom_ops"), "OPDEFS", {})
    return {
        f"{GENERATED}{name.replace('::', '_')}_defaultBackward"
        for name, definition in registry.items()
        if getattr(definition, "_backward_fn", True) is None
    }


def _spoiled(node: Any, writes: list[Write]) -> Refusal | None:
    """Tell whether what a node saved for backward was changed since."""
    unseen = [write for write in writes if write.unseen]
    for name in _names_of_saved(node.__class__):
        try:
            saved = getattr(node, name)
        except Exception as error:  # autograd's, or of a hook that was to unpack it and cannot here
            if "modified by an inplace operation" in str(error):
                words = f"it changes a value that {node.name()} saved for the backward pass, which raises."
                return Refusal("GS603", words, _first_sentence(str(error)), True, write=writes[-1].operation)
            continue
        for tensor in saved if isinstance(saved, tuple) else (saved,):
            for write in unseen:
                if isinstance(tensor, torch.Tensor) and _reaches(write, tensor):
                    words = f"it changes a value that {node.name()} saved, where autograd does not look."
                    return Refusal("GS603", words, silent=True, write=write.operation)
    return None


def _reaches(write: Write, tensor: torch.Tensor) -> bool:
    """Tell whether a write changed elements that a tensor shows: torchdiffeq writes one slice after another."""
    if memory_of(tensor) != write.memory:
        return False
    return write.part is None or _overlap(write.part, _part_of(tensor))


@functools.cache
def _names_of_saved(kind: type) -> list[str]:
    """Return the attributes of a kind of node that give out tensors: numbers that it saved are never raw."""
    names = set(dir(kind))
    return sorted(name for name in names if name == "saved_tensors" or f"_raw{name}" in names)


def _first_sentence(text: str) -> str:
    return text.strip().splitlines()[0].split(". Hint", maxsplit=1)[0]


def unwatched(method: Callable[P, R]) -> Callable[P, R]:
    """Keep what a method itself asks of tensors from being reported: ten calls for each tensor that it looks at."""

    @functools.wraps(method)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._C.DisableTorchFunction():
            return method(*args, **kwargs)

    return quiet


def memory_of(tensor: torch.Tensor) -> int:
    """Return what tells one piece of memory from another; 0 where there is none.

    Not to be asked while calls are recorded: whoever takes an address may write there.
    """
    try:
        if type(tensor) in _USUAL:
            offset = int(tensor.storage_offset())
            address = tensor.data_ptr() - (offset * tensor.element_size() if offset else 0)
            if address > 0:  # a storage costs an object, so it is asked only where this says nothing
                return address
        storage = tensor.untyped_storage()
        if isinstance(tensor, FakeTensor):  # has none, and to ask where it lies is an error to be
            return int(storage._cdata)
        address = storage.data_ptr()  # asked first: the device costs four times as much
        return address or (storage._cdata if storage.device.type == "meta" else 0)
    except (NotImplementedError, RuntimeError):  # sparse and nested tensors, wrappers of torch.func
        return 0


def part_written(name: str, args: tuple[Any, ...]) -> Part | None:
    """Return which elements a write reaches, of the memory that its first argument lies in."""
    target = args[0]
    with torch._C.DisableTorchFunction(), torch.no_grad():
        if name == "__setitem__":
            taken = target[args[1]]
            target = taken if memory_of(taken) == memory_of(target) else target  # else a copy of scattered elements
        return None if target.is_nested or target.layout != torch.strided else _part_of(target)


def _part_of(tensor: torch.Tensor) -> Part:
    return Part(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), tensor.element_size())


def _overlap(first: Part, second: Part) -> bool:
    """Tell whether two parts of one memory have elements in common, by marking those of the first."""
    spans = _span(first), _span(second)
    low, high = min(start for start, _ in spans), max(stop for _, stop in spans)
    if max(start for start, _ in spans) >= min(stop for _, stop in spans):
        return False
    if first.width != second.width or high - low > MOST_MARKED:
        return True
    with torch._C.DisableTorchFunction():
        marks = torch.zeros(high - low, dtype=torch.bool)
        _shown(marks, first, low).fill_(True)
        return bool(_shown(marks, second, low).any())


def _span(part: Part) -> tuple[int, int]:
    """Return the first element and the one after the last."""
    if 0 in part.sizes:
        return part.offset, part.offset
    steps = zip(part.sizes, part.strides, strict=True)
    return part.offset, part.offset + 1 + sum((size - 1) * stride for size, stride in steps)


def _shown(marks: torch.Tensor, part: Part, low: int) -> torch.Tensor:
    sizes = [size if stride else 1 for size, stride in zip(part.sizes, part.strides, strict=True)]
    return marks.as_strided(sizes, part.strides, part.offset - low)


# From so many elements on (a byte each), two parts whose spans meet are taken to overlap.
MOST_MARKED = 1 << 26
_USUAL = frozenset({torch.Tensor, torch.nn.Parameter})
