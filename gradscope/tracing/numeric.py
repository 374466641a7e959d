"""Numeric truth: directional finite differences in float64 against what autograd says.

Autograd alone cannot tell a gradient that was lost from one that never was: whether an output really depends on a
source, smoothly, in steps, or not at all, is asked of the function itself. Everything runs on a float64 copy of the
model, on the CPU if it runs there, every evaluation from the same random state (dropout draws the same) and the same
buffers (batch norm starts from the same statistics).
"""

from __future__ import annotations

import copy
import math
import random
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gradscope.errors import first_line
from gradscope.stages import tell
from gradscope.tracing.contents import results_in
from gradscope.tracing.derivatives import CPU, STEP, TOLERANCE, Derivative, FunctionChecker, drawn
from gradscope.tracing.holding import Holder, holder_of_loss
from gradscope.tracing.instrument import observe
from gradscope.tracing.inventory import Inventory
from gradscope.tracing.own_passes import CannotCheck, OwnPasses
from gradscope.tracing.recorder import nothing_written
from gradscope.tracing.restoring import kept, untouched_state, with_attributes_of
from gradscope.tracing.subject import Subject
from gradscope.tracing.workshops import RealWorkshop

# A group whose members all differ is halved only while this many forward passes are left.
MOST_EVALUATIONS = 400
# Where nothing moves at STEP: a function in steps moves when its arguments change by as much as they are, or by more.
LEAPS = (0.5, 4.0, 32.0)
UNSTEADY = 0.05

# agrees / differs: with autograd; lost: it depends smoothly and autograd says nothing; flat: in steps only;
# none: not at all; unclear: the differences do not converge (a kink, noise, an argument of lower precision);
# refused: with the source moved it does not run; rewritten: each call gives the source another value before it is used.
Answer: TypeAlias = Literal["agrees", "differs", "lost", "flat", "none", "unclear", "refused", "rewritten"]


@dataclass(frozen=True, slots=True)
class Checked:
    """What finite differences say of each source, and how many forward passes that took.

    ``refusal`` is why it did not run with a source moved, ``off`` by how much of the derivative a gradient differs.
    """

    answers: dict[str, Answer]
    evaluations: int
    derivatives: tuple[Derivative, ...] = ()
    refusal: str = ""
    off: dict[str, float] = field(default_factory=dict)


def check(
    subject: Subject,
    groups: Iterable[frozenset[str]],
    *,
    requiring: frozenset[str],
    doubted: frozenset[str] = frozenset(),
    goes_back: bool = False,
    device: torch.device = CPU,
    seed: int = 0,
) -> Checked:
    """Compare autograd with finite differences for groups of sources; a group that differs is halved to its members.

    ``requiring`` are the sources that require a gradient in the pass that autograd is asked in, ``doubted`` those whose
    gradient is wrong if it differs; ``goes_back`` says that the target is judged by what it goes backward from itself;
    ``device`` is where the copy of the model runs.

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
        function = _Function(subject, model, device, seed, loss, goes_back=goes_back)
        gradients = function.gradients(requiring)
        answers: dict[str, Answer] = dict.fromkeys(function.rewritten, "rewritten")
        for group in groups:
            names = sorted(name for name in group if name in function.sources.keys() - function.rewritten)
            if names:
                _check_group(function, gradients, names, answers, doubted)
        derivatives = function.derivatives() if "differs" in answers.values() else ()
    return Checked(answers, function.evaluations, derivatives, function.refusal, function.off)


def _own_model(subject: Subject, workshop: RealWorkshop, stack: ExitStack) -> torch.nn.Module:
    """Return a model in float64 that may be changed: a copy, or the caller's own with other tensors in it."""
    model = subject.prepare(RealWorkshop(str(workshop.device), torch.float64))
    held = Inventory(model)
    copied = None
    if not isinstance(model, Holder):  # a function cannot be copied: its closure leads to the caller's own modules
        # A copy may share parameters with the caller's model, where a registry holds them (Pyro).
        before_write = stack.enter_context(kept(held)) if subject.borrowed else nothing_written
        copied = _copied(model, workshop.device)
    if copied is not None:
        model, held = copied, Inventory(copied)
    else:
        before_write = stack.enter_context(workshop.lent(held))
        for tensor in (*model.parameters(), *model.buffers()):  # in float64 already it still has the caller's memory
            before_write(tensor)
    _cast_loose(held, before_write)
    return model


