"""Numeric truth: directional finite differences in float64 against what autograd says.

Autograd alone cannot tell a gradient that was lost from one that never was: whether an output really depends on a
source, smoothly, in steps, or not at all, is asked of the function itself. Everything runs on a float64 copy of the
model, on the CPU if it runs there, every evaluation from the same random state (dropout draws the same) and the same
buffers (batch norm starts from the same statistics).
"""

from __future__ import annotations

import copy
import random
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from gradscope.errors import GradscopeError
from gradscope.stages import tell
from gradscope.tracing.contents import results_in
from gradscope.tracing.frames import source_site, user_place
from gradscope.tracing.holding import Holder, holder_of_loss
from gradscope.tracing.instrument import observe
from gradscope.tracing.inventory import Inventory
from gradscope.tracing.recorder import nothing_written
from gradscope.tracing.recording import Region, Site
from gradscope.tracing.restoring import kept, untouched_state
from gradscope.tracing.subject import Subject
from gradscope.tracing.workshops import RealWorkshop

# A group whose members all differ is halved only while this many forward passes are left.
MOST_EVALUATIONS = 400
# Central differences: the error is of the order STEP**2 and 1e-16 / STEP, relative to the size of the tensor.
STEP = 1e-6
CPU = torch.device("cpu")
# Where nothing moves at STEP: a function in steps moves when its arguments change by as much as they are.
LEAP = 0.5
TOLERANCE = 1e-3
UNSTEADY = 0.05

# agrees / differs: with autograd; lost: it depends smoothly and autograd says nothing; flat: in steps only;
# none: not at all; unclear: the differences do not converge (a kink, noise, an argument of lower precision).
Answer: TypeAlias = Literal["agrees", "differs", "lost", "flat", "none", "unclear"]


class CannotCheck(GradscopeError):
    """The model does not run in float64 where it was tried, or cannot be copied."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What finite differences say of each source, and how many forward passes that took."""

    answers: dict[str, Answer]
    evaluations: int
    derivatives: tuple[Derivative, ...] = ()


@dataclass(frozen=True, slots=True)
class Derivative:
    """A custom function whose own backward is not the derivative of its forward; ``surrogate``: that one is zero."""

    site: Site
    surrogate: bool


def check(
    subject: Subject,
    groups: Iterable[frozenset[str]],
    *,
    requiring: frozenset[str],
    device: torch.device = CPU,
    seed: int = 0,
) -> Checked:
    """Compare autograd with finite differences for groups of sources; a group that differs is halved to its members.

    ``requiring`` are the sources that require a gradient in the pass that autograd is asked in; ``device`` is where the
    copy of the model runs.

    Raises:
        CannotCheck: the model does not run in float64 there.
    """
    workshop = RealWorkshop(str(device), torch.float64, casts=True)
    loss = holder_of_loss(subject.loss)
    with ExitStack() as stack:
        stack.enter_context(untouched_state())
        stack.enter_context(_default_dtype(torch.float64))
        if torch.get_default_device() != device:
            stack.enter_context(device)
        model = _own_model(subject, workshop, stack)
        if loss is not None:
            held = Inventory(loss)
            _cast_loose(held, stack.enter_context(workshop.lent(held)))
        function = _Function(subject, model, device, seed, loss)
        gradients = function.gradients(requiring)
        answers: dict[str, Answer] = {}
        for group in groups:
            names = sorted(name for name in group if name in function.sources)
            if names:
                _check_group(function, gradients, names, answers)
        derivatives = function.derivatives() if "differs" in answers.values() else ()
    return Checked(answers, function.evaluations, derivatives)


def _own_model(subject: Subject, workshop: RealWorkshop, stack: ExitStack) -> torch.nn.Module:
    """Return a model in float64 that may be changed: a copy, or the caller's own with other tensors in it."""
    try:
        model = subject.prepare(RealWorkshop(str(workshop.device), torch.float64))
        if isinstance(model, Holder):  # a function cannot be copied: its closure leads to the caller's own modules
            held = Inventory(model)
            before_write = stack.enter_context(workshop.lent(held))
            for parameter in model.parameters():  # one that is in float64 already still has the caller's memory
                before_write(parameter)
        else:
            # A copy may share parameters with the caller's model, where a registry holds them (Pyro).
            before_write = stack.enter_context(kept(Inventory(model))) if subject.borrowed else nothing_written
            model = copy.deepcopy(model).to(device=workshop.device, dtype=torch.float64)
            held = Inventory(model)
        _cast_loose(held, before_write)
        return model
    except Exception as error:
        raise CannotCheck(f"The model cannot be copied: {type(error).__name__}: {error}") from error


