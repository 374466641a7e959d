"""Run a subject once under observation: build, call, and read off what autograd reached."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gradscope.errors import UsageError, in_words
from gradscope.findings import Gradient
from gradscope.stages import tell
from gradscope.tracing.autograd import AutogradGraph, walk_graph
from gradscope.tracing.backward import run_backward
from gradscope.tracing.dispatched import DispatchedCalls
from gradscope.tracing.instrument import observe
from gradscope.tracing.propagation import linked_sources, where_it_left
from gradscope.tracing.provenance import KINDS, left_torch, results_in, tensors_in
from gradscope.tracing.recorder import Recorder, nothing_written
from gradscope.tracing.recording import Recording, Site
from gradscope.tracing.restoring import (
    OWN,
    attributes_of,
    hushed,
    modules_of,
    put_back,
    tensors_of,
    unhurried_collector,
    untouched_state,
)
from gradscope.tracing.subject import Built, Caller, Subject, Workshop
from gradscope.tracing.unanalysed import CannotTell

# It logs a traceback for every call that it refuses; the refusal is reported.
FAKE_TENSORS = "torch._subclasses.fake_tensor"

Pass: TypeAlias = Literal["none", "plain", "watched"]


@dataclass(slots=True)
class Run:
    """One recorded run and what stayed of its model: names of sources, which are frozen, which are asked about.

    ``gradients`` has the sources that a backward pass was made for and their graph reaches (None: nothing arrived);
    ``troubled`` says that a watched pass has more to tell. ``strangers`` and ``guesses`` count tensors of no known
    origin and modules taken as one; ``dispatched`` runs looked closer.
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


class Runner:
    """Runs a subject again and again, with more and more sites neutralised."""

    def __init__(self, subject: Subject, workshop: Workshop) -> None:
        self.subject = subject
        self.workshop = workshop
        self._prepared: nn.Module | None = None
        self._runs = 0

    def run(
        self,
        neutralised: frozenset[Site] = frozenset(),
        *,
        backward: Pass = "none",
        as_given: bool = False,
        dispatched: bool = False,
    ) -> Run:
        """Build the model, make the call, and return what was seen.

        Every run builds its model anew around the prepared parts, so that no run can leave an
        inference tensor in a cache for the next; a borrowed model is given back as it was.
        Switches neutralised: see ``instrument``. ``as_given``: what is not asked about requires no gradient, as in
        the user's own run; else everything does, so that every source can be told about. ``dispatched``: see also
        what no torch function shows.
        """
        self._runs += 1
        tell(f"run {self._runs}" + (", to verify the fix" if neutralised else ", a closer look" if dispatched else ""))
        with (
            hushed(FAKE_TENSORS) if self.workshop.mode == "structural" else nullcontext(),
            untouched_state(),
            unhurried_collector(),
            put_back(self.subject.given),
            torch.compiler.set_stance("force_eager"),
        ):
            origin = self._prepare()
            lent = (
                self.workshop.lent(origin, self.subject.given)
                if self.subject.borrowed
                else nullcontext(nothing_written)
            )
            with lent as before_write:
                call = _absorbing(self.workshop.run, self.subject.absorbed)
                recorder = Recorder(call, neutralised, before_write)
                with ExitStack() as stack:
                    stack.enter_context(observe(recorder, neutralised))
                    stack.enter_context(torch.enable_grad())
                    stack.enter_context(recorder.in_thread())
                    if dispatched:
                        stack.enter_context(DispatchedCalls(recorder))
                    run = self._record(recorder, origin, backward, as_given)
                    run.dispatched = dispatched
                    return run

    def _record(self, recorder: Recorder, origin: nn.Module, backward: Pass, as_given: bool) -> Run:
        named = dict(origin.named_parameters())
        recorder.add_leaves(named, outside=True)
        with recorder.constructing():
            built = self.subject.build(self.workshop, origin)
        recorder.provenance.strangers = 0
        if built.model is not origin:
            named = dict(built.model.named_parameters())
        with torch._C.DisableTorchFunction():
            frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
        asked = self.subject.asked_for([*named, *built.inputs], set(named), frozen, built.wanted)
        sources = {name: tensor for name, tensor in {**named, **built.inputs}.items() if name in asked or not as_given}
        for name in sources.keys() & built.inputs.keys():
            built.inputs[name].requires_grad_(True)
        recorder.add_leaves(sources)
        recorder.forget_outside(named.values())
        run = Run(recorder.recording, frozen, set(named), asked)
        for constant, name in constants_of(built.model):
            recorder.add_constant(constant, name)
        recorder.modules.name(built.model)
        with _requiring_grad(named, sources):
            self._call(recorder, built, run, backward)
        run.strangers, run.guesses = recorder.provenance.strangers, recorder.modules.guesses
        if run.strangers:
            recorder.recording.unseen.append(
                f"{recorder.provenance.strangers} tensors came from where no torch function looks "
                "(a kernel, another library): what they were made of is not known."
            )
        return run

    def _prepare(self) -> nn.Module:
        if self._prepared is None:
            self._prepared = self.subject.prepare(self.workshop)
            if any(map(is_lazy, tensors_of(self._prepared, ("_parameters",)))):
                raise UsageError(
                    f"{self.subject.name} has lazy parameters, whose shapes its first call settles.",
                    hint="Call it once before it is traced; a trace leaves the model as it is.",
                )
            if any(map(_is_sharded, modules_of(self._prepared))):
                raise UsageError(
                    f"{self.subject.name} is sharded by FSDP, which keeps weights where a trace cannot put them back.",
                    hint="Trace the model before it is sharded: that changes nothing about where gradients flow.",
                )
        return self._prepared

    def _call(self, recorder: Recorder, built: Built, run: Run, backward: Pass) -> None:
        recording = recorder.recording
        try:
            result = built.call()
            recording.left_open = recorder.open_regions
            if self.subject.loss is not None:
                result = self.subject.loss(result)
        except (Exception, SystemExit) as error:  # the target's own: the tracer judges whether autograd is its cause
            recording.error = error
            if recording.pending is not None:  # what was computed up to there is still worth showing
                recording.sinks = recording.pending.inputs
            return
        finally:
            recorder.forward_is_over()
        sinks = [tensor for tensor in results_in(result) if tensor.is_floating_point() or tensor.is_complex()]
        if not sinks and left_torch(result):
            recording.left, recording.sinks = where_it_left(recording)
            recording.reached = linked_sources(recording)
            return
        recording.sinks = recorder.value_ids(sinks)
        graph = walk_graph(sinks, recording.later_writes())
        leaves = {id(tensor) for tensor in graph.leaves}
        named = {**dict(built.model.named_parameters(remove_duplicate=False)), **built.inputs}
        recording.reached = frozenset(
            name for name, tensor in named.items() if name in recording.leaves and id(tensor) in leaves
        )
        recording.walked = True
        self._note_refusals(recording, graph)
        if backward != "none":
            self._go_back(run, sinks, graph, named, watched=backward == "watched")

    def _note_refusals(self, recording: Recording, graph: AutogradGraph) -> None:
        """Write the graph's refusals on their operations; raise where only a kernel, which did not run, could tell."""
        for number, refusal in graph.refusals.items():
            operation = recording.operations[number]
            operation.refusal = refusal
            if self.workshop.mode == "structural" and refusal.rule == "GS502" and not refusal.raises:
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
        """Run the backward pass where it can be run: with numbers, or on a pretended CPU for custom functions."""
        measured = self.workshop.mode == "real"
        if run.recording.hooks and not measured:
            run.recording.unseen.append("What hooks make of a gradient is seen only by computing (--mode real).")
        if not measured and not graph.custom:
            return
        if not measured and self.workshop.device.type != "cpu":
            _refuse_hidden(run)
            run.recording.unseen.append("What custom backward functions give is seen only by computing (--mode real).")
            return
        if measured and not all(bool(sink.isfinite().all()) for sink in sinks):
            run.recording.unseen.append(
                "The outputs are not finite with these inputs: what gradients are worth is unknown."
            )
            return
        result = run_backward(sinks, graph, named, run.asked, watched=watched, measured=measured)
        if result.error is not None and not measured and not isinstance(result.error, NotImplementedError):
            _refuse_hidden(run)
            run.recording.unseen.append("The backward pass could not be followed without numbers (--mode real).")
            return
        if result.error is not None and _is_of_the_machine(result.error):
            said = in_words(result.error)
            run.recording.unseen.append(f"Gradients were not measured, since the backward pass ended with {said}")
            return
        run.gradients, run.measured, run.troubled = result.gradients, measured, result.troubled
        run.recording.losses = result.losses
        run.recording.link_nested(result.nested)
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


