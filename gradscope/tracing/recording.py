"""The recording of one forward pass: values, operations and the scopes they ran in, as plain data.

Written by ``recorder.py``, read by ``diagnose.py`` and ``drawing.py``. No tensor is kept: a value is
a number, its shape and dtype, and whether autograd connected it to anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any, Literal, TypeAlias

# The scope in which a model is built, before it is called.
CONSTRUCTOR = "constructor"
# So many calls are looked through for what a whole number was made of.
FURTHEST_BACK = 1000

ScopeKind: TypeAlias = Literal["module", "region"]


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the source that can be blamed and neutralised.

    For a decorator ``line`` is the decorator's line and ``function`` the decorated function; for a
    ``with`` or a call it is that line and the function that contains it.
    """

    path: str
    line: int
    function: str
    mechanism: str
    how: str


@dataclass(frozen=True, slots=True)
class Region:
    """A stretch of execution under one grad-mode switch; ``disables`` is False for one that re-enables.

    ``generator`` is the code it was entered in, where that can be left with the region still open (``yield``).
    """

    site: Site
    disables: bool
    chain: tuple[str, ...] = ()
    generator: CodeType | None = None


@dataclass(slots=True)
class Scope:
    """One module call or one region, nested as executed; ``module`` is the ``named_modules`` path."""

    id: int
    parent: int | None
    kind: ScopeKind
    label: str
    module: str = ""
    type: str = ""
    region: Region | None = None
    outputs: tuple[int, ...] = ()


@dataclass(slots=True)
class Value:
    """One tensor at one moment. ``connected`` says that autograd links it to some leaf that counts, or is it.

    ``shape`` and ``dtype`` are as torch gives them (a nested tensor has no shape, a number of Python's neither).
    ``room`` marks memory that was made to be written into and holds nothing yet.
    """

    id: int
    shape: Any
    dtype: Any
    differentiable: bool
    connected: bool = False
    leaf: bool = False
    inference: bool = False
    name: str = ""
    memory: int = 0
    room: bool = False

    @property
    def detail(self) -> str:
        """Shape and dtype in words."""
        return "number" if self.dtype is float else form_in_words(self.shape, self.dtype)


@dataclass(frozen=True, slots=True)
class Place:
    """Where in user code an operation was called; resolved to text only when it is shown."""

    code: CodeType
    offset: int
    line: int


