"""What training runs: the forward passes of the module classes, and every function that their results come from."""

from __future__ import annotations

from collections.abc import Container
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeAlias

from gradscope.scanning.facts import APART, LOSS, NOTHING, Atoms
from gradscope.scanning.intent import meant_by_class
from gradscope.scanning.package import Package, Place
from gradscope.scanning.reach import FORWARDS, NOT_COMPUTE, Reach, Use, source_of

# From a forward pass to a function, call by call.
Way: TypeAlias = list[Place]
# What a gradient is for: ``param:x``, ``attr:x``, ``call:self.x``, without the way it takes.
Sources: TypeAlias = frozenset[str]


class Loss(IntEnum):
    """How much of a gradient is lost in a function that a forward pass calls."""

    NONE = 0
    PART = 1
    WHOLE = 2


class Argument(NamedTuple):
    """What a call is given: its target as written, the position or keyword, and the atom that is handed over."""

    target: str
    position: str
    atom: str


class Training:
    """Answers which functions a forward pass comes to, on which way, and what it loses there."""

    def __init__(self, reach: Reach) -> None:
        self.reach = reach
        self.package: Package = reach.package
        self._entries: dict[Place, list[Use]] = {}
        self._callers = lru_cache(maxsize=None)(self._callers_for)

    @cached_property
    def reached(self) -> dict[Place, Way]:
        """The functions that forward passes call, each with the shortest way to it."""
        return self._reached_from_forwards()

    @cached_property
    def always_reached(self) -> frozenset[Place]:
        """The same without the calls that are made in training only, or in evaluation only."""
        return frozenset(self._reached_from_forwards(always=True))

    def _reached_from_forwards(self, *, always: bool = False) -> dict[Place, Way]:
        reached: dict[Place, Way] = {}
        for owner, entry in self.trained:
            found = self.reach.reachable(entry, owner, always=always)
            for place, way in found.items():
                if place not in reached or len(way) < len(reached[place]):
                    reached[place] = way
            if not always:
                for place in found.keys() & self.reach.regions.keys():
                    self._entries.setdefault(place, []).append((entry, owner))
        return reached

    @cached_property
    def trained(self) -> list[tuple[Place, Place]]:
        """The module classes with their forward passes, less those that run without gradients by their nature."""
        owners = (Place(facts.module, name) for facts in self.package.own for name in facts.classes)
        return [
            (owner, entry)
            for owner in owners
            if (entries := self._forwards(owner))
            and not meant_by_class(Place(owner.module, f"{owner.name}.forward"), self.package)
            for entry in entries
        ]

    def _forwards(self, owner: Place) -> list[Place]:
        """Return the forward passes of a module class: its own, and inherited ones if it has a region they may call."""
        own = [Place(owner.module, f"{owner.name}.{name}") for name in FORWARDS]
        if owner in self._with_regions:
            own += [each for name in FORWARDS if (each := self.package.method(owner, name)) and each not in own]
        known = [each for each in own if self.package.function(each) is not None and not self.reach.gives_data(each)]
        return known if known and self.package.is_module(owner) else []

    @cached_property
    def _with_regions(self) -> frozenset[Place]:
        """The classes with a region in a method of their own."""
        return frozenset(owner for place in self.reach.regions if (owner := self.reach.owner(place)) is not None)

    def freezes(self, owner: Place | None, names: Container[str]) -> bool:
        """Tell whether a class always freezes one of these attributes: ``self.encoder.requires_grad_(False)``."""
        return owner is not None and any(name in names for name in self._frozen.get(owner, ()))

    def runs_what_is_frozen(self, atoms: Atoms, place: Place) -> bool:
        """Tell whether all that these say of modules is of some that their class freezes."""
        owner = self.reach.owner(place)
        names = {source_of(atom).partition(":")[2].removeprefix("self.").partition(".")[0] for atom in atoms}
        names = {name for name in names if not (owner and self._is_weightless(owner, name))}
        return bool(names) and all(self.freezes(owner, {name}) for name in names)

    def _is_weightless(self, owner: Place, name: str) -> bool:
        """Tell whether a part has no parameters, or a method uses none."""
        method = self.package.method(owner, name)
        if method is not None:
            return not self.reach.touches(method, owner)
        return self.package.attribute(owner, name) == "weightless"

    @cached_property
    def _frozen(self) -> dict[Place, set[str]]:
        """The attributes that classes freeze, by class."""
        found: dict[Place, set[str]] = {}
        for facts in self.package.own:
            for site in facts.sites:
                owner = self.reach.owner(Place(facts.module, site.function)) if site.rule == "GS901" else None
                if owner is not None and not site.conditional:
                    sources = (source_of(atom).partition(":") for atom in site.depends)
                    found.setdefault(owner, set()).update(name for kind, _, name in sources if kind == "attr")
        return found

    # --- what is lost on the way back -------------------------------------------------------------

    def loss(self, atoms: Atoms, place: Place, only: Use | None = None) -> tuple[Loss, Way]:
        """Return how much of the gradient for these is lost to a forward pass that calls the function, and the way.

        ``only``: to this forward pass; else to the one that loses most.

        A caller that hands over nothing live loses nothing; one that lets a gradient past the call loses a part.
        """
        sources = frozenset(source_of(atom) for atom in atoms if self._may_carry(atom, place, self.reach.owner(place)))
        worst: tuple[Loss, Way] = Loss.NONE, self.reached[place]
        for entry in self._entries.get(place, ()) if only is None else (only,):
            callers = self._callers(entry)
            for use in [use for use in callers if use[0] == place]:
                worst = max(worst, self._loss_at(use, sources, entry, callers, []), key=lambda found: found[0])
                if worst[0] is Loss.WHOLE:
                    return worst
        return worst

    def _callers_for(self, entry: Use) -> dict[Use, list[Use]]:
        """Return who calls whom for the value of a forward pass, from the called to the callers."""
        callers: dict[Use, list[Use]] = {entry: []}
        pending = [entry]
        while pending:
            use = pending.pop()
            for call, target in self.package.callees(*use):
                if self.reach.counts(call, target) and target.name.rpartition(".")[2] not in NOT_COMPUTE:
                    called = (target, self.reach.owner_for(target, use[1]))
                    if called not in callers:
                        pending.append(called)
                    if use not in callers.setdefault(called, []):
                        callers[called].append(use)
        return callers

    def _loss_at(
        self, use: Use, sources: Sources, entry: Use, callers: dict[Use, list[Use]], passed: list[Use]
    ) -> tuple[Loss, Way]:
        way = [each[0] for each in (use, *reversed(passed))]
        if use == entry or len(passed) > FARTHEST:
            return Loss.WHOLE, way
        worst: tuple[Loss, Way] = Loss.NONE, way
        if use in passed:  # in circles: whoever came into the circle is looked at as well
            return worst
        for caller in callers[use]:
            targets = {call.target for call, target in self.package.callees(*caller) if target == use[0]}
            if self._is_lost_anyway(caller, targets):
                continue
            lost = self._lost_to(caller, use, targets, sources)
            if lost is None:
                return Loss.WHOLE, [*self.reached[caller[0]], *way]
            if not lost:
                continue
            if self._gets_past(caller, use, targets, lost):
                found = Loss.PART, [*self.reached[caller[0]], *way]
            else:
                found = self._loss_at(caller, lost, entry, callers, [*passed, use])
            worst = max(worst, found, key=lambda each: each[0])
            if worst[0] is Loss.WHOLE:
                break
        return worst

    def _is_lost_anyway(self, caller: Use, targets: set[str]) -> bool:
        """Tell whether a caller has these calls under a switch of its own, which does no harm."""
        function = self.package.function(caller[0])
        made = [
            atom for atom in (function.returns if function else ())
            if source_of(atom).partition(":")[2] in targets or ((given := _argument(atom)) and given.target in targets)
        ]  # fmt: skip
        return bool(made) and all(atom.startswith("off:") for atom in made) and not self.reach.blockers(caller[0])

    def _may_carry(self, atom: str, place: Place, owner: Place | None) -> bool:
        """Tell whether an atom can carry a gradient, as far as is known: so may what ``self`` holds of unknown kind."""
        kind, _, name = source_of(atom).partition(":")
        is_unknown = kind == "attr" and owner is not None and not self.package.attribute(owner, name)
        return is_unknown or self.reach.is_live(atom, place, owner)

    def _gets_past(self, caller: Use, use: Use, targets: set[str], sources: Sources) -> bool:
        """Tell whether a gradient for all of these also reaches the caller's result beside the calls of a function.

        What such a call alone gives is lost, but for a figure beside a loss (see :meth:`Reach.gets_past`).
        """
        function = self.package.function(caller[0])
        if function is None:
            return False
        is_apart = any(f"{APART}:{target}" in function.returns for target in targets)
        if is_apart and (LOSS not in function.returns or self.reach.touches(*use)):
            return False
        results = {f"call:{target}" for target in targets}
        beside = frozenset(
            atom for atom in function.returns
            if source_of(atom) not in results and not ((given := _argument(atom)) and given.target in targets)
        )  # fmt: skip
        live = {source for source in sources if self.reach.is_live(source, *caller)}
        return bool(live) and live <= self.reach.flowing(beside, *caller)

    def _lost_to(self, caller: Use, use: Use, targets: set[str], sources: Sources) -> Sources | None:
        """Return what in the caller feeds that for which a function loses the gradient; None if that is not seen."""
        function = self.package.function(caller[0])
        returns = function.returns if function else NOTHING
        given = [each for each in map(_argument, returns) if each]
        if not any(each.target in targets for each in given) and not any(
            atom.rpartition("call:")[2] in targets for atom in returns
        ):
            return None if returns else NOTHING  # nothing carries a gradient in all that the caller gives back
        lost: set[str] = set()
        for source in sources:
            kind, _, name = source.partition(":")
            if kind == "attr" or name.startswith("self."):
                of_a_part = {f"call:{target}" for target in targets} if self.reach.is_live(source, *use) else {UNKNOWN}
                lost |= {source} if caller[1] == use[1] else of_a_part
                continue
            for each in given:
                if each.target in targets and self._means(each.position, name, use[0]):
                    lost |= self._fed_by(each.atom, given, caller)
        return frozenset(lost)

    def _means(self, position: str, name: str, place: Place) -> bool:
        """Tell whether an argument at a position, or by a keyword, is or may be a function's parameter of this name."""
        function = self.package.function(place)
        signature = function.signature if function else ()
        if position.isdigit():
            position = signature[int(position)] if int(position) < len(signature) else "*"
        return position in (name, "*") or (name not in signature and position not in signature)

    def _fed_by(self, atom: str, given: list[Argument], caller: Use, depth: int = 0) -> set[str]:
        """Return the sources that an atom carries: its own, and what the call that it is the result of was given."""
        source = source_of(atom)
        found = {source} if self._may_carry(atom, *caller) else set()
        if source.startswith("call:") and depth < FARTHEST:
            for each in given:
                if each.target == source[5:]:
                    found |= self._fed_by(each.atom, given, caller, depth + 1)
        return found


# What another object holds, of a kind that is not known.
UNKNOWN = "attr:?"
# Calls further apart than this are not followed: what is lost over them counts as lost.
FARTHEST = 8


def _argument(atom: str) -> Argument | None:
    """Read ``arg:self.x:0:param:y``, whether or not gradients were off there."""
    atom = atom.removeprefix("off:")
    return Argument(*atom.split(":", 3)[1:]) if atom.startswith("arg:") else None
