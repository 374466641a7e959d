"""What a step of training loses itself: an optimizer is given parameters, and no gradient gets back to them.

A step is a function that goes backward, a script that does, or a method that gives a trainer its loss. What it stops
on purpose and by mistake looks alike; what its optimizer is given tells them apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import cached_property, lru_cache

from gradscope.findings import Severity
from gradscope.scanning.facts import Atoms, FileFacts, Function, Site
from gradscope.scanning.intent import meant_by_module
from gradscope.scanning.judgement import KEEP_OR_TAKE_OUT, Judgement, handed, what, where
from gradscope.scanning.optimizers import is_model
from gradscope.scanning.package import Place
from gradscope.scanning.reach import Reach, Use, source_of
from gradscope.scanning.signatures import GIVE_LOSS

SCRIPT = "<module>"
# What these give is no part of any graph, so that nothing tells where it goes.
INDEXING = ("GS401", "GS402", "GS403")
_LOSS = re.compile(r"(?:^|[._])(?:\w*loss\w*|criterion\w*|mse|bce|ce|crit)$", re.IGNORECASE)
# Atoms that say where a value has been and nothing of what it is made of.
_MARKS = re.compile(r"cut:|in:|apart:")
_WEIGHTLESS = frozenset({"", "plain", "buffer", "weightless"})
# Parameters that carry several models, of which some are trained.
_HOLD_ANYTHING = frozenset({"state", "ctx", "context", "trainer", "args", "models", "modules"})


def steps(reach: Reach) -> Iterator[Use]:
    """Yield the functions scanned that go backward, or give a trainer what it goes backward from."""
    for facts in reach.package.own:
        for function in facts.functions.values():
            if is_step(function):
                place = Place(facts.module, function.name)
                yield place, reach.owner(place)


def is_step(function: Function) -> bool:
    """Tell a step of training."""
    owner, _, name = function.name.rpartition(".")
    return function.goes_backward or (bool(owner) and name in GIVE_LOSS)


def called(place: Place) -> str:
    """Return what a step is called in a sentence."""
    return "the script" if place.name == SCRIPT else place.name


class Steps:
    """Judges what a step loses of what it trains."""

    def __init__(self, reach: Reach) -> None:
        self.reach = reach
        self.package = reach.package
        self._flowing = lru_cache(maxsize=None)(self._names_flowing)

    def judged(self, facts: FileFacts, site: Site, place: Place) -> Judgement | None:
        """Return what is to be said of a site by what a step makes of it: one that it stands in, or that calls it."""
        step = self._place_of(facts, site)
        if step is not None:
            return self._in_step(facts, site, step)
        called_by = self._lost_by_method(site, place) if site.rule.startswith("GS10") else None
        if called_by is None:
            return None
        lost, step = called_by
        message = f"{where(site)}: {handed(lost)}, and no gradient of {called(step)} gets back there."
        return Judgement(facts, site, "error", "likely", message, [step, place], KEEP_OR_TAKE_OUT)

    def _in_step(self, facts: FileFacts, site: Site, step: Place) -> Judgement | None:
        """Return what is to be said of a site in a step of training; None where that says nothing of it."""
        said = where(site) if site.rule.startswith("GS10") else f"{site.mechanism} in {called(step)}"
        lost = self._lost(site, step)
        if lost:
            message = f"{said}: {handed(lost)}, and no gradient gets back there."
            return Judgement(facts, site, "error", "likely", message, [step], KEEP_OR_TAKE_OUT)
        if self._stops_all(site, step):
            message = f"{said}: {called(step)} goes backward from nothing else."
            severity: Severity = "error" if self._is_stepped(step) else "warning"
            return Judgement(facts, site, severity, "likely", message, [step], KEEP_OR_TAKE_OUT)
        if not site.rule.startswith("GS10"):
            return None
        if self._is_untrained(site, step):
            why = f"nothing that it runs is handed to the optimizer of {called(step)}"
            return Judgement(facts, site, "note", "likely", f"{what(site)}: {why}.")
        part = self._part_lost(site, step)
        if part:
            message = f"{said}: no gradient gets back to {part}, while one gets to other parts of it."
            return Judgement(facts, site, "warning", "likely", message, [step], KEEP_OR_TAKE_OUT)
        return None

    def _place_of(self, facts: FileFacts, site: Site) -> Place | None:
        """Return the step that a site stands in itself."""
        place = Place(facts.module, site.function or SCRIPT)
        function = self.package.function(place)
        return place if function is not None and is_step(function) else None

    def _lost(self, site: Site, place: Place) -> list[str]:
        """Return what a site computes with, the step's optimizer is given, and no gradient gets back to."""
        function = self.package.function(place)
        if function is None or site.conditional:
            return []
        flowing = self._flowing(place)
        if not self._is_part(site, function) and not (site.rule in INDEXING and _is_of_data(flowing, function)):
            return []
        return self._handed_over(self._names(site.depends, place), place, flowing)

    def _lost_by_method(self, site: Site, method: Place) -> tuple[list[str], Place] | None:
        """Return the same of a method of its own that a step calls, with the step; None where there is none."""
        call = f"call:self.{method.name.rpartition('.')[2]}"
        for place in self._callers.get(method, ()) if not site.conditional else ():
            function = self.package.function(place)
            atoms = _carrying(function)
            beside = frozenset(atom for atom in atoms if source_of(atom) != call)
            if len(beside) == len(atoms):
                continue
            lost = self._handed_over(self._names(site.depends, method), place, self._names(beside, place))
            if lost:
                return lost, place
        return None

    @cached_property
    def _callers(self) -> dict[Place, list[Place]]:
        """The steps that call a method of their own, by the method."""
        callers: dict[Place, list[Place]] = {}
        for place, owner in steps(self.reach):
            for _, target in self.package.callees(place, owner) if owner is not None else ():
                if self.reach.owner_for(target, owner) == owner and target in self.reach.regions:
                    callers.setdefault(target, []).append(place)
        return callers

    def _handed_over(self, names: Collection[str], place: Place, flowing: frozenset[str]) -> list[str]:
        """Return those of some names that the optimizer of a step is given and nothing flows to."""
        facts, function = self.package.files[place.module], self.package.function(place)
        assert function is not None  # it is a step
        given, flowing = trained(facts, function), flowing | self._flowing_beside(place)
        fixed = self._fixed(place)
        kept = flowing | {part for part, whole in given.items() if whole and _touch(flowing, whole)}
        found = {
            name.removesuffix(".forward") for name in names
            if _touch(given, name) and not _touch(kept, name) and not _covers(fixed, name)
            and not meant_by_module(name.split(".")) and self._may_hold_weights(name, place)
        }  # fmt: skip
        return sorted(name for name in found if not _covers(found - {name}, name))

    def _stops_all(self, site: Site, place: Place) -> bool:
        """Tell whether a step goes backward from nothing but what a site, or one like it, has stopped.

        What it is given may carry a gradient of its own, but for a step that moves the weights itself: that is data.
        """
        function = self.package.function(place)
        if function is None or site.conditional or not self._is_part(site, function):
            return False
        flowing = [source_of(atom) for atom in _carrying(function)]
        if function.steps:
            flowing = [each for each in flowing if _is_work(each) and not _LOSS.search(each)]
        return any(map(_is_work, site.depends)) and not any(":" in each and not _MARKS.match(each) for each in flowing)

    def _is_stepped(self, place: Place) -> bool:
        """Tell whether it is seen that an optimizer moves weights by what a step goes backward from."""
        facts, function = self.package.files[place.module], self.package.function(place)
        return function is not None and bool(function.steps or trained(facts, function))

    def _part_lost(self, site: Site, place: Place) -> str:
        """Return a part that a step loses of what it is given and trains other parts of: ``model.encoder``."""
        function, flowing = self.package.function(place), self._flowing(place)
        if function is None or site.conditional or not self._is_part(site, function):
            return ""
        fixed = self._fixed(place)
        for name in sorted(self._names(site.depends, place)):
            root, _, rest = name.partition(".")
            is_part = rest.isidentifier() and root in function.parameters and root not in _HOLD_ANYTHING
            if (
                is_part
                and _touch(flowing, root)
                and not _touch(flowing, name)
                and not _covers(flowing, root)
                and not _covers(fixed, name)
            ):
                return name
        return ""

    def _is_untrained(self, site: Site, place: Place) -> bool:
        """Tell whether it is seen what the step's optimizer is given, and nothing that a site computes with is."""
        facts, function = self.package.files[place.module], self.package.function(place)
        given = trained(facts, function) if function is not None else {}
        names = self._names(site.depends, place)
        return bool(given and names) and not any(_touch(given, name) for name in names)

    def _is_part(self, site: Site, function: Function) -> bool:
        """Tell whether what a site gives out is part of what the step goes backward from."""
        marks = {f"cut:{site.line}", f"in:{site.line}"}
        marks |= {f"off:{mark}" for mark in marks}
        return not marks.isdisjoint(given_out(function))

    def _names_flowing(self, place: Place) -> frozenset[str]:
        """Return the names of all that a gradient gets back to."""
        return self._names(_carrying(self.package.function(place)), place)

    def _flowing_beside(self, place: Place) -> frozenset[str]:
        """Return the same of the other steps of its class, which may train in turn."""
        owner, facts = self.reach.owner(place), self.package.files[place.module]
        others = (Place(place.module, name) for name, each in facts.functions.items() if owner and is_step(each))
        beside = (each for each in others if each != place and self.reach.owner(each) == owner)
        return frozenset().union(*map(self._flowing, beside))

    def _may_hold_weights(self, name: str, place: Place) -> bool:
        """Tell a part of ``self`` from one whose class is seen to hold buffers alone: a queue, a memory bank."""
        owner = self.reach.owner(place)
        classes = self.package.classes_of(owner, name.split(".")[1]) if owner and name.startswith("self.") else []
        read = [self.package.files[klass.module].classes.get(klass.name) for klass in classes]
        kinds = [set(klass.attributes.values()) for klass in read if klass is not None and klass.attributes]
        return not kinds or len(kinds) < len(classes) or any(each - _WEIGHTLESS for each in kinds)

    def _fixed(self, place: Place) -> set[str]:
        """Return what a step finds frozen, but for what has parts that are trained all the same (adapters)."""
        facts, owner = self.package.files[place.module], self.reach.owner(place)
        found = {each.name for each in facts.frozen if not each.name.startswith("self")}
        for klass in self.package.mro(owner) if owner is not None else ():
            own = self.package.files[klass.module].frozen
            found |= {each.name for each in own if each.scope == klass.name.partition(".")[0]}
        return found - {name for each in facts.optimizers if each.filtered for name in each.given}

    def _names(self, atoms: Atoms, place: Place) -> frozenset[str]:
        """Return what atoms are about by the names that an optimizer is given: ``encoder``, ``self.head``.

        A method stands for all that it reads and calls of ``self``.
        """
        owner = self.reach.owner(place)
        found: set[str] = set()
        given: set[str] = set()
        for atom in atoms:
            kind, _, name = source_of(atom).partition(":")
            if kind == "call":
                found |= self._of_call(name, place, owner)
            elif kind == "attr":
                given.add(f"self.{name}")
            elif kind == "param":
                given.add(name)
        # Of model.encoder(x), the encoder is what it is about.
        return frozenset(found | {name for name in given if not any(each.startswith(f"{name}.") for each in found)})

    def _of_call(self, name: str, place: Place, owner: Place | None) -> set[str]:
        """Return what a call runs: a part by its name, else all that it is called on, of which it may be any method."""
        target = self.package.target(name, place, owner) if name.startswith("self.") else None
        if target is None:
            whole, _, part = name.rpartition(".")
            return {name if not whole or whole == "self" or is_model(part) else whole}
        found: set[str] = set()
        for each in self.reach.reachable(target, self.reach.owner_for(target, owner)):
            function = self.package.function(each)
            if function is not None and self.reach.owner_for(each, owner) == owner:
                found |= {f"self.{attribute}" for attribute in function.reads}
        return found or {name}


