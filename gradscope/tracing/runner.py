"""Run a subject once under observation: build it, call it, and have read off what came of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gradscope.errors import UsageError
from gradscope.stages import tell
from gradscope.tracing.autograd import AutogradGraph
from gradscope.tracing.constants import constants_of, constants_of_loss
from gradscope.tracing.contents import DIFFERENTIABLE, describe, results_in
from gradscope.tracing.dispatched import DispatchedCalls
from gradscope.tracing.holding import Holder, holder_of_loss
from gradscope.tracing.instrument import observe
from gradscope.tracing.inventory import Inventory, named_parameters
from gradscope.tracing.outcome import Outcome, Pass, Run
from gradscope.tracing.recorder import Recorder, nothing_written
from gradscope.tracing.recording import Site
from gradscope.tracing.restoring import (
    hushed,
    kept,
    put_back,
    unhurried_collector,
    untouched_state,
)
from gradscope.tracing.subject import Built, Caller, Subject, Workshop
from gradscope.tracing.unanalysed import CannotTell, used_elsewhere

# It logs a traceback for every call that it refuses; the refusal is reported.
FAKE_TENSORS = "torch._subclasses.fake_tensor"


class Runner:
    """Runs a subject again and again, with more and more sites neutralised."""

    def __init__(self, subject: Subject, workshop: Workshop) -> None:
        self.subject = subject
        self.workshop = workshop
        self._prepared: nn.Module | None = None
        self._loss = holder_of_loss(subject.loss)
        self._graphs: list[AutogradGraph] = []
        self._own: dict[str, nn.Parameter] = {}
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
            self._releasing(),
            hushed(FAKE_TENSORS) if self.workshop.mode == "structural" else nullcontext(),
            untouched_state(),
            unhurried_collector(),
            put_back(self.subject.given),
            torch.compiler.set_stance("force_eager"),
        ):
            held = self._prepare()
            self._own = named_parameters(held.model)
            with self._lent(held) as before_write, self._loss_kept(before_write) as before_write:
                call = _absorbing(self.workshop.run, self.subject.absorbed)
                recorder = Recorder(call, neutralised, before_write)
                with ExitStack() as stack:
                    stack.enter_context(observe(recorder, neutralised))
                    stack.enter_context(torch.enable_grad())
                    stack.enter_context(recorder.in_thread())
                    if dispatched:
                        stack.enter_context(DispatchedCalls(recorder))
                    run = self._record(recorder, held, backward, as_given)
                    run.dispatched = dispatched
                    return run

    def _record(self, recorder: Recorder, held: Inventory, backward: Pass, as_given: bool) -> Run:
        named = parameters_of(held.model)
        recorder.provenance.lent = {id(self._own[name]): name for name in named if self._own[name] is not named[name]}
        recorder.provenance.add_leaves(named, outside=True)
        with recorder.constructing():
            built = self.subject.build(self.workshop, held.model)
        recorder.provenance.strangers = 0
        is_built_anew = built.model is not held.model
        if is_built_anew:
            named, held = parameters_of(built.model), Inventory(built.model)
        with torch._C.DisableTorchFunction():
            frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
        asked = self.subject.asked_for([*named, *built.inputs], set(named), frozen, built.wanted)
        sources = {name: tensor for name, tensor in {**named, **built.inputs}.items() if name in asked or not as_given}
        for name in sources.keys() & built.inputs.keys():
            built.inputs[name].requires_grad_(True)
        leaves, outside = recorder.recording.leaves, recorder.recording.outside
        if is_built_anew:
            recorder.provenance.add_leaves(sources)
            recorder.provenance.forget_outside(named.values())
        else:  # all of them are its own, and known
            leaves.update({name: outside[name] for name in named if name in sources})
            recorder.provenance.add_leaves({name: tensor for name, tensor in sources.items() if name not in named})
            outside.clear()
        run = Run(recorder.recording, frozen, set(named), asked)
        recorder.provenance.add_constants(constants_of(held))
        if self._loss is not None:
            recorder.provenance.add_constants(constants_of_loss(self._loss))
        recorder.replays.held = lambda: Inventory(built.model).loose_tensors()  # as they are then
        recorder.replays.computes = self.workshop.mode == "real"
        recorder.modules.names = held.names
        with _requiring_grad(named, sources):
            self._call(recorder, built, run, backward)
        self._refuse_lent(recorder)
        self._note_unheld(run, named)
        if not (self.subject.wrt or self.subject.trainable):
            self._ask_less(run, named)
        run.strangers, run.guesses = recorder.provenance.strangers, recorder.modules.guesses
        if run.strangers:
            recorder.recording.unseen.append(
                f"{run.strangers} tensor{'s' * (run.strangers > 1)} came from where no torch function looks (a kernel, "
                "another library): what made them is not known."
            )
        return run

    def _note_unheld(self, run: Run, named: dict[str, nn.Parameter]) -> None:
        """Note the sources that a step of training goes backward to and that its optimizers do not hold.

        One that was made before the run holds the caller's own parameters, one made in it those of the run.
        """
        training = run.recording.training
        for name in [name for name, leaf in training.loose.items() if leaf in training.held]:
            del run.recording.unregistered[name]  # its optimizer has it
        if training.held and training.judged:
            reached = (run.asked & run.recording.reached - run.frozen) & self._own.keys()
            training.unheld = sorted(
                name for name in reached if training.held.isdisjoint((id(self._own[name]), id(named[name])))
            )

    def _ask_less(self, run: Run, named: dict[str, nn.Parameter]) -> None:
        """Ask about what the call trains: nothing that it has frozen, and in a step what the optimizers there hold."""
        run.asked = run.asked - run.froze or run.asked
        training = run.recording.training
        if training.held and training.judged and run.recording.error is None:
            held = {name for name in run.asked & self._own.keys()
                    if not training.held.isdisjoint((id(self._own[name]), id(named[name])))}  # fmt: skip
            run.unasked = set(run.asked & self._own.keys()) - held if held else set()
            run.asked -= run.unasked

    def _refuse_lent(self, recorder: Recorder) -> None:
        """Raise where the run used a parameter, or what was made of it before, that the model keeps elsewhere as well.

        There it is still the caller's own, and what comes of it does not lead to the one that the run has in its place.
        """
        name = recorder.provenance.lent_in_use()
        if name and self.workshop.mode == "structural":
            raise used_elsewhere(name)
        if name:
            recorder.recording.unseen.append(
                f"The result uses {name}, or what was made of it before the run, from where it is not registered: "
                "a gradient that arrives there was not seen."
            )

    @contextmanager
    def _releasing(self) -> Iterator[None]:
        """Free the graphs that were walked, after all else that holds a part of them."""
        try:
            yield
        finally:
            while self._graphs:
                self._graphs.pop().release()

    def _lent(self, origin: Inventory) -> AbstractContextManager[Callable[[torch.Tensor], None]]:
        if self.subject.borrowed:
            return self.workshop.lent(origin, self.subject.given)
        return nullcontext(nothing_written)

    @contextmanager
    def _loss_kept(self, before_write: Callable[[torch.Tensor], None]) -> Iterator[Callable[[torch.Tensor], None]]:
        """Keep what the loss holds as it is, too."""
        if self._loss is None:
            yield before_write
            return
        with kept(Inventory(self._loss)) as before_write_of_loss:

            def before_both(tensor: torch.Tensor) -> None:
                before_write(tensor)
                before_write_of_loss(tensor)

            yield before_both

    def _prepare(self) -> Inventory:
        if self._prepared is not None:
            return Inventory(self._prepared)
        self._prepared = self.subject.prepare(self.workshop)
        held = Inventory(self._prepared)
        one_of_each = {type(each): each for each in held.tensors(("_parameters",))}.values()
        if any(map(is_lazy, one_of_each)):
            raise UsageError(
                f"{self.subject.name} has lazy parameters, whose shapes its first call settles.",
                hint="Call it once before it is traced; a trace leaves the model as it is.",
            )
        if _is_sharded(held.modules):
            raise UsageError(
                f"{self.subject.name} is sharded by FSDP, which keeps weights where a trace cannot put them back.",
                hint="Trace the model before it is sharded: that changes nothing about where gradients flow.",
            )
        if self.workshop.mode == "real" and any(map(_learns_its_graph, held.modules)):
            raise UsageError(
                f"{self.subject.name} has a static graph, which its first backward pass tells it: one of a trace would "
                "be taken for that.",
                hint="Trace the model before it is wrapped, after its first step, or in structural mode.",
            )
        return held

    def _call(self, recorder: Recorder, built: Built, run: Run, backward: Pass) -> None:
        recording = recorder.recording
        outcome = Outcome(recorder, self.workshop, built, self._graphs)
        if self.subject.loss is None and (self.subject.entry != "forward" or isinstance(built.model, Holder)):
            recorder.look_ahead = outcome.look_ahead
        try:
            result = built.call()
            recording.left_open = recorder.open_regions
            if self.subject.loss is not None:
                recording.loss_takes = ", ".join(map(describe, results_in(result))) or type(result).__name__
                result = self.subject.loss(result)
        except CannotTell:
            raise
        except (Exception, SystemExit) as error:  # the target's own: the tracer judges whether autograd is its cause
            recording.error = error
            if recording.pending is not None:  # what was computed up to there is still worth showing
                recording.sinks = recording.pending.inputs
            return
        finally:
            recorder.forward_is_over()
        try:
            outcome.read(result, run, backward)
        finally:  # a frame that an exception keeps must not keep the graph
            result = None


def _is_sharded(modules: list[nn.Module]) -> bool:
    """Tell whether FSDP manages one of these modules, of the first kind or the second (``fully_shard``)."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a heavy import, and without it there is none
    kinds = (getattr(fsdp, name, None) for name in ("FullyShardedDataParallel", "FSDPModule"))
    sharded = tuple(kind for kind in kinds if kind is not None)
    return any(isinstance(module, sharded) for module in modules)


def _learns_its_graph(module: nn.Module) -> bool:
    """Tell a ``DistributedDataParallel(..., static_graph=True)`` before its first backward pass."""
    return (
        isinstance(module, nn.parallel.DistributedDataParallel)
        and module.static_graph
        and not module._static_graph_delay_allreduce_enqueued
    )


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that may have a gradient: a quantised weight is kept as one, too."""
    each_once: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in named_parameters(model).items():
        each_once.setdefault(id(parameter), (name, parameter))
    with torch._C.DisableTorchFunction():
        return {name: each for name, each in each_once.values() if each.dtype in DIFFERENTIABLE}


@contextmanager
def _requiring_grad(named: dict[str, nn.Parameter], sources: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let the floating parameters among the sources require a gradient, no others, and put the flags back afterwards.

    Frozen is not blocked: a frozen parameter's status is what it would be if it were trained.
    """
    with torch._C.DisableTorchFunction():  # these are no calls of the run
        floating = {name: each for name, each in named.items() if each.is_floating_point()}
        flags = [(each, each.requires_grad) for each in floating.values()]
    wanted = [(each, name in sources) for name, each in floating.items()]
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