@dataclass(frozen=True, slots=True)
class Part:
    """Which elements of a memory a tensor shows: its sizes, strides and offset, and the bytes of an element."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    width: int


@dataclass(slots=True)
class Write:
    """One in-place change: by which operation, of which memory; ``unseen`` if no version counter moved.

    ``part`` says which elements an unseen one reaches; None: perhaps all.
    """

    memory: int
    operation: int
    unseen: bool
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """What becomes of a gradient at an operation that autograd did record: it raises, gives nothing, or errs.

    ``message`` says it of the operation to blame, ``error`` in the words of the exception, where it ``raises``.
    ``silent``: the gradient goes on and is wrong. ``write`` is the operation that spoiled what was saved;
    ``advice`` is better than what the rule advises.
    """

    rule: str
    message: str
    error: str = ""
    raises: bool = False
    silent: bool = False
    write: int | None = None
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Loss:
    """One operation (None: a leaf itself) at which a backward pass lost the gradient of some sources.

    ``what`` is ``none``, ``zero``, ``nonfinite`` or ``raises``, and ``hook zero`` or so where a hook did it.
    """

    operation: int | None
    what: str
    sources: frozenset[str]


@dataclass(slots=True)
class Operation:
    """One torch call: what it took in, what it gave out, where, and under which regions.

    ``custom`` marks what autograd cannot look into either: an ``autograd.Function``, a scripted module.
    ``chain`` holds the callers of those that may stop a gradient, outermost first. ``given`` counts the inputs that a
    custom function was given as arguments, which come first: to these alone autograd links it. ``leads_to``, of a call
    that takes a derivative, holds for each output the leaves that autograd links it to. ``via`` is the function of
    torch that the call lies inside of, where the user called that. ``number`` is what a tensor is added to or
    multiplied by, where that is one of Python's, or the dimension along which it is added up.
    """

    index: int
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    place: Place | None
    scope: int | None
    regions: tuple[Region, ...] = ()
    custom: bool = False
    refusal: Refusal | None = None
    chain: tuple[str, ...] = ()
    leads_to: tuple[tuple[int, ...], ...] = ()
    given: int | None = None
    via: str = ""
    number: float | None = None


@dataclass(frozen=True, slots=True)
class BackwardPass:
    """A backward pass that a target made: after how many operations, from which values, and what it was to reach.

    ``reached`` is None where the target is not judged by it: a forward pass takes a derivative on its way.
    """

    since: int
    values: tuple[int, ...]
    reached: frozenset[str] | None


@dataclass(slots=True)
class Training:
    """What a target that trains does by itself: its backward passes, in order, and the steps of its optimizers.

    ``steps`` are these, each as the operations that it consists of, ``held`` the tensors that the optimizers hold, by
    ``id``, ``stepped`` where the last step is, and ``unheld`` the sources that are reached and held by none. ``loose``
    are the leaves that are reached and no parameters, by ``id``.
    """

    passes: list[BackwardPass] = field(default_factory=list)
    steps: list[range] = field(default_factory=list)
    held: set[int] = field(default_factory=set)
    stepped: Place | None = None
    unheld: list[str] = field(default_factory=list)
    loose: dict[str, int] = field(default_factory=dict)

    @property
    def judged(self) -> list[BackwardPass]:
        """The passes that the target is judged by."""
        return [each for each in self.passes if each.reached is not None]

    def begin_step(self, groups: list[dict[str, Any]], place: Place | None, now: int) -> None:
        """Note that an optimizer with these parameter groups begins its step."""
        self.steps.append(range(now, now))
        self.held |= {id(each) for group in groups for each in group["params"]}
        self.stepped = place

    def end_step(self, now: int) -> None:
        """Note that it ends it."""
        if self.steps:
            self.steps[-1] = range(self.steps[-1].start, now)

    def has_step(self, number: int) -> bool:
        """Tell whether an operation is part of an optimizer's step."""
        return any(number in step for step in self.steps)


