"""One true backward pass: how large each gradient is, and where one turns to zero, to NaN or to nothing.

The outputs are given random gradients (unit normal; a single number the gradient 1), so that none vanishes by symmetry.
Nothing of the model's stays changed: its ``.grad`` and the hooks that act on finished gradients (an optimizer
in the backward pass) are put aside meanwhile.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from gradscope.findings import Gradient
from gradscope.tracing.autograd import AutogradGraph, unwatched
from gradscope.tracing.recording import Loss

# The sparse layouts that keep their numbers by rows or columns.
COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
# A word, or two truth values that still lie where the gradient did.
Look: TypeAlias = "str | torch.Tensor"
# What may have arrived where a gradient turns into something: 0 times infinity is NaN, too.
SOUND_BEFORE = {"zero": ("sound",), "nonfinite": ("sound", "zero"), "none": ("sound", "zero")}


@dataclass(slots=True)
class Backward:
    """What a backward pass gave: per source its gradient (None: none arrived), or the error that it raised.

    Without numbers (fake tensors) a gradient that arrives is one of norm 0 that says nothing: ``measured`` is False.
    ``nested`` are the sources that no graph showed: a custom function goes backward through a graph of its own
    (reversible blocks, checkpoints of other libraries).
    """

    gradients: dict[str, Gradient | None] = field(default_factory=dict)
    error: Exception | None = None
    losses: list[Loss] = field(default_factory=list)
    measured: bool = True
    nested: frozenset[str] = frozenset()

    @property
    def troubled(self) -> bool:
        """Whether a further pass, watched, has something to find."""
        return self.error is not None or any(_trouble(each, self.measured) for each in self.gradients.values())


def run_backward(
    sinks: list[torch.Tensor],
    graph: AutogradGraph,
    named: Mapping[str, torch.Tensor],
    asked: Container[str],
    *,
    watched: bool,
    measured: bool,
    keeps_graph: bool = False,
    hooked: bool = False,
) -> Backward:
    """Run backward from the sinks to the sources asked about, and measure the gradient of each that it reaches.

    Each gradient is dropped as soon as it is measured. Where ``watched``, every node is looked at too, which tells
    where a gradient was lost. Only what leads to a source is run; all of it where a custom function may reach others,
    or a hook may (``hooked``): it may go backward itself. ``keeps_graph``: a part of it is the caller's, made before
    the run.
    """
    result = Backward(measured=measured)
    leaves = {id(leaf) for leaf in graph.leaves}
    reached = {name: tensor for name, tensor in named.items() if name in asked and id(tensor) in leaves}
    may_reach_others = graph.custom or hooked
    hidden = {name: tensor for name, tensor in named.items() if (name in asked or hooked) and id(tensor) not in leaves
              and may_reach_others}  # fmt: skip
    starts = [sink for sink in sinks if sink.grad_fn is not None or has_hook(sink)]
    if not starts or not (reached or hidden):
        return result
    watch = _Watch(graph, measured) if watched else None
    wanted = list({id(tensor): tensor for tensor in reached.values()}.values())
    around = [tensor for tensor in named.values() if tensor.requires_grad] if may_reach_others else []
    touched = list({id(tensor): tensor for tensor in (*graph.leaves, *around)}.values())
    with _put_aside(touched), _hooked(watch):
        collected = _collect(touched, measured)
        try:
            weights = [_weight(sink) for sink in starts]
            torch.autograd.backward(starts, weights, keeps_graph or None, inputs=None if hidden else wanted)
        except Exception as error:  # the target's own (a custom backward), or autograd's refusal
            result.error = error
        result.gradients = {name: collected.get(id(tensor)) for name, tensor in reached.items()}
        found = {name: collected[id(tensor)] for name, tensor in hidden.items() if id(tensor) in collected}
        result.gradients.update(found)
        result.nested = frozenset(found)
    if watch is not None:
        result.losses = watch.losses(reached, result)
    return result


def has_hook(result: torch.Tensor) -> bool:
    """Tell a result that is a leaf with a hook: all that comes of a backward pass is what that does (GradCache)."""
    return result.is_leaf and result.requires_grad and bool(result._backward_hooks)


def _weight(sink: torch.Tensor) -> torch.Tensor:
    """Return the gradient to start with; a number is taken for a loss."""
    return torch.randn_like(sink) if sink.dim() else torch.ones_like(sink)


@unwatched
def _collect(leaves: Iterable[torch.Tensor], measured: bool) -> dict[int, Gradient]:
    """Measure each gradient when it is complete, and free it; reentrant checkpoints complete it several times."""
    found: dict[int, Gradient] = {}

    @unwatched
    def measure(tensor: torch.Tensor) -> None:
        if tensor.grad is not None:
            before = found.get(id(tensor))
            found[id(tensor)] = _measured(tensor.grad, before) if measured else Gradient(0.0)
            tensor.grad = None

    for tensor in leaves:
        tensor.register_post_accumulate_grad_hook(measure)  # type: ignore[no-untyped-call]
    return found


def _measured(grad: torch.Tensor, before: Gradient | None) -> Gradient:
    with torch.no_grad():
        values = grad.coalesce().values() if grad.layout == torch.sparse_coo else grad
        low = values.dtype in (torch.float16, torch.bfloat16)
        norm = float(torch.linalg.vector_norm(values, dtype=torch.float32 if low else None))
        bad = 0 if math.isfinite(norm) else int(values.numel() - values.isfinite().sum())
    if before is not None:
        return Gradient((norm**2 + before.norm_l2**2) ** 0.5, bad + before.nonfinite)
    return Gradient(norm, bad)


@contextmanager
def _put_aside(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Take ``.grad`` and the hooks on finished gradients off the leaves, and put them back."""
    with torch._C.DisableTorchFunction():
        kept = [(tensor, tensor.grad, tensor._post_accumulate_grad_hooks) for tensor in tensors]
    try:
        _give(kept, taken_off=True)
        yield
    finally:
        _give(kept, taken_off=False)