def _cast_loose(held: Inventory, before_write: Callable[[torch.Tensor], None]) -> None:
    """Bring what lies beside parameters and buffers to float64: a table, the labels in a function's closure."""
    for tensor in held.loose_tensors():
        if tensor.is_floating_point() and tensor.is_leaf and not tensor.is_inference():
            before_write(tensor)
            tensor.data = tensor.data.to(torch.float64)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let what the model makes anew (``torch.zeros``, ``torch.tensor``) have the precision of the rest."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _check_group(
    function: _Function, gradients: Mapping[str, torch.Tensor], names: list[str], answers: dict[str, Answer]
) -> None:
    """Give a group one answer where it agrees or nothing of it matters; else ask its halves."""
    tell(f"finite differences, {function.evaluations} forward passes so far")
    answer = _compare(function, gradients, names)
    exhausted = function.evaluations > MOST_EVALUATIONS and answer in ("lost", "flat")
    if len(names) == 1 or answer in ("agrees", "none") or exhausted:
        answers.update(dict.fromkeys(names, answer))
        return
    middle = len(names) // 2
    for half in (names[:middle], names[middle:]):
        _check_group(function, gradients, half, answers)


def _compare(function: _Function, gradients: Mapping[str, torch.Tensor], names: list[str]) -> Answer:
    directions = {name: function.direction(name) for name in names}
    told = sum(float((gradients[name] * directions[name]).sum()) for name in names if name in gradients)
    has_gradient = any(name in gradients for name in names)
    small, smaller = function.slope(directions, STEP), function.slope(directions, STEP / 4)
    noise = function.noise / STEP
    if abs(small) <= noise and abs(told) <= noise:
        return "flat" if abs(function.slope(directions, LEAP)) * LEAP > function.noise else "none"
    size = max(abs(smaller), abs(told))
    spread = abs(small - smaller)  # how far the differences are from having converged: kinks on the way move them
    if spread > UNSTEADY * size + 8 * noise:
        return "unclear"
    if abs(smaller - told) <= TOLERANCE * size + 10 * spread + 32 * noise:
        return "agrees"
    return "differs" if has_gradient else "lost"


