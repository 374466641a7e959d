"""What a run came to: what autograd's graph reaches from the result, and what a backward pass gives.

A step of training gives out a number, or nothing, and goes backward itself: then what counts is what it goes backward
from, read off at that moment, since the graph is freed by it and the weights are stepped after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch

from gradscope.errors import in_words
from gradscope.findings import Gradient
from gradscope.tracing.autograd import AutogradGraph, walk_graph
from gradscope.tracing.backward import has_hook, run_backward
from gradscope.tracing.constants import kept_with_history
from gradscope.tracing.contents import describe, left_torch, results_in
from gradscope.tracing.cuts import FREED
from gradscope.tracing.inventory import named_parameters
from gradscope.tracing.propagation import linked_sources, where_it_left
from gradscope.tracing.recorder import Recorder
from gradscope.tracing.recording import Recording
from gradscope.tracing.subject import Built, Workshop
from gradscope.tracing.unanalysed import CannotTell, used_elsewhere
from gradscope.tracing.unregistered import unregistered

Pass: TypeAlias = Literal["none", "plain", "watched"]
# What torch says where an allocation fails: of its own allocator, and of C++ anywhere below (a plain RuntimeError);
# and where the system gives the engine of the backward pass no thread (EAGAIN of pthread_create).
NO_MEMORY = ("can't allocate memory", "std::bad_alloc", "Resource temporarily unavailable")


@dataclass(slots=True)
class Run:
    """One recorded run and what stayed of its model: names of sources, which are frozen, which are asked about.

    ``gradients`` has the sources that a backward pass was made for and their graph reaches (None: nothing arrived);
    ``troubled`` says that a watched pass has more to tell. ``strangers`` and ``guesses`` count tensors of no known
    origin and modules taken as one; ``dispatched`` runs looked closer. ``froze`` are those of the frozen that the call
    froze itself; ``unasked`` would train, and no optimizer of the step holds them.
    """

    recording: Recording
    frozen: set[str]
    parameters: set[str]
    asked: frozenset[str] = frozenset()
    gradients: dict[str, Gradient | None] = field(default_factory=dict)
    measured: bool = False
    troubled: bool = False
    strangers: int = 0
    guesses: int = 0
    dispatched: bool = False
    froze: set[str] = field(default_factory=set)
    unasked: set[str] = field(default_factory=set)


class Outcome:
    """Reads off one run, at its end and where the target goes backward itself; ``graphs`` takes what it walks."""

    def __init__(self, recorder: Recorder, workshop: Workshop, built: Built, graphs: list[AutogradGraph]) -> None:
        self._recorder = recorder
        self._recording = recorder.recording
        self._workshop = workshop
        self._built = built
        self._graphs = graphs

    def look_ahead(self, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], frozenset[str]]:
        """Return the leaves, and the sources, that the target is about to reach by going backward itself.

        Without numbers an optimizer's step changes nothing: whether it spoils this backward pass is not known.
        """
        if self._recording.training.steps and self._workshop.mode == "structural":
            raise CannotTell(
                "It goes backward after an optimizer's step: what that spoils is seen only by computing.",
                hint="Use --mode real.",
            )
        named = self._named()
        graph = self._walked(tensors, named)
        return graph.leaves, self._reached(graph, named)

    def read(self, result: Any, run: Run, backward: Pass) -> None:
        """Write down what the result came to, and what a backward pass from it gives."""
        recording = self._recording
        sinks = [tensor for tensor in results_in(result) if tensor.is_floating_point() or tensor.is_complex()]
        own = dict.fromkeys(value for each in recording.training.judged for value in each.values)
        given_out = self._recorder.value_ids([sink for sink in sinks if sink.requires_grad])
        if own and own.keys() >= set(given_out):  # nothing, or the loss that it has gone backward from
            recording.sinks = tuple(own)
            reached = frozenset[str]().union(*(each.reached or () for each in recording.training.judged))
            recording.reached = reached | self._frozen_meanwhile(run, self._named(), reached)
            recording.walked = recording.went_back = True
            return
        if not sinks and left_torch(result):
            recording.left, recording.sinks = where_it_left(recording)
            recording.reached = linked_sources(recording)
            return
        recording.sinks = self._recorder.value_ids(sinks)
        self._note_kept()
        recording.gave = () if sinks else tuple(map(describe, results_in(result)))
        try:
            named = self._named()
            graph = self._walked(sinks, named)
            reached = self._reached(graph, named)
            recording.reached = reached | self._frozen_meanwhile(run, named, reached)
            recording.walked = True
            if any(map(has_hook, sinks)):
                self._take_in_own_passes()
            if backward != "none":
                self._go_back(run, sinks, graph, named, watched=backward == "watched")
        finally:  # a frame that an exception keeps must not keep the graph
            result = None
            sinks.clear()

    def _named(self) -> dict[str, torch.Tensor]:
        return {**named_parameters(self._built.model), **self._built.inputs}

    def _walked(self, sinks: list[torch.Tensor], named: dict[str, torch.Tensor]) -> AutogradGraph:
        graph = walk_graph(sinks, self._recording.later_writes())
        self._graphs.append(graph)
        lent = self._recorder.provenance.lent
        own = next((lent[id(leaf)] for leaf in graph.leaves if id(leaf) in lent), "")
        if own and self._workshop.mode == "structural":  # it goes on with a graph from before the run
            raise used_elsewhere(own)
        self._note_refusals(graph)
        self._note_unregistered(graph, named)
        return graph

    def _reached(self, graph: AutogradGraph, named: dict[str, torch.Tensor]) -> frozenset[str]:
        leaves = {id(tensor) for tensor in graph.leaves}
        known = self._recording.leaves
        return frozenset(name for name, tensor in named.items() if name in known and id(tensor) in leaves)

    def _frozen_meanwhile(self, run: Run, named: dict[str, torch.Tensor], reached: frozenset[str]) -> frozenset[str]:
        """Note the parameters that the call froze; return those that a gradient would reach: frozen is not blocked."""
        with torch._C.DisableTorchFunction():
            frozen = {name for name in run.parameters & self._recording.leaves.keys()
                      if not named[name].requires_grad and not named[name].is_inference()
                      and self._recorder.provenance.leaf_of(named[name]) is not None}  # fmt: skip
        frozen |= self._recording.used_frozen() & run.parameters
        run.froze = frozen - reached
        run.frozen |= run.froze
        self._recording.froze = frozenset(run.froze)
        return linked_sources(self._recording) & run.froze if run.froze else frozenset()

    def _take_in_own_passes(self) -> None:
        """Count what the call went backward to itself, where a hook on its result goes on with that (GradCache)."""
        if self._workshop.mode == "structural":
            raise CannotTell(
                "A hook on the result computes gradients: only its backward pass, run with numbers, shows which.",
                hint="Use --mode real.",
            )
        passes = self._recording.training.passes
        own = frozenset().union(*(linked_sources(replace(self._recording, sinks=each.values)) for each in passes))
        self._recording.reached |= own
        self._recording.by_hook = own

    def _note_by_hook(self, sources: frozenset[str]) -> None:
        self._recording.by_hook |= sources
        if sources:
            self._recording.unseen.append(
                f"{len(sources)} sources get their gradient from a hook of the backward pass, which computes it once "
                "more: whether a part of it is missing was not judged."
            )

    def _note_kept(self) -> None:
        """Note a state that the call began with, and that it leaves with a graph: what comes of it the next one shows.

        What detaches it before use, or uses it where nothing is recorded, gives out nothing that is connected.
        """
        values = self._recording.values
        named = {value.id: value.name for value in values if value.name and not value.connected}
        began: set[str] = set()
        for operation in self._recording.operations if named else ():
            if any(values[number].connected for number in operation.outputs):
                began.update(named[number] for number in operation.inputs if number in named)
        kept = kept_with_history(self._built.model) if began else set()
        for name in sorted(kept & began):
            self._recording.unseen.append(
                f"{name} is kept with its graph, and the next call goes on with it: a backward pass after that raises, "
                "since the one before freed this graph, unless it is detached or set back in between."
            )

    def _note_unregistered(self, graph: AutogradGraph, named: dict[str, torch.Tensor]) -> None:
        """Note what the gradient arrives at besides parameters and inputs, where the model keeps it unregistered."""
        known = {id(tensor) for tensor in named.values()}
        others = [leaf for leaf in graph.leaves if id(leaf) not in known]
        held = unregistered(self._built.model) if others else {}
        for leaf in others:
            if id(leaf) in held:
                name, tensor = held[id(leaf)]
                self._recording.unregistered[name] = self._recorder.value_ids([tensor])[0]
                self._recording.training.loose[name] = id(leaf)

    def _note_refusals(self, graph: AutogradGraph) -> None:
        """Write the graph's refusals on their operations; raise where only a kernel, which did not run, could tell."""
        for number, refusal in graph.refusals.items():
            operation = self._recording.operations[number]
            operation.refusal = refusal
            if self._workshop.mode == "structural" and refusal.rule == "GS502" and not refusal.raises:
                # Autograd's stand-in lets a kernel that is made of torch functions record itself.
                raise CannotTell(
                    f"{operation.name} has no autograd formula: only its kernel shows whether it gives a gradient.",
                    hint="Use --mode real.",
                )

    def _go_back(
        self,
        run: Run,
        sinks: list[torch.Tensor],
        graph: AutogradGraph,
        named: dict[str, torch.Tensor],
        *,
        watched: bool,
    ) -> None:
        """Run the backward pass where it can be run: with numbers; of custom functions, on devices that are there."""
        measured = self._workshop.mode == "real"
        if run.recording.hooks and not measured:
            run.recording.unseen.append("What hooks make of a gradient is seen only by computing (--mode real).")
        if not measured and not graph.custom:
            return
        if not self._workshop.goes_backward:
            _refuse_hidden(run)
            run.recording.unseen.append("What custom backward functions give is seen only by computing (--mode real).")
            return
        if measured and not all(bool(sink.isfinite().all()) for sink in sinks):
            run.recording.unseen.append(
                "The outputs are not finite with these inputs: what gradients are worth is unknown."
            )
            return
        keeps, hooked = self._recorder.provenance.has_foreign_graph, bool(run.recording.hooks)
        result = run_backward(
            sinks, graph, named, run.asked, watched=watched, measured=measured, keeps_graph=keeps, hooked=hooked
        )
        if result.error is not None and not measured and not isinstance(result.error, NotImplementedError):
            _refuse_hidden(run)
            run.recording.unseen.append("The backward pass could not be followed without numbers (--mode real).")
            return
        if result.error is not None and _is_of_the_machine(result.error):
            said = in_words(result.error)
            run.recording.unseen.append(f"Gradients were not measured, since the backward pass ended with {said}")
            return
        if run.recording.training.judged and result.error is not None and FREED in str(result.error):
            run.recording.unseen.append(
                "The target goes backward itself, which frees the graph: what gradients are worth was not measured."
            )
            return
        run.gradients, run.measured, run.troubled = result.gradients, measured, result.troubled
        run.recording.losses = result.losses
        run.recording.link_nested(result.nested)
        if hooked and not graph.custom:
            self._note_by_hook(result.nested)
        if result.error is not None:
            run.recording.backward_error = f"{type(result.error).__name__}: {result.error}"


def _refuse_hidden(run: Run) -> None:
    """Raise where only a backward pass that cannot be run tells: a custom function uses what it was not given."""
    recording = run.recording
    sources = {number for name, number in recording.leaves.items() if name in run.asked - recording.reached}
    for operation in recording.operations:
        if operation.given is not None and sources.intersection(operation.inputs[operation.given :]):
            raise CannotTell(
                f"{operation.name} uses parameters that it is not given: only its backward pass, run with numbers, "
                "shows whether they get a gradient.",
                hint="Use --mode real.",
            )


def _is_of_the_machine(error: Exception) -> bool:
    """Tell an exception that says nothing of the model: no memory left, no time left."""
    short = (MemoryError, TimeoutError, torch.OutOfMemoryError)
    return isinstance(error, short) or any(words in str(error) for words in NO_MEMORY)
