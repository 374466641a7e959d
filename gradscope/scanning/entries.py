"""What is said of the public methods of a class: which are stopped, what to call instead, what inside stays clean."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from gradscope.scanning.facts import Call, Function
from gradscope.scanning.intent import is_tool
from gradscope.scanning.package import FRAMEWORKS, Place
from gradscope.scanning.reach import FORWARDS, Chain, Reach

# Kept on self, callable, and no part of the model: classes, makers of settings, what logs.
_NO_PART = re.compile(r"(?:^|_)(?:class|cls|factory|manager|logger|log|metric|optimizer|scheduler|callback)(?:es|s)?$")
# A way to train, and none to call with an input that wants a gradient.
_TRAINS = re.compile(r"^(?:fit|train|training)(?:_|$)")


@dataclass(slots=True)
class Entry:
    """What is said of one public compute method: ``blocked``, ``inference-only`` or ``clean``."""

    place: Place
    status: str
    chain: Chain | None = None
    alternatives: list[str] = field(default_factory=list)


@dataclass(slots=True)
class ClassReport:
    """A class with at least one stopped method: its entries and the modules in it that stay clean."""

    place: Place
    is_module: bool
    entries: list[Entry]
    clean: list[str]


class Entries:
    """Answers what a user of a class asks: which methods may I call, and which parts."""

    def __init__(self, reach: Reach) -> None:
        self.reach = reach
        self.package = reach.package

    def of(self, owner: Place) -> list[Entry]:
        """Return the verdict of every public compute method of a class, and what to call instead."""
        reach = self.reach
        methods = self._compute_methods(owner)
        chains = {method: reach.chain(method, owner) for method in methods}
        clean = [
            _name(method) for method in methods
            if chains[method] is None and reach.flows(method, owner) and not _TRAINS.search(_name(method))
        ]  # fmt: skip
        open_now = [f"{_name(method)} {when}" for method in methods if (when := _opening(chains[method]))]
        forward = [name for name in (*clean, *open_now) if name.split()[0] in FORWARDS]
        ways = [*forward, *(name for name in clean if name not in forward)]
        entries = []
        for method in methods:
            chain, name = chains[method], _name(method)
            status, others = "clean" if chain is None else "inference-only" if ways else "blocked", ways
            if chain is not None and name == "forward":
                status = "blocked"
            when = _opening(chain)
            if when:
                status, others = "inference-only", [f"{name} {when}"]
            entries.append(Entry(method, status, chain, others if status == "inference-only" else []))
        return entries

    def is_a_step(self, name: str, owner: Place) -> bool:
        """Tell whether the class calls a method itself and never for its value (it writes weights or state)."""
        calls = [
            call
            for place in self._own_classes(owner)
            for method in self._methods_of(place)
            for call in self._calls(method)
            if call.target == f"self.{name}"
        ]
        return bool(calls) and not any(call.used for call in calls)

    def clean_components(self, owner: Place) -> list[str]:
        """Return the modules kept on ``self`` that are called and are not themselves stopped."""
        targets = (
            call.target
            for place in self._own_classes(owner)
            for method in self._methods_of(place)
            for call in self._calls(method)
        )
        return list(dict.fromkeys(target[5:] for target in targets if self._is_clean_component(target, owner)))

    def methods(self, owner: Place) -> list[Place]:
        """Return the methods of a class and what they call."""
        own = self._methods_of(owner)
        called = [target for method in own for _, target in self.package.callees(method, owner)]
        return [*own, *called]

    def is_known(self, owner: Place) -> bool:
        """Tell whether every public method of a class and its bases was read: one that was not may be a way in.

        A class without a forward pass that calls ``self.forward``, or that others with one derive from, is half a
        class: its subclasses have the way in.
        """
        if self.package.method(owner, "forward") is None and (
            self._has_heirs(owner)
            or any(call.target == "self.forward" for place in self.methods(owner) for call in self._calls(place))
        ):
            return False
        for place in self.package.mro(owner):
            facts = self.package.files[place.module]
            klass = facts.classes.get(place.name)
            if klass is None:
                continue
            public = [name for name in klass.methods if not name.startswith("_") or name in FORWARDS]
            read = {name: facts.functions.get(f"{place.name}.{name}") for name in public}
            if any(function is None for function in read.values()):
                return False
            if any(function and not function.gives_value for name, function in read.items() if name in FORWARDS):
                return False  # abstract: the way in is a subclass's
        return True

    def _has_heirs(self, owner: Place) -> bool:
        """Tell whether a class that derives from this one has a forward pass, or was not read and may have one."""
        name = owner.name.rpartition(".")[2]
        heirs = self.package.descendants(name) - {name}
        return any(
            place.name not in self.package.files[place.module].classes or self.package.method(place, "forward")
            for place in self.package.classes_called(heirs)
            if owner in self.package.mro(place)
        )

    # --- the methods of a class -----------------------------------------------------------------

    def _compute_methods(self, owner: Place) -> list[Place]:
        """Return the public methods of a class (its own and those of its bases) that run modules."""
        found: dict[str, Place] = {}
        for place in self._own_classes(owner):
            for method in self._methods_of(place):
                name = _name(method)
                if name not in found and self._is_compute(method, name, owner):
                    found[name] = method
        return list(found.values())

    def _is_compute(self, method: Place, name: str, owner: Place) -> bool:
        function = self.package.function(method)
        if function is None or (name.startswith("_") and name not in FORWARDS):
            return False
        if function.kind in ("staticmethod", "classmethod", "property") or not function.gives_value:
            return False
        if self.is_a_step(name, owner):
            return False
        if name in FORWARDS or self.reach.blockers(method) or self.reach.chain(method, owner) is not None:
            return True
        return not (is_tool(name) or _only_gets(function)) and self.reach.touches(method, owner)

    def _own_classes(self, owner: Place) -> list[Place]:
        """Return a class and its bases without the frameworks' own, whose methods belong to no model."""
        return [place for place in self.package.mro(owner) if place == owner or place.name not in FRAMEWORKS]

    def _methods_of(self, place: Place) -> list[Place]:
        facts = self.package.files.get(place.module)
        klass = facts.classes.get(place.name) if facts else None
        return [Place(place.module, f"{place.name}.{name}") for name in klass.methods] if klass else []

    def _calls(self, place: Place) -> tuple[Call, ...]:
        function = self.package.function(place)
        return function.calls if function else ()

    # --- its parts --------------------------------------------------------------------------------

    def _is_clean_component(self, target: str, owner: Place) -> bool:
        if not target.startswith("self.") or target.count(".") != 1:
            return False
        name = target[5:]
        if (
            name.startswith("_")
            or name in FORWARDS
            or _NO_PART.search(name)
            or self.package.method(owner, name) is not None
            or not self.package.is_kept(owner, name)
            or not self.reach.computes(owner, name)
        ):
            return False
        return not any(self._is_stopped(klass) for klass in self.package.classes_of(owner, name))

    def _is_stopped(self, klass: Place) -> bool:
        called = self.package.method(klass, "__call__") or self.package.method(klass, "forward")
        return called is not None and self.reach.chain(called, klass) is not None


def _name(method: Place) -> str:
    return method.name.rpartition(".")[2]


def _only_gets(function: Function) -> bool:
    """Tell a method that hands out a part and computes nothing: ``get_input_embeddings``."""
    return not function.calls and all(atom.startswith("attr:") for atom in function.returns)


def _opening(chain: Chain | None) -> str:
    """Return when a stopped method lets a gradient past all the same; empty where it never does."""
    if chain is not None and chain.partly and chain.conditional:
        return "(while the condition of its switch does not hold)"
    return "(in the other mode, train or eval)" if chain is not None and chain.sometimes else ""