def _is_sharded(module: nn.Module) -> bool:
    """Tell a module that FSDP manages, of the first kind or the second (``fully_shard``)."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a heavy import, and without it there is none
    kinds = (getattr(fsdp, name, None) for name in ("FullyShardedDataParallel", "FSDPModule"))
    return isinstance(module, tuple(kind for kind in kinds if kind is not None))


def _is_of_the_machine(error: Exception) -> bool:
    """Tell an exception that says nothing of the model: no memory left, no time left."""
    short = (MemoryError, TimeoutError, torch.OutOfMemoryError)
    return isinstance(error, short) or "can't allocate memory" in str(error)


def constants_of(model: nn.Module) -> Iterator[tuple[torch.Tensor, str]]:
    """Yield the tensors that a model holds besides its parameters: buffers (no name), and attributes by name."""
    for buffer in tensors_of(model, ("_buffers",)):
        yield buffer, ""
    for attributes in attributes_of(model):
        for name, value in attributes.items():
            if name not in OWN and KINDS[type(value)] and not name.startswith("_"):
                for tensor in tensors_in([value]):
                    yield tensor, name


@contextmanager
def _requiring_grad(named: dict[str, nn.Parameter], sources: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let the floating parameters among the sources require a gradient, no others, and put the flags back afterwards.

    Frozen is not blocked: a frozen parameter's status is what it would be if it were trained.
    """
    with torch._C.DisableTorchFunction():  # these are no calls of the run
        flags = [(each, each.requires_grad) for each in named.values() if each.is_floating_point()]
        wanted = [(each, name in sources) for name, each in named.items() if each.is_floating_point()]
    try:
        _set_flags(wanted)
        yield
    finally:
        _set_flags(flags)


def _set_flags(flags: list[tuple[nn.Parameter, bool]]) -> None:
    """Set ``requires_grad`` where it can be set: a parameter made under inference_mode stays as it was made."""
    with torch._C.DisableTorchFunction():
        for parameter, flag in flags:
            if parameter.requires_grad != flag and not parameter.is_inference():
                parameter.requires_grad_(flag)


def _absorbing(run: Caller, absorbed: frozenset[str]) -> Caller:
    """Return a caller of torch functions for which the absorbed methods give back their tensor."""

    def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(func, "__name__", "") in absorbed:
            return args[0]
        return run(func, args, kwargs)

    return call if absorbed else run