@dataclass(slots=True)
class Recording:
    """Everything that one run showed. ``leaves`` maps source names to their first value.

    ``unregistered`` are the tensors that could be trained and are no parameters of the model, by name, each as a value.
    ``raised_in`` names the innermost custom function that the last exception came out of.

    ``left`` are the calls by which the result left torch, where it is no tensor: then the ``sinks`` are what went in.
    ``walked`` says that ``reached`` was read off autograd's own graph; ``went_back`` that the target goes backward
    itself and is judged by what it goes backward from. ``gave`` describes a result in which nothing is floating.
    ``flags`` notes where ``requires_grad`` of a leaf was set: its first value, how many operations came before, and to
    what. ``froze`` are the sources that the call froze for its own use. ``loss_takes`` describes what the loss takes,
    once the call is over.
    """

    values: list[Value] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)
    leaves: dict[str, int] = field(default_factory=dict)
    outside: dict[str, int] = field(default_factory=dict)
    escapes: list[Operation] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    hooks: dict[int, Place] = field(default_factory=dict)
    by_hook: frozenset[str] = frozenset()
    losses: list[Loss] = field(default_factory=list)
    backward_error: str = ""
    reentrant: bool = False
    raised_in: tuple[str, BaseException] | None = None
    unregistered: dict[str, int] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    leaked: set[Site] = field(default_factory=set)
    left_open: tuple[Region, ...] = ()
    sinks: tuple[int, ...] = ()
    left: list[Operation] = field(default_factory=list)
    gave: tuple[str, ...] = ()
    reached: frozenset[str] = frozenset()
    walked: bool = False
    went_back: bool = False
    error: BaseException | None = None
    loss_takes: str = ""
    pending: Operation | None = None
    unseen: list[str] = field(default_factory=list)
    flags: list[tuple[int, int, bool]] = field(default_factory=list)
    froze: frozenset[str] = frozenset()

    def used_frozen(self) -> set[str]:
        """Return the sources that are taken in only where the call has frozen them, whatever they are afterwards."""
        flagged = {value for value, _, _ in self.flags}
        frozen: dict[int, list[bool]] = {value: [] for value in flagged}
        for operation in self.operations if flagged else ():
            for value in flagged.intersection(operation.inputs):
                said = [flag for each, since, flag in self.flags if each == value and since <= operation.index]
                frozen[value].append(bool(said) and not said[-1])
        return {name for name, value in self.leaves.items() if frozen.get(value) and all(frozen[value])}

    def take_out(self, since: int, before: int) -> list[int]:
        """Take out the operations from ``since`` on, which ran inside one that comes in their place and wrote for it.

        Returns the values that they took in and did not make, of those that were there ``before``.
        """
        inside = self.operations[since:]
        del self.operations[since:]
        for number in range(len(self.writes) - 1, -1, -1):
            if self.writes[number].operation < since:
                break
            self.writes[number] = replace(self.writes[number], operation=since)
        taken = {value for operation in inside for value in operation.inputs if value < before}
        return sorted(taken.difference(value for operation in inside for value in operation.outputs))

    def add(self, operation: Operation) -> None:
        """Note an operation that no call of torch's was: it comes after those noted so far."""
        operation.index = len(self.operations)
        self.operations.append(operation)

    def comes_of_floats(self, number: int) -> bool:
        """Tell whether a value that has no derivative was worked out of one that may have, as far as looked back."""
        wanted = {number}
        for operation in self.operations[: -FURTHEST_BACK - 1 : -1]:
            if wanted.intersection(operation.outputs):
                if any(self.values[value].differentiable for value in operation.inputs):
                    return True
                wanted.update(operation.inputs)
        return False

    def link_nested(self, sources: frozenset[str]) -> None:
        """Take in the sources that a custom function gave a gradient to without having been given them."""
        self.reached |= sources
        numbers = {self.leaves[name] for name in sources}
        for operation in self.operations if numbers else ():
            if operation.given is not None and numbers.intersection(operation.inputs[operation.given :]):
                operation.given = None

    def later_writes(self) -> Callable[[int], list[Write]] | None:
        """Return what tells, for an operation, the writes after it into memory that it took in or gave out.

        None where nothing was written.
        Of those that a version counter shows, the last one is enough; a buffer may be written thousands of times.
        """
        by_memory: dict[int, list[Write]] = {}
        for write in self.writes:
            by_memory.setdefault(write.memory, []).append(write)
        telling = {memory: [*(write for write in writes[:-1] if write.unseen), writes[-1]]
                   for memory, writes in by_memory.items()}  # fmt: skip
        ends = {value.id: telling[value.memory][-1].operation for value in self.values if value.memory in telling}
        if not ends:
            return None

        def after(number: int) -> list[Write]:
            if number >= len(self.operations):  # of another trace, around this one
                return []
            operation = self.operations[number]
            touched = [value for value in (*operation.inputs, *operation.outputs) if ends.get(value, 0) > number]
            if not touched:
                return []
            memories = {self.values[value].memory for value in touched}
            later = [write for memory in memories for write in telling[memory] if write.operation > number]
            return sorted(later, key=lambda write: write.operation)

        return after

    def came_through(self, function: str, error: BaseException) -> None:
        """Note that an exception came out of a custom function, the innermost one first."""
        if self.raised_in is None or self.raised_in[1] is not error:
            self.raised_in = function, error

    def ancestors(self, scope: int | None) -> list[Scope]:
        """Return the chain of scopes from the outermost to this one."""
        chain: list[Scope] = []
        while scope is not None:
            chain.append(self.scopes[scope])
            scope = self.scopes[scope].parent
        return chain[::-1]


@functools.lru_cache(maxsize=1024)
def form_in_words(shape: Any, dtype: Any) -> str:
    """Return shape and dtype in words, such as ``1x256x1024 bfloat16``; without a shape it is a nested tensor."""
    sizes = "nested" if shape is None else "x".join(str(int(size)) for size in shape) or "scalar"
    return f"{sizes} {str(dtype).removeprefix('torch.')}"