def trained(facts: FileFacts, function: Function) -> dict[str, str]:
    """Return what the optimizers of a step are given; nothing where it is not seen which these are."""
    scope = function.name.partition(".")[0] if function.name != SCRIPT else ""
    own = [each for each in facts.optimizers if each.scope == scope]
    taken = set(function.signature).intersection(function.steps)  # made by the caller, who may call it otherwise
    named = [each for each in own if each.name in function.steps]
    if not named and not taken:
        named = [each for each in facts.optimizers if each.name in function.steps and not each.scope]
    if not named and not taken and len(own) == 1:
        named = own
    if not named and len(facts.optimizers) == 1:
        named = facts.optimizers
    return {name: whole for each in named for name, whole in each.given.items()}


def is_trained(facts: FileFacts, function: Function, name: str) -> bool:
    """Tell whether a step's optimizer is given what goes by a name."""
    return bool(name) and _touch(trained(facts, function), name)


def given_out(function: Function) -> Atoms:
    """Return what a step goes backward from, or gives to whom goes backward."""
    return function.returns if function.backward is None else function.backward


def _is_of_data(flowing: Collection[str], function: Function) -> bool:
    """Tell whether a step goes backward from losses of what it was given alone: from nothing that may run a model."""
    return all(name in function.parameters or _LOSS.search(name) for name in flowing)


def _carrying(function: Function | None) -> Atoms:
    """Return the atoms of what a step goes backward from that a gradient gets back to; none where it is not known."""
    given = given_out(function) if function is not None else ()
    return frozenset(atom for atom in given if "off:" not in atom and not atom.startswith("from:"))


def _is_work(atom: str) -> bool:
    return source_of(atom).startswith(("call:", "attr:"))


def _covers(names: Collection[str], name: str) -> bool:
    """Tell whether a name, or what it is a part of, is among some."""
    return any(name == each or name.startswith(f"{each}.") for each in names)


def _touch(names: Collection[str], name: str) -> bool:
    """Tell whether a name is part of one of some, or one of them of it."""
    return _covers(names, name) or any(each.startswith(f"{name}.") for each in names)
