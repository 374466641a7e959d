"""Cuts that are meant and cost nothing: by torch's own design, of a straight-through estimator, of a safe softmax."""

from __future__ import annotations

from collections.abc import Iterable

from gradscope.tracing.frames import code_name
from gradscope.tracing.recording import Operation

# Torch's own normalisation by the largest singular value: its power iteration is not recorded by design, since the
# derivative with respect to the singular vectors is zero (torch/nn/utils/spectral_norm.py, parametrizations.py).
# Named by torch's own frame where no code of the user's runs inside the model (nn.Sequential). And what an observer of
# quantisation sees: a scale is made of it, which fake_quantize_* has no derivative with respect to.
_BY_DESIGN = frozenset({
    "_SpectralNorm._power_method", "SpectralNorm.__call__", "SpectralNorm.compute_weight", "FakeQuantize.forward",
})  # fmt: skip
# Functions of torch that give a step forward and another gradient back (``hard=True``).
STRAIGHT_THROUGH = frozenset({"gumbel_softmax"})
_SUBTRACTIONS = frozenset("sub sub_ subtract __sub__ __isub__".split())
_ADDITIONS = _SUBTRACTIONS | frozenset("add add_ __add__ __radd__ __iadd__ __rsub__ rsub".split())
_EXPONENTIALS = frozenset("exp exp_ exp2 exp2_".split())
_DIVISIONS = frozenset("div div_ divide true_divide __truediv__ __itruediv__".split())
# What gives the largest of some numbers, and what hands numbers on in another shape.
_LARGEST = frozenset("max amax maximum cummax scatter_reduce scatter_reduce_ index_reduce index_reduce_".split())
_CARRIES = frozenset(
    "view reshape expand expand_as view_as unsqueeze squeeze flatten transpose permute index_select gather "
    "repeat_interleave __getitem__ clone contiguous to type_as float detach".split()
)


class Intentions:
    """Tells of operations that lose a part of a gradient whether that is meant: by what is made of it afterwards."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        self._consumers: dict[int, list[Operation]] = {}
        self._makers: dict[int, Operation] = {}
        for operation in operations:
            for value in operation.inputs:
                self._consumers.setdefault(value, []).append(operation)
            for value in operation.outputs:
                self._makers[value] = operation

    def is_straight_through(self, cut: Operation) -> bool:
        """Tell ``x + (q - x).detach()`` and ``hard - soft.detach() + soft``: the gradient is meant to go around.

        Either the detached value is a difference of something that it is added back to, or it is taken off
        something that the original is added to.
        """
        source = self._makers.get(cut.inputs[0])
        subtracted = set(source.inputs) if source is not None and source.name in _ADDITIONS else set()
        subtracted.add(cut.inputs[0])
        for output in cut.outputs:
            users = self._consumers.get(output, [])
            further = [after for user in users if user.name in _ADDITIONS for out in user.outputs
                       for after in self._consumers.get(out, ())]  # fmt: skip
            for user in (*users, *further):
                if user.name in _ADDITIONS and subtracted.intersection(user.inputs):
                    return True
        return False

    def is_shift(self, cut: Operation) -> bool:
        """Tell ``exp(x - x.max().detach())`` that is divided by its sum: no shift changes that, nor its derivative.

        Whatever the detached value is used for has to be that, or adding it again to the logarithm of the sum.
        """
        is_largest = self._comes_of_largest(cut)
        shifted: list[int] = []
        pending = list(cut.outputs)
        while pending:
            value = pending.pop()
            for user in self._consumers.get(value, ()):
                if user.name in _LARGEST or user.name in _CARRIES:
                    is_largest = is_largest or user.name in _LARGEST
                    pending += user.outputs
                elif user.name in _SUBTRACTIONS and user.inputs[1:] == (value,):
                    shifted += user.outputs
                elif not self._restores(user, value):
                    return False
        return is_largest and bool(shifted) and all(map(self._is_normalised, shifted))

    def _comes_of_largest(self, cut: Operation) -> bool:
        maker: Operation | None = cut
        while maker is not None and maker.name in _CARRIES and maker.inputs:
            maker = self._makers.get(maker.inputs[0])
        return maker is not None and maker.name in _LARGEST

    def _restores(self, user: Operation, shift: int) -> bool:
        """Tell ``log(sum) + shift``."""
        others = [self._makers.get(value) for value in user.inputs if value != shift]
        return user.name in _ADDITIONS and all(other is not None and other.name == "log" for other in others)

    def _is_normalised(self, shifted: int) -> bool:
        """Tell whether a value is used in an exponential only, which is divided by its sum, or whose log is taken."""
        users = self._consumers.get(shifted, ())
        if not users or any(user.name not in _EXPONENTIALS for user in users):
            return False
        made = {output for user in users for output in user.outputs}
        pending = list(made)
        while pending:
            for user in self._consumers.get(pending.pop(), ()):
                if user.name == "log" or (user.name in _DIVISIONS and made.issuperset(user.inputs)):
                    return True
                pending += [output for output in user.outputs if output not in made]
                made.update(user.outputs)
        return False


def is_by_design(cut: Operation) -> bool:
    """Tell a cut that torch's own functions make on purpose."""
    names = {cut.via, code_name(cut.place.code) if cut.place is not None else ""}
    names.update(name for each in cut.regions for name in (each.site.function, each.site.mechanism))
    return not _BY_DESIGN.isdisjoint(names)
