"""From a recording to the cuts: which sources lose their gradient, where, and to what.

Two graphs are compared. The data-flow graph is the recording itself; what autograd connects is
known per value. A source whose data reaches the output and whose gradient does not is blocked, and
the cut is the frontier: an operation that takes in a connected value and gives out an unconnected one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gradscope.tracing.frames import code_name, source_site
from gradscope.tracing.recording import Operation, Recording, Region, Site

# How an operation that stops the gradient by itself is called in the catalogue.
RULE_OF_OPERATION = {
    **dict.fromkeys(("detach", "detach_"), "GS201"),
    "data": "GS202",
    **dict.fromkeys(("tensor", "new_tensor"), "GS203"),
    **dict.fromkeys(("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__array__"), "GS302"),
    **dict.fromkeys(("argmax", "argmin", "argsort", "multinomial", "one_hot", "nonzero"), "GS401"),
    **dict.fromkeys(
        [
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "__eq__",
            "__ne__",
            "__lt__",
            "__le__",
            "__gt__",
            "__ge__",
            "bucketize",
            "searchsorted",
        ],
        "GS402",
    ),
    **dict.fromkeys(("long", "int", "short", "char", "byte", "bool", "to", "type"), "GS403"),
}
RULE_OF_REGION = {
    ("inference_mode", "decorator"): "GS101",
    ("no_grad", "decorator"): "GS102",
    ("inference_mode", "block"): "GS103",
    ("no_grad", "block"): "GS104",
}


@dataclass(slots=True)
class Cut:
    """One place where gradients end: a region or a single operation."""

    site: Site
    rule: str
    sources: set[str] = field(default_factory=set)
    chain: tuple[str, ...] = ()
    outer: Site | None = None
    module: str = ""


@dataclass(slots=True)
class Diagnosis:
    """What one run showed: a status per source, and the cuts in the order met."""

    statuses: dict[str, str]
    cuts: dict[Site, Cut]
    outside_cuts: dict[Site, Cut]
    live: set[int]
    losses: list[tuple[Operation, int]] = field(default_factory=list)

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
    """Return the status of every source and the cuts that explain the blocked ones."""
    names = list(recording.leaves) + list(recording.outside)
    start = {**recording.leaves, **recording.outside}
    bits = {name: 1 << index for index, name in enumerate(names)}
    data, linked = _propagate(recording, start, bits)
    live = _live_values(recording)
    flowing = _union(data, recording.sinks)
    statuses = {}
    for name in recording.leaves:
        if name in recording.reached:
            statuses[name] = "flows"
        else:
            statuses[name] = "blocked" if flowing & bits[name] else "unused"
    wanted = sum(bits[name] for name, status in statuses.items() if status == "blocked")
    outside = sum(bits[name] for name in recording.outside)
    losses = _frontier(recording, linked, live, wanted)
    return Diagnosis(
        statuses=statuses,
        cuts=_cuts(recording, losses, bits),
        outside_cuts=_cuts(recording, _frontier(recording, linked, live, outside), bits),
        live=live,
        losses=losses,
    )


def crash_cuts(recording: Recording) -> dict[Site, Cut]:
    """Return the regions that made the inference tensors which a crashed call took in."""
    cuts: dict[Site, Cut] = {}
    if recording.pending is None:
        return cuts
    makers = {value: op for op in recording.operations for value in op.outputs}
    for value in recording.pending.inputs:
        maker = makers.get(value)
        if maker is not None and recording.values[value].inference:
            _blame(cuts, recording, maker, set())
    return cuts


# --- the two graphs --------------------------------------------------------------------------------


def _propagate(recording: Recording, start: dict[str, int], bits: dict[str, int]) -> tuple[list[int], list[int]]:
    """Return, per value, the sources whose data and whose gradient link reach it (as bit sets)."""
    data = [0] * len(recording.values)
    linked = [0] * len(recording.values)
    for name, value in start.items():
        data[value] = linked[value] = bits[name]
    for operation in recording.operations:
        arriving = _union(data, operation.inputs)
        joined = _union(linked, operation.inputs)
        for output in operation.outputs:
            data[output] |= arriving
            if recording.values[output].connected:
                linked[output] |= joined
    return data, linked


def _live_values(recording: Recording) -> set[int]:
    """Return the values whose data reaches an output."""
    live = set(recording.sinks)
    for operation in reversed(recording.operations):
        if live.intersection(operation.outputs):
            live.update(operation.inputs)
    return live


def _frontier(recording: Recording, linked: list[int], live: set[int], wanted: int) -> list[tuple[Operation, int]]:
    """Return the operations that lose the gradient of wanted sources, each with those (as a bit set)."""
    losses: list[tuple[Operation, int]] = []
    for operation in recording.operations if wanted else ():
        if not live.intersection(operation.outputs):
            continue
        kept = _union(linked, operation.outputs)
        lost = _union(linked, operation.inputs) & ~kept & wanted
        if lost:
            losses.append((operation, lost))
    return losses


def _cuts(recording: Recording, losses: list[tuple[Operation, int]], bits: dict[str, int]) -> dict[Site, Cut]:
    cuts: dict[Site, Cut] = {}
    for operation, lost in losses:
        _blame(cuts, recording, operation, {name for name, bit in bits.items() if bit & lost})
    return cuts


def _blame(cuts: dict[Site, Cut], recording: Recording, operation: Operation, sources: set[str]) -> None:
    """Attribute a lost gradient to the regions that were active, outermost first, or to the call."""
    outer: Site | None = None
    regions: Iterable[Region] = operation.regions
    if operation.regions:
        for region in regions:
            rule = _rule_of(region.site)
            cut = cuts.setdefault(region.site, Cut(region.site, rule, chain=region.chain, outer=outer))
            cut.sources |= sources
            outer = region.site
    elif operation.place is not None:
        site = source_site(operation.place, operation.name)
        rule = RULE_OF_OPERATION.get(operation.name, "GS503")
        cut = cuts.setdefault(site, Cut(site, rule, chain=(code_name(operation.place.code),)))
        cut.sources |= sources
        cut.module = _module_path(recording, operation)


def _rule_of(site: Site) -> str:
    how = "decorator" if site.how == "decorator" else "block"
    return RULE_OF_REGION.get((site.mechanism, how), "GS105")


def _module_path(recording: Recording, operation: Operation) -> str:
    named = [scope.module for scope in recording.ancestors(operation.scope) if scope.module]
    return named[-1] if named else ""


def _union(sets: list[int], values: Iterable[int]) -> int:
    result = 0
    for value in values:
        result |= sets[value]
    return result
