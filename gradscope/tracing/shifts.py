"""Shifts that cost nothing: what is detached, taken off, and without influence on what comes out in the end.

``exp(x - m) / exp(x - m).sum()`` is the same for every ``m``, so nothing is missed where that is detached. Told by
following what a value has of a shift: it is added to the value, or the value is multiplied by its exponential. Sums,
products, exponentials and logarithms turn the one into the other; what is left of it in a result, or goes into a call
that is none of these, matters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple, TypeAlias

from gradscope.tracing.propagation import Walks, is_flat
from gradscope.tracing.recording import Operation, Recording

ADDITIONS = frozenset({"add", "sub", "rsub"})
_DIVISIONS = frozenset({"div", "rdiv", "reciprocal"})
_TIMES = frozenset({"mul"}) | _DIVISIONS
_PRODUCTS = frozenset("matmul mm bmm mv dot outer einsum inner linear".split())
_EXPONENTIALS = frozenset({"exp", "exp2"})
_LOGARITHMS = frozenset({"log", "log2"})
_SOFTMAX = frozenset("softmax log_softmax softmin cross_entropy".split())
# What makes one number of several, such as the largest of those that are normalised together.
_REDUCTIONS = frozenset("max amax min amin mean median logsumexp scatter_reduce index_reduce".split())
# What adds up what was multiplied by an exponential, or else leaves that apart.
_SUMS = frozenset("sum nansum cumsum scatter_add index_add segment_reduce tril triu diagonal trace norm".split())
_ONE_BY_ONE = frozenset("clamp clamp_min dropout abs relu nan_to_num maximum minimum".split())
# What hands the same numbers on, all or some of them.
_RESHAPES = frozenset(
    "view reshape expand expand_as view_as unsqueeze squeeze flatten unflatten transpose permute movedim swapaxes T mT "
    "clone contiguous to type_as float double half bfloat16 detach data alias broadcast_to getitem item".split()
)
_PARTS = frozenset(
    "index_select gather repeat_interleave repeat masked_fill where chunk split unbind roll flip narrow select "
    "take_along_dim topk sort".split()
)
_CARRIES = _RESHAPES | _PARTS
_JOINS = frozenset("cat stack concat concatenate hstack vstack".split())
# What keeps each number where it is.
_COPIES = frozenset("clone contiguous to type_as float double half bfloat16 detach data alias".split())
_SPREADS = frozenset("expand expand_as broadcast_to repeat repeat_interleave".split())
# What takes each number by itself.
_ELEMENTWISE = (
    ADDITIONS | _TIMES | _EXPONENTIALS | _LOGARITHMS | _ONE_BY_ONE | {"neg", "square", "where", "masked_fill"}
)
_ONE_NAME = {
    "subtract": "sub", "multiply": "mul", "radd": "add", "rmul": "mul", "divide": "div", "true_divide": "div",
    "truediv": "div", "rtruediv": "rdiv", "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "idiv": "div",
}  # fmt: skip
# A number up to this size that is added to a sum of exponentials keeps it from zero; that sum is 1 at least.
_GUARD = 1e-4
# So many calls are looked back through for what a shift was computed of.
_DEEPEST = 6


class Form(NamedTuple):
    """What a value has of shifts: a sum of them, each so many times, is added to it, or it is multiplied by ``exp``."""

    exponential: bool
    shift: dict[int, float]


class _Matters:
    """In place of a form: the shift does not stay apart from the value."""


_MATTERS = _Matters()
_Given: TypeAlias = "list[Form | None]"
_Outcome: TypeAlias = "Form | _Matters | None"


class Shifts:
    """Tells of operations that detach whether what they give out matters for any result.

    Shifts are numbered by how they were computed: what is detached twice, each time anew, is one of them. A ``narrow``
    one is the same for all numbers that are normalised together.
    """

    def __init__(self, recording: Recording, cuts: Iterable[Operation], walks: Walks) -> None:
        self._values, self._counts = recording.values, walks.counts
        self._makers: dict[int, Operation] = {}
        self._numbers: dict[Hashable, int] = {}
        self._known: dict[int, int] = {}  # by value: the number that it has as a shift
        self._narrow: set[int] = set()
        self._forms: dict[int, Form] = {}
        self._along: dict[int, frozenset[int] | None] = {}  # by value: the dimensions along which its shift differs
        self._mixed: dict[int, int] = {}  # by value: the shifts that it depends on in no form, as a set of bits
        self._cuts: dict[int, set[int]] = {}  # by shift: what detaches it
        self._made_of: dict[int, int] = {}  # and the shifts that it was computed of, as bits
        indices = {cut.index for cut in cuts}
        for operation in recording.operations if indices else ():
            self._makers.update(dict.fromkeys(operation.outputs, operation))
            if operation.index in indices:
                self._make_shifts(operation, operation.index)
            else:
                self._follow(operation)
        self._mattering = self._cuts_behind(self._shifts_in(recording.sinks))

    def cost_nothing(self, cut: Operation) -> bool:
        """Tell whether no result depends on what an operation detaches."""
        return cut.index not in self._mattering

    def _cuts_behind(self, shifts: int) -> set[int]:
        """Return the cuts that matter where these shifts do: by index."""
        pending, found = shifts, 0
        while pending:
            shift = pending.bit_length() - 1
            found |= 1 << shift
            pending = (pending | self._made_of.get(shift, 0)) & ~found
        return {cut for shift, cuts in self._cuts.items() if found >> shift & 1 for cut in cuts}

    # --- shifts -----------------------------------------------------------------------------------------------

    def _make_shifts(self, operation: Operation, cut: int | None = None) -> None:
        """Take what an operation gives out for shifts of their own: where it is a cut, those that stand for it."""
        for value in operation.outputs:
            if self._counts[value]:
                shift = self._known[value] = self._shift_of(value)
                self._made_of[shift] = self._made_of.get(shift, 0) | self._shifts_in(operation.inputs)
                self._cuts.setdefault(shift, set()).update(() if cut is None else (cut,))
                self._forms[value] = Form(exponential=False, shift={shift: 1})
                self._along[value] = self._extent(value)

    def _shift_of(self, value: int, depth: int = 0) -> int:
        """Return the number of a value as a shift: the same for what is computed alike of the same."""
        if value in self._known:
            return self._known[value]
        maker = self._makers.get(value)
        name = _name_of(maker) if maker is not None else ""
        if maker is None or not maker.inputs or depth > _DEEPEST:
            return self._number(value)
        size, sizes = self._size(value), [self._size(each) for each in maker.inputs]
        if name in _RESHAPES and (size == sizes[0] or name.startswith("expand")):
            return self._shift_of(maker.inputs[0], depth + 1)
        is_reduction = name in _REDUCTIONS
        if not (is_reduction or name in _CARRIES or name in _ELEMENTWISE):
            return self._number(value)
        inputs = [self._shift_of(each, depth + 1) for each in maker.inputs]
        is_narrow = is_reduction or any(
            each in self._narrow and (name in _CARRIES or size <= own) for each, own in zip(inputs, sizes, strict=True)
        )
        # Of what else was given (a bound, which part) nothing is kept, unless it is a tensor.
        is_known = is_reduction or (name in _CARRIES and len(inputs) > 1)
        key = (name, maker.outputs.index(value), *inputs, self._values[value].shape) if is_known else value
        return self._number(key, narrow=is_narrow)

    def _size(self, value: int) -> int:
        shape = self._values[value].shape or ()
        return functools.reduce(lambda size, each: size * int(each), shape, 1)

    def _number(self, key: Hashable, *, narrow: bool = False) -> int:
        number = self._numbers.setdefault(key, len(self._numbers))
        if narrow:
            self._narrow.add(number)
        return number

    def _scaled(self, form: Form, by: Hashable) -> Form:
        """Return a form each shift of which is multiplied by the same."""
        shift: dict[int, float] = {}
        for each, times in form.shift.items():
            scaled = self._number((each, by), narrow=each in self._narrow)
            self._made_of[scaled] = self._made_of.get(scaled, 0) | 1 << each
            shift[scaled] = times
        return Form(form.exponential, shift)

    # --- what becomes of them ---------------------------------------------------------------------------------

    def _follow(self, operation: Operation) -> None:
        given = [self._forms.get(value) for value in operation.inputs]
        counting = [value for value in operation.outputs if self._counts[value]]
        mixed = 0
        for value in operation.inputs if self._mixed else ():
            mixed |= self._mixed.get(value, 0)
        if not (mixed or any(given)) or not counting or is_flat(operation):
            return
        is_apart = not any(self._values[value].connected for value in counting)
        outcome = self._outcome(operation, given, is_apart=is_apart)
        if isinstance(outcome, _Matters) and is_apart:  # computed of nothing but shifts: one more
            return self._make_shifts(operation)
        if isinstance(outcome, _Matters):
            mixed |= self._shifts_in(operation.inputs)
        elif outcome is not None and outcome.shift:
            for value in counting:
                self._forms[value], self._along[value] = outcome, self._spread(operation, value, is_apart=is_apart)
        if mixed:
            self._mixed.update(dict.fromkeys(counting, mixed))

    def _shifts_in(self, values: Iterable[int]) -> int:
        """Return the shifts that these values depend on, in whatever form, as a set of bits."""
        found = 0
        for value in values:
            found |= self._mixed.get(value, 0)
            for shift in self._forms[value].shift if value in self._forms else ():
                found |= 1 << shift
        return found

    def _outcome(self, operation: Operation, given: _Given, *, is_apart: bool) -> _Outcome:
        """Return the form of what an operation gives out."""
        name = _name_of(operation)
        if name not in _ELEMENTWISE:
            is_wide = any(each not in self._narrow for form in given if form for each in form.shift)
            if is_wide or (is_apart and name not in _CARRIES):  # of what is added up here each has another shift
                return _MATTERS
        if not is_apart and self._is_uneven(operation, name):
            return _MATTERS
        if name in ADDITIONS:
            return _sum(operation, given)
        if name in _TIMES or name in _PRODUCTS:
            return self._product(operation, name, given)
        beside = [value for value, form in zip(operation.inputs, given, strict=True) if form is None]
        if any(self._values[value].connected for value in beside):
            return _MATTERS
        rule = _RULES.get(name)
        return rule(given) if rule is not None else _MATTERS

    # --- along which dimensions they differ ---------------------------------------------------------------------

    def _extent(self, value: int) -> frozenset[int] | None:
        """Return the dimensions of a value, counted from the last one, which is -1; None where it has no shape."""
        shape = self._values[value].shape
        return None if shape is None else frozenset(i - len(shape) for i, size in enumerate(shape) if size != 1)

    def _spread(self, operation: Operation, value: int, *, is_apart: bool) -> frozenset[int] | None:
        """Return the dimensions along which the shift in a result differs; None where that is not known."""
        name, first = _name_of(operation), next(each for each in operation.inputs if each in self._forms)
        if name in _ELEMENTWISE:
            scales = name in _TIMES and not self._forms[first].exponential
            own = [self._along.get(each) if each in self._forms else self._extent(each) if scales else frozenset()
                   for each in operation.inputs]  # fmt: skip
            known = [each for each in own if each is not None]
            return frozenset[int]().union(*known) if len(known) == len(own) else None
        before, after = self._values[first].shape, self._values[value].shape
        keeps = name in _SUMS | _REDUCTIONS and before is not None and after is not None and len(before) == len(after)
        if keeps or name in _COPIES:
            return self._along.get(first)
        return self._extent(value) if is_apart and name not in _SPREADS else None

    def _is_uneven(self, operation: Operation, name: str) -> bool:
        """Tell whether a call adds up, or normalises, numbers of which each has another shift."""
        for place, value in enumerate(operation.inputs):
            along, shape = self._along.get(value), self._values[value].shape
            if value not in self._forms or not along or shape is None:
                continue
            if name in _PRODUCTS - {"einsum", "outer"}:
                taken = {-2 if place and len(shape) > 1 and name != "linear" else -1}
            elif name not in _SUMS | _SOFTMAX | _REDUCTIONS:
                continue
            elif name == "cross_entropy":
                taken = {1 - len(shape) if len(shape) > 1 else -1}
            elif operation.number is not None:
                taken = {int(operation.number) % len(shape) - len(shape)}
            else:
                taken = set(along) if self._values[operation.outputs[0]].shape == () else set()
            if along & taken:
                return True
        return False

    def _product(self, operation: Operation, name: str, given: _Given) -> _Outcome:
        """Multiply: exponents add up, and a shift is scaled by what has none."""
        added = [value for value, form in zip(operation.inputs, given, strict=True) if form and not form.exponential]
        if added:
            scales = [value for value, form in zip(operation.inputs, given, strict=True) if form is None]
            is_scaled = name == "mul" or (name == "div" and given[0] is not None)
            if not is_scaled or len(scales) < len(given) - 1:
                return _MATTERS
            number = operation.index if operation.number is None else operation.number
            return self._scaled(self._forms[added[0]], (name, *(scales or (number,))))
        if name == "linear" and len(given) > 2:  # a bias is not multiplied
            return _MATTERS
        signs = [1] * len(given)
        if name in _DIVISIONS:
            signs[-1] = -1 if len(given) > 1 or name != "div" else 1
        return Form(True, _total(zip(signs, given, strict=True)))


# --- how forms go through calls ------------------------------------------------------------------------------------


def _sum(operation: Operation, given: _Given) -> _Outcome:
    """Add: shifts add up; what is multiplied by an exponential may be added to what is by the same one."""
    if any(form is not None and form.exponential for form in given):
        return given[0] if _are_equal(given) and abs(operation.number or 0) <= _GUARD else _MATTERS
    if len(given) > 1 and operation.number is not None:  # times alpha
        return _MATTERS
    name = one_name(operation.name)
    signs = [-1 if name == "rsub" else 1, *[-1 if name == "sub" else 1] * (len(given) - 1)]
    return Form(False, _total(zip(signs, given, strict=True)))


def _total(terms: Iterable[tuple[int, Form | None]]) -> dict[int, float]:
    total: dict[int, float] = {}
    for sign, form in terms:
        for each, times in form.shift.items() if form is not None else ():
            total[each] = total.get(each, 0) + sign * times
    return {each: times for each, times in total.items() if times}


def _are_equal(given: _Given) -> bool:
    return all(form == given[0] for form in given)


def _joined(given: _Given) -> _Outcome:
    return given[0] if _are_equal(given) else _MATTERS


def _kept(given: _Given) -> _Outcome:
    """Carry on: beside what has a shift there are a mask, indices, zeros to write into, a filling."""
    return _joined([form for form in given if form is not None])


def _summed(given: _Given) -> _Outcome:
    kept = _kept(given)
    return kept if isinstance(kept, Form) and kept.exponential else _MATTERS


def _negated(given: _Given) -> _Outcome:
    form = given[0]
    return form if form is None or form.exponential else Form(False, _total([(-1, form)]))


def _squared(given: _Given) -> _Outcome:
    form = given[0]
    return Form(True, _total([(2, form)])) if form is not None and form.exponential else _MATTERS


def _turned(given: _Given, *, into_exponential: bool) -> _Outcome:
    form = given[0]
    return Form(into_exponential, form.shift) if form and form.exponential is not into_exponential else _MATTERS


def _shifted(given: _Given, *, leaves: bool) -> _Outcome:
    """Take in what is shifted, and nothing else that is; give it out as it was, or without its shift."""
    form = given[0]
    is_alone = form is not None and not form.exponential and not any(given[1:])
    return _MATTERS if not is_alone else form if leaves else None


_RULES: dict[str, Callable[[_Given], _Outcome]] = {
    **dict.fromkeys(_SUMS | _ONE_BY_ONE, _summed),
    **dict.fromkeys(_CARRIES | _REDUCTIONS | {"maximum", "minimum"}, _kept),
    **dict.fromkeys(_JOINS, _joined),
    **dict.fromkeys(_EXPONENTIALS, functools.partial(_turned, into_exponential=True)),
    **dict.fromkeys(_LOGARITHMS, functools.partial(_turned, into_exponential=False)),
    **dict.fromkeys(_SOFTMAX, functools.partial(_shifted, leaves=False)),
    "logsumexp": functools.partial(_shifted, leaves=True),
    "neg": _negated,
    "square": _squared,
}


def _name_of(operation: Operation) -> str:
    """Return the one name of a call; ``max`` of two tensors takes each number by itself."""
    name = one_name(operation.name)
    return f"{name}imum" if name in ("max", "min") and len(operation.inputs) > 1 else name


@functools.lru_cache(maxsize=4096)
def one_name(name: str) -> str:
    """Return one name for a function, its method, its operator and its forms in place."""
    bare = name.strip("_")
    return _ONE_NAME.get(bare, bare)
