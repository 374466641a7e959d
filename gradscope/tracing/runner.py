"""Run a subject once under observation: build, call, and read off what autograd reached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradscope.tracing.autograd import reached_leaves
from gradscope.tracing.instrument import observe
from gradscope.tracing.propagation import linked_sources, where_it_left
from gradscope.tracing.provenance import left_torch, results_in, tensors_in
from gradscope.tracing.recorder import Recorder, nothing_written
from gradscope.tracing.recording import Recording, Site
from gradscope.tracing.restoring import attributes_of, put_back, untouched_state
from gradscope.tracing.subject import Built, Caller, Subject, Workshop


@dataclass(slots=True)
class Run:
    """One recorded run and what stayed of its model: names of sources, which are frozen, which inputs are asked for."""

    recording: Recording
    frozen: set[str]
    parameters: set[str]
    wanted: frozenset[str] = frozenset()


class Runner:
    """Runs a subject again and again, with more and more sites neutralised."""

    def __init__(self, subject: Subject, workshop: Workshop) -> None:
        self.subject = subject
        self.workshop = workshop
        self._prepared: nn.Module | None = None

    def run(self, neutralised: frozenset[Site] = frozenset()) -> Run:
        """Build the model, make the call, and return what was seen.

        Every run builds its model anew around the prepared parts, so that no run can leave an
        inference tensor in a cache for the next; a borrowed model is given back as it was.
        Switches neutralised: see ``instrument``.
        """
        with untouched_state(), put_back(self.subject.given), torch.compiler.set_stance("force_eager"):
            origin = self._prepare()
            lent = self.workshop.lent(origin) if self.subject.borrowed else nullcontext(nothing_written)
            with lent as before_write:
                call = _absorbing(self.workshop.run, self.subject.absorbed)
                recorder = Recorder(call, neutralised, before_write)
                with observe(recorder, neutralised), torch.enable_grad(), recorder:
                    return self._record(recorder, origin)

    def _record(self, recorder: Recorder, origin: nn.Module) -> Run:
        for name, parameter in origin.named_parameters():
            recorder.add_leaf(name, parameter, outside=True)
        with recorder.constructing():
            built = self.subject.build(self.workshop, origin)
        recorder.provenance.strangers = 0
        frozen, parameters = _name_leaves(recorder, built)
        for constant in constants_of(built.model):
            recorder.add_constant(constant)
        recorder.name_modules(built.model)
        with _unfrozen(built.model):
            self._call(recorder, built)
        if recorder.provenance.strangers:
            recorder.recording.unseen.append(
                f"{recorder.provenance.strangers} tensors came from where no torch function looks "
                "(a kernel, another library): what they were made of is not known."
            )
        return Run(recorder.recording, frozen, parameters, built.wanted)

    def _prepare(self) -> nn.Module:
        if self._prepared is None:
            self._prepared = self.subject.prepare(self.workshop)
        return self._prepared

    def _call(self, recorder: Recorder, built: Built) -> None:
        recording = recorder.recording
        try:
            result = built.call()
            if self.subject.loss is not None:
                result = self.subject.loss(result)
        except Exception as error:  # the target's own: the tracer judges whether autograd is its cause
            recording.error = error
            return
        sinks = [tensor for tensor in results_in(result) if tensor.is_floating_point() or tensor.is_complex()]
        if not sinks and left_torch(result):
            recording.left, recording.sinks = where_it_left(recording)
            recording.reached = linked_sources(recording)
            return
        recording.sinks = recorder.value_ids(sinks)
        leaves = {id(tensor) for tensor in reached_leaves(sinks)}
        named = {**dict(built.model.named_parameters(remove_duplicate=False)), **built.inputs}
        recording.reached = frozenset(name for name, tensor in named.items() if id(tensor) in leaves)


def constants_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors that a model holds besides its parameters: buffers, and plain attributes."""
    yield from model.buffers()
    for attributes in attributes_of(model):
        yield from tensors_in([value for name, value in attributes.items() if not name.startswith("_")])


def _name_leaves(recorder: Recorder, built: Built) -> tuple[set[str], set[str]]:
    """Make the model's parameters and its wanted inputs the sources of the run."""
    frozen: set[str] = set()
    parameters: set[str] = set()
    for name, parameter in built.model.named_parameters():
        recorder.add_leaf(name, parameter)
        parameters.add(name)
        if not parameter.requires_grad:
            frozen.add(name)
    for name, tensor in built.inputs.items():
        tensor.requires_grad_(True)
        recorder.add_leaf(name, tensor)
    own = {value for value in recorder.recording.leaves.values()}
    outside = recorder.recording.outside
    for name in [name for name, value in outside.items() if value in own]:
        del outside[name]
    return frozen, parameters


@contextmanager
def _unfrozen(model: nn.Module) -> Iterator[None]:
    """Let every floating parameter require a gradient, and put the flags back afterwards.

    Frozen is not blocked: a frozen parameter's status is what it would be if it were trained.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def _absorbing(run: Caller, absorbed: frozenset[str]) -> Caller:
    """Return a caller of torch functions for which the absorbed methods give back their tensor."""

    def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(func, "__name__", "") in absorbed:
            return args[0]
        return run(func, args, kwargs)

    return call if absorbed else run