class _Function:
    """A subject as a number that depends on its sources: every output weighed with fixed random numbers, summed.

    ``loss`` holds what the loss uses, which every evaluation finds as it was.
    """

    def __init__(
        self, subject: Subject, model: torch.nn.Module, device: torch.device, seed: int, loss: torch.nn.Module | None
    ) -> None:
        self.seed = seed
        self._device = device
        self.evaluations = 0
        self.noise = 0.0
        self._subject = subject
        self._loss = loss
        self._built = subject.build(RealWorkshop(str(device), torch.float64), model)
        for name, tensor in self._built.inputs.items():
            tensor.data = tensor.data.to(torch.complex128 if tensor.is_complex() else torch.float64)
            tensor.requires_grad_(False)
            assert name not in dict(self._built.model.named_parameters())
        self.sources = {**dict(self._built.model.named_parameters()), **self._built.inputs}
        self._values = {name: tensor.detach().clone() for name, tensor in self.sources.items()}
        self._weights: list[torch.Tensor] = []

    # --- what autograd says -----------------------------------------------------------------

    def gradients(self, requiring: frozenset[str]) -> dict[str, torch.Tensor]:
        """Return the gradient of the number with respect to every source that autograd gives one."""
        for name, tensor in self.sources.items():
            tensor.requires_grad_(name in requiring)
        with torch.enable_grad(), self._restored():
            outputs = self._outputs()
            generator = torch.Generator().manual_seed(self.seed + 1)
            self._weights = [_drawn(output, generator) for output in outputs]
            value = self._number(outputs)
            self._forget_gradients()  # the forward pass may go backward itself
            try:
                if value.requires_grad:
                    value.backward()
            except Exception as error:
                raise CannotCheck(f"Backward raises: {type(error).__name__}: {error}") from error
            found = {name: tensor.grad for name, tensor in self.sources.items() if tensor.grad is not None}
        self._forget_gradients()
        self.noise = 1e-14 * sum(
            float((weight * output.detach()).abs().sum()) for weight, output in zip(self._weights, outputs, strict=True)
        )
        return {name: grad.to_dense() if grad.is_sparse else grad for name, grad in found.items()}

    def _forget_gradients(self) -> None:
        for tensor in self.sources.values():
            tensor.grad = None

    def derivatives(self) -> tuple[Derivative, ...]:
        """Return the custom functions of the model whose backward is not their derivative, each checked alone."""
        checker = _FunctionChecker()
        with torch.enable_grad(), self._restored(), observe(checker, frozenset()):
            self._outputs()
        return tuple(dict.fromkeys(checker.found))

    # --- what the function says -------------------------------------------------------------

    def direction(self, name: str) -> torch.Tensor:
        """Return a random direction of a source, as long as the source itself is large."""
        value = self._values[name]
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
        noise = _drawn(value, generator)
        size = float(value.abs().square().mean().sqrt()) if value.numel() else 0.0
        return noise * (size or 1.0)

    def slope(self, directions: Mapping[str, torch.Tensor], step: float) -> float:
        """Return the central difference along the directions."""
        return (self._moved(directions, step) - self._moved(directions, -step)) / (2 * step)

    def _moved(self, directions: Mapping[str, torch.Tensor], step: float) -> float:
        with torch.no_grad():
            for name, direction in directions.items():
                self.sources[name].data.add_(direction, alpha=step)
        with torch.enable_grad(), self._restored():
            return float(self._number(self._outputs()))

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Give the model its buffers and caches back, and then the sources their values."""
        try:
            with ExitStack() as stack:
                for model in (self._built.model, self._loss):
                    if model is None:
                        continue
                    held = Inventory(model)
                    before_write = stack.enter_context(kept(held))
                    for tensor in (*model.buffers(), *held.loose_tensors()):
                        before_write(tensor)
                yield
        finally:  # last: a list of weights beside the table of parameters (nn.LSTM) was put back as it was moved
            for name, tensor in self.sources.items():
                tensor.data.copy_(self._values[name])

    def _outputs(self) -> list[torch.Tensor]:
        self.evaluations += 1
        # torch.manual_seed would seed every GPU as well, also where none is used.
        (torch.default_generator.manual_seed if self._device == CPU else torch.manual_seed)(self.seed)
        random.seed(self.seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(self.seed)
        try:
            result = self._built.call()
            if self._subject.loss is not None:
                result = self._subject.loss(result)
        except Exception as error:
            raise CannotCheck(
                f"It does not run in float64 on {self._device}: {type(error).__name__}: {error}"
            ) from error
        return [each for each in results_in(result) if each.is_floating_point() or each.is_complex()]

    def _number(self, outputs: list[torch.Tensor]) -> Any:
        weighed = [(weight * output).sum().real for weight, output in zip(self._weights, outputs, strict=True)]
        return torch.stack([each.double().to(self._device) for each in weighed]).sum() if weighed else torch.zeros(())


class _FunctionChecker:
    """Observes ``autograd.Function.apply`` and compares each one's backward with its forward, at its own operands."""

    is_here = True

    def __init__(self) -> None:
        self.found: list[Derivative] = []
        self.is_watching = True
        self.is_in_function = False

    def custom_function(
        self, name: str, args: tuple[Any, ...], call: Callable[..., Any], apply: Callable[..., Any]
    ) -> Any:
        """Check one function, then run it."""
        place = user_place(sys._getframe(2))
        self.is_watching = False
        try:
            if place is not None:
                with torch.enable_grad():
                    self._check(source_site(place, name), args, apply)
            return call(*args)
        finally:
            self.is_watching = True

    def _check(self, site: Site, args: tuple[Any, ...], call: Callable[..., Any]) -> None:
        given = [each.detach().clone().requires_grad_() if _is_real(each) else each for each in args]
        tensors = [each for each in given if _is_real(each)]
        outputs = [each for each in results_in(call(*given)) if each.requires_grad]
        if not tensors or not outputs:
            return
        generator = torch.Generator().manual_seed(0)
        weights = [_drawn(each, generator) for each in outputs]
        directions = [_drawn(each, generator) for each in tensors]
        grads = torch.autograd.grad(outputs, tensors, weights, allow_unused=True)

        def value(step: float, only: int | None = None) -> float:
            steps = [step if only in (None, index) else 0.0 for index in range(len(tensors))]
            with torch.no_grad():
                moved = iter([each + way * far for each, way, far in zip(tensors, directions, steps, strict=True)])
                result = call(*[next(moved) if _is_real(each) else each for each in given])
                pairs = zip(weights, results_in(result), strict=False)
                return float(sum((weight * output).sum() for weight, output in pairs))

        told = [float((grad * way).sum()) if grad is not None else 0.0
                for grad, way in zip(grads, directions, strict=True)]  # fmt: skip
        if not _differ((value(STEP) - value(-STEP)) / (2 * STEP), sum(told)):
            return
        for index, grad in enumerate(grads):  # one may be rounded, and another one given no gradient
            slope = (value(STEP, index) - value(-STEP, index)) / (2 * STEP)
            if grad is not None and _differ(slope, told[index]):
                self.found.append(Derivative(site, surrogate=abs(slope) < 1e-8))

    # What else there is to observe does not matter here.
    def enter_region(self, key: object, region: Region) -> None: ...
    def leave_region(self, key: object) -> None: ...
    def enter_module(self, module: torch.nn.Module, args: Any, kwargs: Any) -> bool:
        return False

    def leave_module(self, module: torch.nn.Module, output: Any) -> None: ...
    def replayed(self, graph: Any, place: Any, replay: Callable[[], None]) -> None:
        """Replay the graph."""
        replay()

    def pickled(self, tensor: torch.Tensor, place: Any) -> None: ...
    def unpickled(self, tensor: torch.Tensor) -> None: ...
    def step(self, optimizer: Any, place: Any, *, begins: bool) -> None: ...
    def in_thread(self) -> AbstractContextManager[None]:
        """Watch nothing more in another thread."""
        return nullcontext()

    def parameter(self, data: Any, place: Any, make: Callable[[], torch.nn.Parameter]) -> torch.nn.Parameter:
        """Make the parameter."""
        return make()


def _drawn(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random numbers for a tensor, the same on every device."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64, device=CPU).to(like)


def _differ(slope: float, told: float) -> bool:
    return abs(slope - told) > TOLERANCE * max(abs(slope), abs(told)) + 1e-8


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