@unwatched
def _give(kept: list[tuple[torch.Tensor, torch.Tensor | None, Any]], *, taken_off: bool) -> None:
    for tensor, grad, hooks in kept:
        tensor.grad = None if taken_off else grad
        # None is only noted by Python: autograd would go on calling the hooks it has. An empty table it does take.
        tensor._post_accumulate_grad_hooks = OrderedDict()
        if not taken_off:
            tensor._post_accumulate_grad_hooks = hooks


@contextmanager
def _hooked(watch: _Watch | None) -> Iterator[None]:
    handles = [handle for node in watch.graph.nodes for handle in watch.hooks(node)] if watch is not None else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """Looks at what goes into and out of every node of the autograd graph."""

    def __init__(self, graph: AutogradGraph, measured: bool) -> None:
        self.graph = graph
        self.measured = measured
        self.arrived: dict[Any, str] = {}
        self.given: dict[Any, list[str]] = {}
        self.last: Any = None
        self._before: dict[Any, list[Look]] = {}
        self._after: dict[Any, list[Look]] = {}

    def hooks(self, node: Any) -> list[Any]:
        """Install both hooks on a node; ``AccumulateGrad`` gives nothing on."""

        def before(grads: Any) -> None:
            self.last = node
            self._before[node] = [_look(grad, self.measured) for grad in grads]

        def after(grad_inputs: Any, grad_outputs: Any) -> None:
            self._after[node] = [_look(grad, self.measured) for grad in grad_inputs]

        installed = [node.register_prehook(before)]
        if not hasattr(node, "variable"):
            installed.append(node.register_hook(after))
        return installed

    def losses(self, reached: Mapping[str, torch.Tensor], result: Backward) -> list[Loss]:
        """Return where the gradients were lost."""
        if result.error is not None:
            node = self.last if self._is_running(self.last) else self._next()
            behind = self._behind(node)
            names = frozenset(name for name, tensor in reached.items() if id(tensor) in behind)
            return [Loss(self.graph.operations.get(node), "raises" if node is self.last else "hook raises", names)]
        self._read()
        found: dict[tuple[int | None, str], set[str]] = {}
        above = self._above()
        for name, tensor in reached.items():
            what = _trouble(result.gradients.get(name), self.measured)
            if what:
                for operation in self._frontier(id(tensor), what, above):
                    found.setdefault(operation, set()).add(name)
        return [Loss(operation, what, frozenset(names)) for (operation, what), names in found.items()]

    def _is_running(self, node: Any) -> bool:
        """Tell whether a node was begun and not ended; ``AccumulateGrad`` tells only that it was begun, and ends."""
        return node is not None and node not in self._after and not hasattr(node, "variable")

    def _next(self) -> Any:
        """Return the node that would have come next: a hook on a tensor runs before its node is begun.

        Of those that have all their gradients, the engine takes the one that was made last.
        """
        above = self._above()
        ready = [node for node in self.graph.nodes if node not in self._before
                 and all(upper in self._after for upper, _ in above.get(node, ()))]  # fmt: skip
        return max(
            ready, key=lambda node: (hasattr(node, "variable"), node._sequence_nr()), default=self.graph.nodes[0]
        )

    def _read(self) -> None:
        """Read what was seen of all gradients, in one transfer from a GPU: it would wait for each one asked alone."""
        looks = [look for seen in (self._before, self._after) for each in seen.values() for look in each]
        tensors = [look for look in looks if isinstance(look, torch.Tensor)]
        read = iter(torch.stack([each.to(tensors[0].device) for each in tensors]).tolist() if tensors else ())
        states = iter([look if isinstance(look, str) else _state(*next(read)) for look in looks])
        self.arrived = {node: _worst([next(states) for _ in each]) for node, each in self._before.items()}
        self.given = {node: [next(states) for _ in each] for node, each in self._after.items()}

    def _behind(self, node: Any) -> set[int]:
        """Return the leaves behind a node, by ``id``."""
        pending, seen = [node], {node}
        while pending:
            above = pending.pop()
            for following, _ in above.next_functions if above is not None else ():
                if following is not None and following not in seen:
                    seen.add(following)
                    pending.append(following)
        return {id(getattr(each, "variable", None)) for each in seen}

    def _above(self) -> dict[Any, list[tuple[Any, int]]]:
        """Return for every node the edges that lead to it, as (node above, index of its gradient)."""
        above: dict[Any, list[tuple[Any, int]]] = {}
        for node in self.graph.nodes:
            for index, (following, _) in enumerate(node.next_functions):
                if following is not None:
                    above.setdefault(following, []).append((node, index))
        return above

    def _frontier(
        self, leaf: int, what: str, above: dict[Any, list[tuple[Any, int]]]
    ) -> Iterator[tuple[int | None, str]]:
        """Walk from a leaf up to where the gradient was still sound."""
        start = [node for node in self.graph.nodes if id(getattr(node, "variable", None)) == leaf]
        pending, seen = list(start), set(start)
        while pending:
            node = pending.pop()
            edges = above.get(node, [])
            states = [self._gave(upper, index) for upper, index in edges]
            if self.arrived.get(node, "none") == what and what not in states and (not edges or "sound" in states):
                yield (None if hasattr(node, "variable") else self.graph.operations[node]), f"hook {what}"
                continue
            for (upper, _), state in zip(edges, states, strict=True):
                if state != what:
                    continue
                if self.arrived.get(upper, "none") in SOUND_BEFORE[what]:
                    yield self.graph.operations[upper], what
                elif upper not in seen:
                    seen.add(upper)
                    pending.append(upper)

    def _gave(self, node: Any, index: int) -> str:
        given = self.given.get(node)
        return given[index] if given is not None and index < len(given) else "none"


