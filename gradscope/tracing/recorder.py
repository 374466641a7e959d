"""Record one forward pass: every torch call, what it took in and gave out, and where.

The recorder is a ``TorchFunctionMode`` and the observer of ``instrument.observe``. Nothing is inserted
into the graph under test.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gradscope.tracing.autograd import unwatched
from gradscope.tracing.calls import (
    DERIVES,
    MAKES_ROOM,
    MAY_BE_REFUSED,
    MENDABLE,
    NOTED,
    ROUNDING,
    SETS_FLAG,
    SHAPE_ONLY,
    SHARES_MEMORY,
    asks_to_write,
    instead_of,
    made_by,
    mutated,
    operation_name,
    overwrites,
    with_graph,
    writes,
)
from gradscope.tracing.consequences import Consequences
from gradscope.tracing.contents import DIFFERENTIABLE, hidden_tensors, tensors_in
from gradscope.tracing.control_flow import meaning_of
from gradscope.tracing.frames import Places, call_chain, source_site, user_place
from gradscope.tracing.module_calls import ModuleCalls
from gradscope.tracing.operations import Operations
from gradscope.tracing.provenance import Provenance
from gradscope.tracing.recording import CONSTRUCTOR, BackwardPass, Place, Recording, Region, Site
from gradscope.tracing.replays import Replays
from gradscope.tracing.scopes import OpenScopes, Threads
from gradscope.tracing.shortcuts import CLOSER, SHORTCUTS
from gradscope.tracing.subject import Caller

# What tells, of tensors that the target is about to go backward from, the leaves and the sources that it will reach.
LookAhead: TypeAlias = Callable[[list[torch.Tensor]], tuple[list[torch.Tensor], frozenset[str]]]


def nothing_written(tensor: torch.Tensor) -> None:
    """Take no notice of a tensor that is about to change in place."""


class Recorder(TorchFunctionMode):
    """See every torch call while active; the result is :attr:`recording`.

    ``run`` is called for each torch function (structural mode runs it on a pretended device),
    ``before_write`` for every tensor that is about to change in place. Single calls at the ``neutralised``
    sites give back their input, or are made in the way that keeps the gradient.
    """

    def __init__(
        self,
        run: Caller,
        neutralised: frozenset[Site] = frozenset(),
        before_write: Callable[[torch.Tensor], None] = nothing_written,
    ) -> None:
        super().__init__()
        self.recording = Recording()
        self.provenance = Provenance(self.recording)
        self.consequences = Consequences(self.recording, self.provenance)
        self.replays = Replays(self.recording, self.provenance)
        self.modules = ModuleCalls(self.recording, self.provenance)
        self._run = run
        self._before_write = before_write
        self.look_ahead: LookAhead | None = None
        self._cuts_removed = bool(neutralised)
        self._neutralised = frozenset(site for site in neutralised if site.mechanism in MENDABLE)
        self._threads = Threads(self.recording)
        self._operations = Operations(self.recording, self.provenance, self._threads)
        self._places = Places()
        self._over = False
        self._looks_closer = bool(self._neutralised)

    @property
    def _here(self) -> OpenScopes:
        return self._threads.here

    @property
    def is_here(self) -> bool:
        """Whether what the present thread does belongs to the run."""
        return self._here.watched > 0

    @property
    def is_watching(self) -> bool:
        """Whether it is to be recorded, too: the backward pass is not."""
        return self._here.watched > 0 and not self._over

    @contextmanager
    def in_thread(self) -> Iterator[None]:
        """Record what the present thread does in the block."""
        self._here.watched += 1
        try:
            with self:
                yield
        finally:
            self._here.watched -= 1

    def forward_is_over(self) -> None:
        """Record nothing from now on; what is written in place is still told."""
        self.replays.forward_is_over()
        self._over = self._looks_closer = True

    # --- torch calls ------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            name = SHORTCUTS[func]
        except TypeError:  # not hashable
            name = CLOSER
        if name is None:  # shape, dtype, device: nine calls of ten
            return func(*args, **kwargs)
        if types and not self._over:
            answer = self._answer(func, types, args, kwargs)
            if answer is not NotImplemented:
                return answer
        frame, here = sys._getframe(1), self._threads.here
        if name is CLOSER or self._looks_closer or (kwargs and asks_to_write(name, kwargs)):
            return self._look_closer(func, args, kwargs, frame, here)
        given = (*args, *kwargs.values()) if kwargs else args
        pending = self._operations.start(name, given, self._places.of(frame), here)
        here.calls += 1
        try:
            result = self._run(func, args, kwargs)
        finally:
            here.calls -= 1
        self._operations.finish(pending, result, here)
        return result

    def _answer(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let objects that hold tensors and are none answer a call: what they call for that is what is recorded."""
        for kind in types:
            if not issubclass(kind, torch.Tensor):
                with self:
                    answer = kind.__torch_function__(func, types, args, kwargs)
                if answer is not NotImplemented:
                    return answer
        return NotImplemented

    def _look_closer(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType, here: OpenScopes
    ) -> Any:
        """Record a call that may write, leave torch, be refused or be taken away."""
        name = operation_name(func)
        if name is None:
            return self._pass(func, args, kwargs, frame)
        if kwargs.get("rounding_mode") and name in ROUNDING:
            name = "floor_divide"
        place = self._places.of(frame) if self._neutralised or not self._over else None
        if self._neutralised and self._is_taken_away(func, name, place):
            if name != DERIVES:
                given = instead_of(name, args)
                self.provenance.value_of(given)  # known from here on, lest the module be taken as one operation
                return given
            kwargs = with_graph(kwargs)
        in_place = writes(name, args, kwargs) or mutated(func, args, kwargs)
        if in_place or name in SHARES_MEMORY:
            self._keep(name, args, in_place)
        if self._over:  # the backward pass: what a checkpoint computes again must not stay in the model either
            return self._run(func, args, kwargs)
        if name == "backward":
            return self._go_back(func, args, kwargs, place)
        pending = self._operations.begin(name, args, kwargs, place, frame)
        if self._cuts_removed and name in SHARES_MEMORY and args[0].requires_grad:
            args = (args[0].detach(), *args[1:])  # with a gradient it would raise; the way out is known by now
        here.calls += 1
        try:
            result = self._run(func, args, kwargs)
        finally:
            here.calls -= 1
        self._operations.finish(pending, made_by(name, args, result, in_place), here)
        if in_place or name in NOTED:
            self.consequences.note(pending, args, kwargs, result, in_place)
        return result

    def _keep(self, name: str, args: tuple[Any, ...], written: list[torch.Tensor]) -> None:
        """Keep what is about to change in place, or may be changed by whoever is handed its memory."""
        for tensor in written or args[:1]:
            self._before_write(tensor)
        if written and overwrites(name, args):
            self.provenance.overwritten(args[0])

    def _is_taken_away(self, func: Any, name: str, place: Place | None) -> bool:
        """Tell whether a call is at a neutralised site; of an operator out of a script function it is too late."""
        return self._is_neutralised(place, name) and not isinstance(func, torch._ops.OpOverload)

    def _pass(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> Any:
        """Run a call that moves no numbers itself; a tensor that it makes is new and known."""
        meaning = meaning_of(func)
        if meaning is not None:
            with self:  # what a branch calls is recorded as if it stood in its place
                return meaning(*args, **kwargs)
        name = func.__name__
        if name in MAKES_ROOM:
            return self.consequences.room(name, self._run(func, args, kwargs))
        if name == "data_ptr":
            self._before_write(args[0])
            if not self._over:
                self.provenance.exposed(args[0], user_place(frame))
            return self._run(func, args, kwargs)
        if self._over or name not in MAY_BE_REFUSED:
            return func(*args, **kwargs)  # asks the tensor itself: no mode of the run is needed for that
        if name == "register_hook":
            self.consequences.hook(args[0], user_place(frame))
        self._operations.begin(name, args[:1], {}, user_place(frame), frame)
        result = func(*args, **kwargs)
        self.recording.pending = None
        if name in SETS_FLAG:
            self.consequences.flag(args[0])
        return result

    def _go_back(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], place: Place | None) -> Any:
        """Let the target go backward itself; from what is told before, and the gradients are known after."""
        leaves, reached = self.look_ahead(tensors_in(args[:1])) if self.look_ahead is not None else ([], None)
        pending = self._operations.begin("backward", args[:1], {}, place, sys._getframe(1))
        result = self._run(func, args, kwargs)
        self.recording.training.passes.append(BackwardPass(len(self.recording.operations), pending.inputs, reached))
        self.recording.pending = None
        self.provenance.add_constants([(leaf.grad, "") for leaf in leaves if leaf.grad is not None])
        return result

    @property
    def is_in_function(self) -> bool:
        """Whether a custom function that is being recorded runs in the present thread."""
        return self._here.functions > 0

    def custom_function(
        self, name: str, args: tuple[Any, ...], call: Callable[..., Any], apply: Callable[..., Any]
    ) -> Any:
        """Record one ``autograd.Function.apply`` as a single operation.

        What ran inside is the function's own business: its gradient is its backward. What it took in from outside
        without being given it (the parameters of a reversible block), or in a list, is an input that is not linked.
        """
        place = user_place(sys._getframe(2))
        if name == "CheckpointFunction":
            self.recording.reentrant = True
            if self._runs_through(args, place):
                result = args[0](*args[2:])  # (run_function, preserve_rng_state, *inputs)
                if not hidden_tensors(result) or self._is_neutralised(place, name):
                    return result
        if name == "BackwardHookFunction":  # torch's way of running a module's full backward hooks
            place = self._here.place_of_hook() or place
        with torch._C.DisableTorchFunction():
            pending = self._operations.begin(name, args, {}, place, sys._getframe(1))
            given = dict.fromkeys(self.provenance.value_of(each) for each in args if isinstance(each, torch.Tensor))
        pending.custom, pending.given = True, len(given)
        before = len(self.recording.values)
        self._here.functions += 1
        try:
            result = call(*args)
        except Exception as error:
            self.recording.came_through(name, error)
            raise
        finally:
            self._here.functions -= 1
        taken = self.recording.take_out(pending.index, before)
        pending.inputs = tuple(dict.fromkeys((*given, *pending.inputs, *taken)))
        pending.chain = call_chain(sys._getframe(2))
        hidden = hidden_tensors(result) if name == "CheckpointFunction" else []
        shown = [each for each in tensors_in(result) if all(each is not other for other in hidden)]
        with torch._C.DisableTorchFunction():
            if hidden:  # connected to nothing, whatever becomes of the others
                self._operations.finish(replace(pending), hidden)
            self._operations.finish(pending, shown)
        self.provenance.made_by_function.update(dict.fromkeys(pending.outputs, pending.index))
        return result

    def _runs_through(self, args: tuple[Any, ...], place: Place | None) -> bool:
        """Tell whether to run the body of a reentrant checkpoint as it is.

        Its gradient is then the one that the checkpoint would give, since an input requires one; where none
        does, the checkpoint gives none, unless its site is neutralised.
        """
        takes = any(isinstance(each, torch.Tensor) and each.requires_grad for each in args)
        return takes or self._is_neutralised(place, "CheckpointFunction")

    def _is_neutralised(self, place: Place | None, name: str) -> bool:
        return place is not None and source_site(place, name) in self._neutralised

    @property
    def is_between_calls(self) -> bool:
        """Whether no torch function that is being recorded runs in the present thread."""
        return self.is_watching and self._here.calls == 0

    def dispatched(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Record an operator that ran where no torch function looks (see ``dispatched.py``)."""
        if name not in SHAPE_ONLY:
            frame = sys._getframe(1)
            with torch._C.DisableTorchFunction():
                self._operations.finish(self._operations.begin(name, args, kwargs, user_place(frame), frame), result)

    def parameter(self, data: Any, place: Place | None, make: Callable[[], nn.Parameter]) -> nn.Parameter:
        """Record ``nn.Parameter(tensor)``, which cuts what the tensor was computed from."""
        made = make()
        if isinstance(data, torch.Tensor) and self.provenance.is_known(data):
            with torch._C.DisableTorchFunction():
                operation = self._operations.new("Parameter", (self.provenance.value_of(data),), place)
                self._operations.finish(operation, made)
        return made

    def replayed(self, graph: Any, place: Place | None, replay: Callable[[], None]) -> None:
        """Record the replay of a CUDA graph; inside a custom function it is that function's own business."""
        if self.is_in_function:
            return replay()
        with torch._C.DisableTorchFunction():
            written = self.replays.begin(graph, self._before_write)
            replay()
            self.replays.end(written, functools.partial(self._operations.new, place=place))

    @unwatched
    def pickled(self, tensor: torch.Tensor, place: Place | None) -> None:
        """Note that a tensor was written to bytes, from which another one may be made."""
        number = self.provenance.value_of(tensor)
        self.provenance.escapes.escaped(self._operations.new("pickle", (number,), place), None)

    @unwatched
    def unpickled(self, tensor: torch.Tensor) -> None:
        """Note that a tensor was made of bytes."""
        self.provenance.entered(tensor)

    def step(self, optimizer: torch.optim.Optimizer, place: Place | None, *, begins: bool) -> None:
        """Note that an optimizer begins its step, or that it ends it."""
        now, training = len(self.recording.operations), self.recording.training
        training.begin_step(optimizer.param_groups, place, now) if begins else training.end_step(now)

    # --- regions and modules ----------------------------------------------------------------

    @property
    def open_regions(self) -> tuple[Region, ...]:
        """Return the regions that are in force now."""
        return self._here.active

    def enter_region(self, key: object, region: Region) -> None:
        """Note that a grad-mode switch took effect."""
        self._here.enter_region(key, region)

    def leave_region(self, key: object) -> None:
        """Note that a grad-mode switch was undone."""
        self._here.leave_region(key)

    @contextmanager
    def constructing(self) -> Iterator[None]:
        """Gather what runs meanwhile under one scope: it is done once, not in every forward pass."""
        scope = self._here.push("module", "made once, in the constructor", type=CONSTRUCTOR)
        yield
        self._here.pop(scope)

    def enter_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Note the call of a module; tell whether it is followed."""
        here = self._threads.here
        if not here.watched or self._over:
            return False
        self.modules.enter(here, module, (args, kwargs))
        return True

    def leave_module(self, module: nn.Module, output: Any) -> None:
        """Note the return of a module; also called when its forward raised."""
        with torch._C.DisableTorchFunction():
            self.modules.leave(self._threads.here, module, output, self._record_module)

    def _record_module(
        self, name: str, inputs: tuple[int, ...], place: Place | None, results: list[torch.Tensor]
    ) -> None:
        self._operations.finish(self._operations.new(name, inputs, place, custom=True), results)

    @unwatched
    def value_ids(self, result: list[torch.Tensor]) -> tuple[int, ...]:
        """Return the values of the tensors of a result that may have a gradient."""
        return tuple(self.provenance.value_of(tensor) for tensor in result if tensor.dtype in DIFFERENTIABLE)
