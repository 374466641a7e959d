"""From a recording to the cuts: which sources lose their gradient, where, and to what.

What the numbers do (``propagation.py``) is compared with what autograd's own graph reaches. The cut is the
frontier: an operation that takes in a connected value and gives out an unconnected one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from gradscope.tracing.calls import WHOLE
from gradscope.tracing.cuts import RULE_OF_OPERATION, Cut, blamed, cut_at, cut_of_loss
from gradscope.tracing.frames import source_site
from gradscope.tracing.intended import STRAIGHT_THROUGH, Intentions, is_by_design
from gradscope.tracing.propagation import Walks, is_flat, union
from gradscope.tracing.recording import Operation, Recording, Site
from gradscope.tracing.shifts import Shifts


@dataclass(slots=True)
class Diagnosis:
    """What one run showed: a status per source, and the cuts in the order met.

    ``untold`` are the places where numbers were taken out of torch that no cut tells of and nobody follows.
    """

    statuses: dict[str, str]
    cuts: dict[Site, Cut]
    outside_cuts: dict[Site, Cut]
    live: set[int]
    losses: list[tuple[Operation, int]] = field(default_factory=list)
    surrogates: set[str] = field(default_factory=set)
    untold: list[Site] = field(default_factory=list)

    def needs(self, site: Site) -> bool:
        """Tell whether some source is lost only where this region is active.

        Then the source stays blocked as long as the region is entered, whatever else is removed.
        """
        inside = outside = 0
        for operation, lost in self.losses:
            if any(region.site == site for region in operation.regions):
                inside |= lost
            else:
                outside |= lost
        return bool(inside & ~outside)

    @property
    def blocked(self) -> set[str]:
        """Return the names of the sources whose gradient is lost."""
        return {name for name, status in self.statuses.items() if status == "blocked"}


def diagnose(recording: Recording) -> Diagnosis:
    """Return the status of every source and the cuts that explain the lost ones."""
    diagnosis = _diagnose(recording)
    if recording.went_back and len(recording.training.judged) > 1 and "partial" in diagnosis.statuses.values():
        _excuse(diagnosis, recording)
    return diagnosis


def _excuse(diagnosis: Diagnosis, recording: Recording) -> None:
    """Take a source for whole that some backward passes of the target reach and others not at all: each has its loss.

    A discriminator is trained on what a generator gave out, detached, and the generator in a pass of its own.
    """
    passes = [(each.values, each.reached or frozenset()) for each in recording.training.judged]
    each = [_diagnose(replace(recording, sinks=sinks, reached=reached)).statuses for sinks, reached in passes]
    for name in [name for name, status in diagnosis.statuses.items() if status == "partial"]:
        found = {statuses[name] for statuses in each}
        if "flows" in found and "partial" not in found:
            diagnosis.statuses[name] = "flows"
            for cut in diagnosis.cuts.values():
                cut.elsewhere |= cut.partial & {name}
                cut.partial.discard(name)


def _diagnose(recording: Recording) -> Diagnosis:
    names = list(recording.leaves) + list(recording.outside)
    start = {**recording.leaves, **recording.outside}
    bits = {name: 1 << index for index, name in enumerate(names)}
    walks = Walks(recording, start, bits)
    statuses = _statuses(recording, walks, bits)
    wanted = _bits_of(statuses, bits)
    frozen = sum(bits[name] for name in recording.froze)
    losses = [each for each in _frontier(recording, walks, wanted["blocked"])
              if not is_by_design(each[0]) and not _is_frozen_there(each, frozen)]  # fmt: skip
    cuts = _cuts(recording, losses, bits)
    _add_left(cuts, recording, walks, wanted["blocked"], bits)
    _add_flat(cuts, recording, walks, wanted["nondifferentiable"], bits)
    _add_beside_flat(cuts, recording, walks, wanted["nondifferentiable"], bits)
    _add_escapes(cuts, recording, walks, wanted["blocked"], bits)
    _add_inside(cuts, statuses, recording, walks, bits)
    by_hook = sum(bits[name] for name in recording.by_hook)
    surrogates = _add_partial(cuts, statuses, recording, walks, wanted["flows"] & ~by_hook, bits)
    for operation in recording.operations:
        if operation.name in STRAIGHT_THROUGH:
            surrogates |= _named(union(walks.linked, operation.inputs), bits)
    _add_spoiled(cuts, recording, walks, bits)
    _add_losses(cuts, statuses, recording)
    _add_left_open(cuts, statuses, recording)
    explained = {name for cut in cuts.values() for name in cut.sources}
    statuses.update({name: "flows" for name in recording.froze - explained if statuses[name] == "blocked"})
    outside = sum(bits[name] for name in recording.outside)
    return Diagnosis(
        statuses=statuses,
        cuts=cuts,
        outside_cuts=_cuts(recording, list(_frontier(recording, walks, outside)), bits),
        live=walks.live,
        losses=losses,
        surrogates=surrogates,
        untold=_untold(cuts, statuses, recording, walks, bits),
    )


# --- statuses ----------------------------------------------------------------------------------------


def _statuses(recording: Recording, walks: Walks, bits: dict[str, int]) -> dict[str, str]:
    data = union(walks.data, recording.sinks)
    smooth = union(walks.smooth, recording.sinks)
    reached = frozenset() if recording.left else recording.reached
    escaped = union(walks.smooth, [value for operation in recording.escapes for value in operation.inputs])
    denied = _denied(recording, walks)
    statuses = {}
    for name in recording.leaves:
        bit = bits[name]
        if name in reached:
            statuses[name] = "flows" if smooth & bit or not data & bit else "nondifferentiable"
        elif smooth & bit & ~denied:
            statuses[name] = "blocked"
        elif data & bit & ~denied:
            statuses[name] = "nondifferentiable"
        else:
            statuses[name] = "blocked" if escaped & bit else "unused"
    return statuses


def _denied(recording: Recording, walks: Walks) -> int:
    """Return the sources that every call links to the result, where autograd knows that the result has nothing of them.

    An output of a call need not depend on all of its inputs: attention weights have nothing of the output projection,
    a derivative nothing of the last bias. What is taken as one call may lose them inside; and of a source that lost a
    link anywhere autograd does not know all that it does.
    """
    if not recording.walked:
        return 0
    opaque = 0
    for operation in recording.operations:
        if operation.custom:
            opaque |= union(walks.linked, operation.inputs)
    return union(walks.linked, recording.sinks) & ~opaque & ~walks.parted


def _add_inside(
    cuts: dict[Site, Cut], statuses: dict[str, str], recording: Recording, walks: Walks, bits: dict[str, int]
) -> None:
    """Blame what is taken as one call for the sources that no other call loses: a switch inside a script."""
    explained = {name for cut in cuts.values() for name in cut.sources}
    left = sum(bits[name] for name, status in statuses.items() if status == "blocked" and name not in explained)
    for operation in recording.operations if left and recording.walked else ():
        lost = left & union(walks.linked, operation.inputs) & union(walks.linked, operation.outputs)
        if lost and operation.custom and operation.place is not None and walks.live.intersection(operation.outputs):
            cut_at(cuts, recording, operation).sources |= _named(lost, bits)


def _bits_of(statuses: dict[str, str], bits: dict[str, int]) -> dict[str, int]:
    """Return the sources of each status."""
    found: dict[str, int] = defaultdict(int)
    for name, status in statuses.items():
        found[status] |= bits[name]
    return found


def _named(lost: int, bits: dict[str, int]) -> set[str]:
    return {name for name, bit in bits.items() if bit & lost}


# --- frontiers ---------------------------------------------------------------------------------------


def _frontier(recording: Recording, walks: Walks, wanted: int) -> Iterator[tuple[Operation, int]]:
    """Yield the operations that lose the gradient of wanted sources, each with those (as a bit set)."""
    wanted &= walks.parted  # nearly always nothing
    for operation in recording.operations if wanted else ():
        arriving = 0
        for value in operation.inputs:
            arriving |= walks.linked[value] & walks.smooth[value]
        lost = arriving & ~union(walks.linked, operation.outputs) & wanted
        if lost:  # of nearly all operations nothing is
            outputs = [value for value in operation.outputs if walks.counts[value]]
            lost &= union(walks.smooth, outputs) & union(walks.counts, outputs)
        if lost:
            yield operation, lost


def _is_frozen_there(loss: tuple[Operation, int], frozen: int) -> bool:
    """Tell a call that is not recorded since the call of the model has frozen all that it takes in."""
    operation, lost = loss
    cuts_itself = operation.regions or operation.custom or operation.refusal or operation.name in RULE_OF_OPERATION
    return not lost & ~frozen and not cuts_itself


def _cuts(recording: Recording, losses: list[tuple[Operation, int]], bits: dict[str, int]) -> dict[Site, Cut]:
    cuts: dict[Site, Cut] = {}
    for operation, lost in losses:
        for cut in blamed(cuts, recording, operation):
            cut.sources |= _named(lost, bits)
    return cuts


def _add_flat(cuts: dict[Site, Cut], recording: Recording, walks: Walks, wanted: int, bits: dict[str, int]) -> None:
    """Blame the operations without a useful derivative: removing a switch cannot help there."""
    for operation in recording.operations if wanted else ():
        outputs = walks.live.intersection(operation.outputs)
        if not outputs:
            continue
        lost = union(walks.smooth, operation.inputs) & ~union(walks.smooth, outputs) & wanted
        if lost and operation.place is not None:
            cut = cut_at(cuts, recording, operation)
            cut.rule = "GS402" if is_flat(operation) else RULE_OF_OPERATION.get(operation.name, "GS401")
            cut.flat = True
            if operation.refusal is not None:
                cut.words, cut.error = operation.refusal.message, operation.refusal.error
                cut.raises = operation.refusal.raises
            cut.sources |= _named(lost, bits)


def _add_beside_flat(
    cuts: dict[Site, Cut], recording: Recording, walks: Walks, wanted: int, bits: dict[str, int]
) -> None:
    """Blame what unlinks the sources of a flat operation as well: a surrogate in its place does not help there."""
    flat = [cut for cut in cuts.values() if cut.flat]
    for operation in recording.operations if flat else ():
        outputs = [value for value in walks.live.intersection(operation.outputs)
                   if recording.values[value].differentiable]  # fmt: skip
        arriving = union(walks.linked, operation.inputs) & wanted
        lost = arriving & union(walks.data, outputs) & ~union(walks.linked, operation.outputs)
        if not lost or is_flat(operation):
            continue
        # What comes before it in the forward pass lies behind it on the way back.
        is_before = bool(lost & union(walks.smooth, outputs))
        for cut in blamed(cuts, recording, operation):
            if not cut.flat:
                cut.sources |= _named(lost, bits)
                if cut.outer is None and is_before:
                    cut.outer = next((each.site for each in flat if each.sources & cut.sources), None)
    for operation in recording.escapes if flat else ():  # whole numbers that left torch
        gone = union(walks.data, operation.inputs) & ~union(walks.smooth, operation.inputs) & wanted
        if gone and operation.place is not None and walks.live.intersection(operation.inputs):
            cut = cut_at(cuts, recording, operation)
            cut.escape = True
            cut.sources |= _named(gone, bits)


def _add_left(cuts: dict[Site, Cut], recording: Recording, walks: Walks, wanted: int, bits: dict[str, int]) -> None:
    """Blame the calls by which the whole result left torch: whatever else is fixed, it has no gradient."""
    for operation in recording.left:
        lost = union(walks.smooth, operation.inputs) & wanted
        if lost and operation.place is not None:
            cut_at(cuts, recording, operation).sources |= _named(lost, bits)


def _add_escapes(cuts: dict[Site, Cut], recording: Recording, walks: Walks, wanted: int, bits: dict[str, int]) -> None:
    """Blame the calls that took numbers into Python, where no other trace of a blocked source goes on."""
    left = wanted & ~union(walks.smooth, recording.sinks)
    for operation in recording.escapes if left else ():
        lost = union(walks.smooth, operation.inputs) & left
        if lost and operation.place is not None:
            cut = cut_at(cuts, recording, operation)
            cut.escape = True
            cut.sources |= _named(lost, bits)


def _untold(
    cuts: dict[Site, Cut], statuses: dict[str, str], recording: Recording, walks: Walks, bits: dict[str, int]
) -> list[Site]:
    """Return the places after which the numbers of a source may matter unseen.

    All numbers of a tensor that else gets its gradient went to numpy or a list; or whole numbers (which row, how
    many) that were worked out of a source that seems unused went into Python.
    """
    now = _bits_of(statuses, bits) if recording.escapes else {}
    found: dict[Site, None] = {}
    for operation in recording.escapes:
        whole = union(walks.smooth, operation.inputs) & now["flows"] if operation.name in WHOLE else 0
        if operation.place is not None and (whole or union(walks.data, operation.inputs) & now["unused"]):
            found[source_site(operation.place, operation.name)] = None
    return [site for site in found if site not in cuts]


def _add_partial(
    cuts: dict[Site, Cut],
    statuses: dict[str, str],
    recording: Recording,
    walks: Walks,
    wanted: int,
    bits: dict[str, int],
) -> set[str]:
    """Note the sources whose gradient arrives on one path and is cut on another; return those with a surrogate."""
    surrogates: set[str] = set()
    losses = list(_frontier(recording, walks, wanted))
    intentions = Intentions(recording, walks)
    intended = {operation.index for operation, _ in losses
                if is_by_design(operation) or intentions.is_straight_through(operation)}  # fmt: skip
    shifts = Shifts(recording, [each for each, _ in losses if each.index not in intended], walks)
    for operation, lost in losses:
        if operation.index in intended:
            surrogates |= _named(lost, bits)
            continue
        if shifts.cost_nothing(operation) or intentions.is_update(operation, wanted):
            continue
        if intended and intentions.lead_on(operation, intended):
            continue
        names = {name for name in _named(lost, bits) if name in statuses}
        found = blamed(cuts, recording, operation)
        raises = any(cut.raises for cut in found)  # then no path carries a gradient to its end
        for cut in found:
            kept = cut.sources if raises else cut.partial
            kept |= names
        statuses.update(dict.fromkeys(names, "blocked" if raises else "partial"))
    return surrogates


def _add_spoiled(cuts: dict[Site, Cut], recording: Recording, walks: Walks, bits: dict[str, int]) -> None:
    """Blame the writes that changed what backward needs where autograd does not look: the gradient errs."""
    for operation in recording.operations:
        if operation.refusal is not None and operation.refusal.silent and walks.live.intersection(operation.outputs):
            for cut in blamed(cuts, recording, operation):
                cut.wrong |= _named(union(walks.linked, operation.inputs), bits)


def _add_losses(cuts: dict[Site, Cut], statuses: dict[str, str], recording: Recording) -> None:
    """Blame the operations at which the backward pass lost a gradient that the graph promises."""
    for loss in recording.losses:
        what = loss.what.rpartition(" ")[2]
        names = {name for name in loss.sources if statuses.get(name) in ("flows", "partial", "zero")}
        cut = cut_of_loss(cuts, recording, loss) if names else None
        if what == "zero":
            statuses.update(dict.fromkeys(names, "zero"))
        elif what in ("none", "raises"):
            statuses.update(dict.fromkeys(names, "blocked"))
        if cut is None:
            continue
        kept = {"zero": cut.zero, "nonfinite": cut.nonfinite}.get(what, cut.sources)
        kept |= names
        cut.raises = cut.raises or what == "raises"


def _add_left_open(cuts: dict[Site, Cut], statuses: dict[str, str], recording: Recording) -> None:
    """Blame the switches that are still off when the call is over: the loss will not be recorded."""
    for region in recording.left_open:
        cut = cuts.setdefault(region.site, Cut(region.site, "GS107", chain=region.chain))
        cut.rule = "GS107"
        cut.words = "recording is still off when the call is over: nothing after it is recorded, the loss included."
        for name, status in statuses.items():
            if status in ("flows", "partial", "zero"):
                statuses[name] = "blocked"
                cut.sources.add(name)