@unwatched
def _look(grad: torch.Tensor | None, measured: bool) -> Look:
    """Return the state of a gradient where it is known without its numbers; else whether it is finite, and not zero."""
    if grad is None:
        return "none"
    if not measured:
        return "sound"
    with torch.no_grad():
        values = grad._values() if grad.layout == torch.sparse_coo else grad
        if values.layout in COMPRESSED:
            values = values.values()
        if values.is_complex():
            values = torch.view_as_real(values.resolve_conj())
        if type(values) is torch.Tensor and values.layout == torch.strided and values.numel():
            # The least and the greatest number tell it as well, and to find them takes a twentieth of the time.
            values = torch.stack([values.amin(), values.amax()])
        return torch.stack([values.isfinite().all(), values.any()])


def _state(finite: bool, any_number: bool) -> str:
    if not finite:
        return "nonfinite"
    return "sound" if any_number else "zero"


def _worst(states: Iterable[str]) -> str:
    """Return one word for the gradients that arrive at a node with several outputs."""
    found = set(states)
    return next((state for state in ("nonfinite", "sound", "zero") if state in found), "none")


def _trouble(gradient: Gradient | None, measured: bool) -> str:
    """Return what is wrong with a gradient; empty where nothing is."""
    if gradient is None:
        return "none"
    if gradient.nonfinite:
        return "nonfinite"
    return "zero" if measured and gradient.norm_l2 == 0 else ""
