"""Cuts that are meant and cost nothing: by torch's own design, of a straight-through estimator, of a moving average."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

from gradscope.tracing.calls import OVERWRITES
from gradscope.tracing.frames import code_name
from gradscope.tracing.propagation import REPLACES_DATA, Walks, is_flat, union
from gradscope.tracing.recording import Operation, Recording
from gradscope.tracing.shifts import ADDITIONS, one_name

# Torch's own normalisation by the largest singular value: its power iteration is not recorded by design, since the
# derivative with respect to the singular vectors is zero (torch/nn/utils/spectral_norm.py, parametrizations.py).
# Named by torch's own frame where no code of the user's runs inside the model (nn.Sequential). And what an observer of
# quantisation sees: a scale is made of it, which fake_quantize_* has no derivative with respect to.
_BY_DESIGN = frozenset({
    "_SpectralNorm._power_method", "SpectralNorm.__call__", "SpectralNorm.compute_weight", "FakeQuantize.forward",
})  # fmt: skip
# Functions of torch that give a step forward and another gradient back (``hard=True``).
STRAIGHT_THROUGH = frozenset({"gumbel_softmax"})
# What takes a parameter itself out of the graph, by a line of its own.
_COPIES = frozenset({"detach", "data"})
# What moves weights, and mixes them with others.
_MIXES = frozenset(
    "data detach clone contiguous to type_as float view view_as reshape flatten unflatten getitem narrow split chunk "
    "cat stack add sub rsub mul div lerp copy".split()
)
# What takes in weights beside what it computes of: with a copy of some, it makes numbers to learn from.
_LAYERS = frozenset(
    "linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d embedding embedding_bag "
    "prelu layer_norm group_norm batch_norm instance_norm rms_norm lstm gru rnn_tanh rnn_relu lstm_cell gru_cell "
    "multi_head_attention_forward".split()
)

# So many sums are looked through, one within the other.
_DEEPEST = 4


class Intentions:
    """Tells of operations that lose a part of a gradient whether that is meant: by what is made of it afterwards."""

    def __init__(self, recording: Recording, walks: Walks) -> None:
        self._recording, self._walks = recording, walks
        self._cancelled: set[tuple[int, int]] = set()  # a value, and the sum in which it stands against itself cut off

    @functools.cached_property
    def _consumers(self) -> dict[int, list[Operation]]:
        """The operations that take a value in; asked for only where something is lost."""
        consumers: dict[int, list[Operation]] = {}
        for operation in self._recording.operations:
            for value in operation.inputs:
                consumers.setdefault(value, []).append(operation)
        return consumers

    @functools.cached_property
    def _makers(self) -> dict[int, Operation]:
        """The operation that made a value."""
        return {value: operation for operation in self._recording.operations for value in operation.outputs}

    def is_straight_through(self, cut: Operation) -> bool:
        """Tell ``x + (q - x).detach()`` and ``hard - soft.detach() + soft``: the gradient is meant to go around.

        What is cut off, or a term of it, stands once more, with the other sign, in a sum that it becomes a term of.
        """
        taken = cut.inputs[0]
        # Under no_grad it is the sum itself of which nothing is recorded.
        own = self._terms_of(cut) if one_name(cut.name) in ADDITIONS else [(1, taken), *self._terms(taken)]
        found = {(term, user.index) for user, sign, total in self._sums_with(cut.outputs)
                 for own_sign, term in own if (-sign * own_sign, term) in total}  # fmt: skip
        self._cancelled |= found
        return bool(found)

    def _sums_with(self, values: Iterable[int]) -> Iterator[tuple[Operation, int, set[tuple[int, int]]]]:
        """Yield the sums that a value is a term of, its sign there, and all terms with theirs."""
        pending = [(value, 1, 0) for value in values]
        while pending:
            value, sign, depth = pending.pop()
            for user in self._consumers.get(value, ()) if depth < _DEEPEST else ():
                if one_name(user.name) in ADDITIONS:
                    own = sign * next(sign for sign, term in _signed(user) if term == value)
                    yield user, own, set(self._terms_of(user))
                    pending += [(output, own, depth + 1) for output in user.outputs]

    def _terms(self, value: int, sign: int = 1, depth: int = 0) -> list[tuple[int, int]]:
        """Return what a value is the sum of, and what is in the sums among that, each with its sign."""
        maker = self._makers.get(value)
        is_sum = maker is not None and one_name(maker.name) in ADDITIONS and depth < _DEEPEST
        return self._terms_of(maker, sign, depth + 1) if maker is not None and is_sum else []

    def _terms_of(self, addition: Operation, sign: int = 1, depth: int = 0) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for own, value in _signed(addition):
            found += [(sign * own, value), *self._terms(value, sign * own, depth)]
        return found

    def lead_on(self, cut: Operation, intended: set[int]) -> bool:
        """Tell whether what is cut off goes on to other cuts only, that are meant (by index).

        ``scale = x.abs().mean().detach()`` of ``x + (scale * x.sign() - x).detach()``: nothing is missed there. Nor
        is it where a value stands against itself: ``reward.detach() * score``, added and taken off for its gradient.
        """
        counts, sinks = self._walks.counts, self._recording.sinks
        pending, seen = [value for value in cut.outputs if counts[value]], set(cut.outputs)
        while pending:
            value = pending.pop()
            users = self._consumers.get(value)
            if users is None or value in sinks:  # the result
                return False
            for user in users:
                if user.index not in intended and not is_flat(user) and (value, user.index) not in self._cancelled:
                    pending += [value for value in user.outputs if counts[value] and value not in seen]
                    seen.update(user.outputs)
        return True

    # --- a moving average of weights ------------------------------------------------------------------------

    def is_update(self, cut: Operation, flowing: int) -> bool:
        """Tell weights that are cut off to be kept elsewhere: by a teacher, a target network, an average of weights.

        All that comes of them is moved or mixed into other parameters, or is a copy that layers take in unrecorded.
        ``flowing`` are the sources that are linked to a result.
        """
        recording, walks = self._recording, self._walks
        given = {value for name, value in recording.leaves.items() if name.startswith("input.")}
        are_weights = any(recording.values[value].leaf and value not in given for value in cut.inputs)
        is_copy = cut.name in _COPIES and not cut.regions
        pending, seen, is_kept = [cut] if are_weights else [], {cut.index}, False
        while pending:
            operation = pending.pop()
            if self._is_kept(operation, flowing, union(walks.data, given)) or (
                is_copy and operation.regions and operation.name in _LAYERS
            ):
                is_kept = True
                continue
            if one_name(operation.name.rpartition(".")[2]) not in _MIXES:
                return False
            for value in operation.outputs:
                users = [user for user in self._consumers.get(value, ()) if self._counts(user)]
                if walks.counts[value] and (not users or value in recording.sinks):
                    return False
                pending += [user for user in users if user.index not in seen]
                seen.update(user.index for user in users)
        return is_kept

    def _counts(self, operation: Operation) -> bool:
        return any(self._walks.counts[value] for value in operation.outputs)

    def _is_kept(self, operation: Operation, flowing: int, given: int) -> bool:
        """Tell whether an operation updates a parameter that is then a constant, or by what was in it before.

        ``given`` are the inputs: what is made of one is no average of weights.
        """
        values, walks = self._recording.values, self._walks
        if operation.name == "__deepcopy__":
            users = [user for value in operation.outputs for user in self._consumers.get(value, ())]
            recorded = any(values[value].connected for user in users for value in user.outputs)
            return not recorded and all(user.name in _LAYERS for user in users)
        if not any(values[value].leaf for value in operation.outputs):
            return False
        own = walks.linked[operation.inputs[0]]
        maker = self._makers.get(operation.inputs[-1])
        wrote = maker if maker is not None and maker.name == operation.name else operation  # through ``.data``
        written = union(walks.data, wrote.inputs[1:])
        averages = written & own or operation.name.rpartition(".")[2] not in OVERWRITES | REPLACES_DATA
        if own & flowing:
            return bool(averages) and (written | own).bit_count() <= 2
        return not written & given


def _signed(addition: Operation) -> Iterator[tuple[int, int]]:
    """Yield the sign and the value of each term; of a number that is no tensor there is none."""
    first, others = {"rsub": (-1, 1), "sub": (1, -1)}.get(one_name(addition.name), (1, 1))
    for number, value in enumerate(addition.inputs):
        yield others if number else first, value


def is_by_design(cut: Operation) -> bool:
    """Tell a cut that torch's own functions make on purpose."""
    names = {cut.via, code_name(cut.place.code) if cut.place is not None else ""}
    names.update(name for each in cut.regions for name in (each.site.function, each.site.mechanism))
    return not _BY_DESIGN.isdisjoint(names)