def _copied(model: torch.nn.Module, device: torch.device) -> torch.nn.Module | None:
    """Return a copy in float64; None where it cannot be copied: a lock in it, a weight that is computed beforehand."""
    try:
        copied = copy.deepcopy(model)
        for original, other in zip(model.parameters(), copied.parameters(), strict=True):
            with_attributes_of(original, other)
        return copied.to(device=device, dtype=torch.float64)
    except Exception:
        return None


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
    function: _Function,
    gradients: Mapping[str, torch.Tensor],
    names: list[str],
    answers: dict[str, Answer],
    doubted: frozenset[str],
) -> None:
    """Give a group one answer where it agrees or nothing of it matters; else ask its halves."""
    tell(f"finite differences, {function.evaluations} forward passes so far")
    try:
        answer = _compare(function, gradients, names)
    except CannotCheck as error:
        function.refusal, answer = error.message, "refused"
    exhausted = function.evaluations > MOST_EVALUATIONS and not (answer == "differs" and doubted.issuperset(names))
    if answer == "differs" and len(names) == 1 and doubted.issuperset(names):
        answer = _settled(function, gradients, names[0])
    if len(names) == 1 or answer in ("agrees", "none") or exhausted:
        answers.update(dict.fromkeys(names, answer))
        return
    middle = len(names) // 2
    for half in (names[:middle], names[middle:]):
        _check_group(function, gradients, half, answers, doubted)


def _compare(function: _Function, gradients: Mapping[str, torch.Tensor], names: list[str]) -> Answer:
    directions = {name: function.direction(name) for name in names}
    told = sum(float((gradients[name] * directions[name]).sum()) for name in names if name in gradients)
    has_gradient = any(name in gradients for name in names)
    small, smaller = function.slope(directions, STEP), function.slope(directions, STEP / 4)
    noise = function.noise / STEP
    if not math.isfinite(small + smaller + told):
        return "unclear"
    if abs(small) <= noise and abs(told) <= noise:
        return "flat" if function.is_moved_by(directions) else "none"
    size = max(abs(smaller), abs(told))
    spread = abs(small - smaller)  # how far the differences are from having converged: kinks on the way move them
    if spread > UNSTEADY * size + 8 * noise:
        return "unclear"
    if abs(smaller - told) <= TOLERANCE * size + 10 * spread + 32 * noise:
        return "agrees"
    return "differs" if has_gradient else "lost"


def _settled(function: _Function, gradients: Mapping[str, torch.Tensor], name: str) -> Answer:
    """Ask with steps of very different size before a gradient is called wrong: near a kink two may agree by chance."""
    directions = {name: function.direction(name)}
    slopes = [function.slope(directions, step) for step in (16 * STEP, STEP, STEP / 16)]
    spread, size = max(slopes) - min(slopes), max(map(abs, slopes))
    if spread > UNSTEADY * size + 8 * function.noise / (STEP / 16):
        return "unclear"
    told = float((gradients[name] * directions[name]).sum())
    function.off[name] = abs(slopes[1] - told) / (size or 1.0)
    return "differs"


class _Function:
    """A subject as a number that depends on its sources: every output weighed with fixed random numbers, summed.

    ``loss`` holds what the loss uses, which every evaluation finds as it was. ``rewritten`` are the sources that each
    call writes before it uses them.
    """

    def __init__(
        self,
        subject: Subject,
        model: torch.nn.Module,
        device: torch.device,
        seed: int,
        loss: torch.nn.Module | None,
        *,
        goes_back: bool,
    ) -> None:
        self.seed = seed
        self._device = device
        self.evaluations = 0
        self.noise = self._base = 0.0
        self.refusal = ""
        self.off: dict[str, float] = {}
        self.rewritten: frozenset[str] = frozenset()
        self._subject = subject
        self._loss = loss
        self._goes_back = goes_back
        self._built = subject.build(RealWorkshop(str(device), torch.float64), model)
        for tensor in self._built.inputs.values():
            tensor.data = tensor.data.to(torch.complex128 if tensor.is_complex() else torch.float64)
            tensor.requires_grad_(False)
        given = (*self._built.model.named_parameters(), *self._built.inputs.items())
        # A quantised weight, of whatever parts, cannot be moved.
        self.sources = {name: each for name, each in given if not is_traceable_wrapper_subclass(each)}
        self._values = self._values_now()
        self._weights: list[torch.Tensor] = []

    def _values_now(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.sources.items()}

    # --- what autograd says -----------------------------------------------------------------

    def gradients(self, requiring: frozenset[str]) -> dict[str, torch.Tensor]:
        """Return the gradient of the number with respect to every source that autograd gives one."""
        for name, tensor in self.sources.items():
            tensor.requires_grad_(name in requiring)
        found = self._derived()
        written = self.rewritten
        if written:  # a first call may give parameters their values: what is asked about is the next one
            with torch.enable_grad():
                self._outputs()
            self._values = self._values_now()
            found = self._derived()
            self.rewritten |= self._not_left_where_moved(written)
        return {name: grad.to_dense() if grad.is_sparse else grad for name, grad in found.items()}

    def _derived(self) -> dict[str, torch.Tensor]:
        with torch.enable_grad(), self._restored():
            self._forget_gradients()  # the forward pass may go backward itself
            if self._goes_back:
                own = OwnPasses(self.sources, derives=True)
                outputs = self._outputs(own)
                self._weights, found = own.weights, own.gradients
            else:
                outputs = self._outputs()
                self.rewritten = self._unlike(self._values)
                found = self._gone_back(outputs)
        self._forget_gradients()
        self._base = float(self._number(outputs))
        self.noise = 1e-14 * sum(
            float((weight * output.detach()).abs().nan_to_num(0, 0, 0).sum())
            for weight, output in zip(self._weights, outputs, strict=True)
        )
        return found

    def _gone_back(self, outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        self._weights = [drawn(output, generator) for output in outputs]
        value = self._number(outputs)
        self._forget_gradients()
        try:
            if value.requires_grad:
                value.backward()
        except Exception as error:
            raise CannotCheck(f"Backward raises: {type(error).__name__}: {first_line(error)}") from error
        return {name: tensor.grad for name, tensor in self.sources.items() if tensor.grad is not None}

    def _unlike(self, values: Mapping[str, torch.Tensor]) -> frozenset[str]:
        """Return the sources that have other values than these."""
        with torch.no_grad():
            return frozenset(
                name for name, value in values.items()
                if not torch.allclose(self.sources[name].detach(), value, rtol=0, atol=0, equal_nan=True)
            )  # fmt: skip

    def _not_left_where_moved(self, names: frozenset[str]) -> frozenset[str]:
        """Return the sources that a call moves back: a weight that is normalised in place, again and again."""
        moved = {name: self._values[name] + LEAPS[0] * self.direction(name) for name in names}
        with torch.enable_grad(), self._restored():
            for name, value in moved.items():
                self.sources[name].data.copy_(value)
            self._outputs()
            return self._unlike(moved)

    def _forget_gradients(self) -> None:
        for tensor in self.sources.values():
            tensor.grad = None

    def derivatives(self) -> tuple[Derivative, ...]:
        """Return the custom functions of the model whose backward is not their derivative, each checked alone."""
        checker = FunctionChecker()
        with torch.enable_grad(), self._restored(), observe(checker, frozenset()):
            self._outputs()
        return tuple(dict.fromkeys(checker.found))

    # --- what the function says -------------------------------------------------------------

    def direction(self, name: str) -> torch.Tensor:
        """Return a random direction of a source, as long as the source itself is large."""
        value = self._values[name]
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
        noise = drawn(value, generator)
        size = float(value.abs().square().mean().sqrt()) if value.numel() else 0.0
        return noise * (size or 1.0)

    def slope(self, directions: Mapping[str, torch.Tensor], step: float) -> float:
        """Return the central difference along the directions."""
        return (self._moved(directions, step) - self._moved(directions, -step)) / (2 * step)

    def is_moved_by(self, directions: Mapping[str, torch.Tensor]) -> bool:
        """Tell whether the number changes where the sources make a leap, this way or that."""
        steps = (sign * leap for leap in LEAPS for sign in (1, -1))
        return any(not abs(self._moved(directions, step) - self._base) <= self.noise for step in steps)

    def _moved(self, directions: Mapping[str, torch.Tensor], step: float) -> float:
        with torch.no_grad():
            for name, direction in directions.items():
                self.sources[name].data.add_(direction, alpha=step)
        own = OwnPasses(self.sources, derives=False) if self._goes_back else None
        with torch.enable_grad(), self._restored():
            return float(self._number(self._outputs(own)))

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

    def _outputs(self, own: OwnPasses | None = None) -> list[torch.Tensor]:
        self.evaluations += 1
        # torch.manual_seed would seed every GPU as well, also where none is used.
        (torch.default_generator.manual_seed if self._device == CPU else torch.manual_seed)(self.seed)
        random.seed(self.seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(self.seed)
        try:
            with own if own is not None else nullcontext():
                result = self._built.call()
            if self._subject.loss is not None:
                result = self._subject.loss(result)
        except CannotCheck:
            raise
        except Exception as error:
            raise CannotCheck(
                f"It does not run in float64 on {self._device}: {type(error).__name__}: {first_line(error)}"
            ) from error
        if own is not None:
            return own.outputs
        return [each for each in results_in(result) if each.is_floating_point() or each.is_complex()]

    def _number(self, outputs: list[torch.Tensor]) -> Any:
        if len(outputs) != len(self._weights):
            raise CannotCheck(f"It gives {len(outputs)} results where it gave {len(self._weights)}.")
        # A masked logit of minus infinity says nothing, and would make all the rest of the number nothing.
        weighed = [
            (weight * output.masked_fill(~output.isfinite(), 0)).sum().real
            for weight, output in zip(self._weights, outputs, strict=True)
        ]
        return torch.stack([each.double().to(self._device) for each in weighed]).sum() if weighed else torch.zeros(())
