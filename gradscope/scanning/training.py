"""What training runs: the forward passes of the module classes, and every function that their results come from."""

from __future__ import annotations

from functools import cached_property
from typing import TypeAlias

from gradscope.scanning.intent import meant_by_class
from gradscope.scanning.package import Package, Place
from gradscope.scanning.reach import FORWARDS, Reach

# From a forward pass to a function, call by call.
Way: TypeAlias = list[Place]


class Training:
    """Answers which functions a forward pass comes to, and on which way."""

    def __init__(self, reach: Reach) -> None:
        self.reach = reach
        self.package: Package = reach.package

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
        for owner, entry in self._trained:
            for place, way in self.reach.reachable(entry, owner, always=always).items():
                if place not in reached or len(way) < len(reached[place]):
                    reached[place] = way
        return reached

    @cached_property
    def _trained(self) -> list[tuple[Place, Place]]:
        """The module classes with their forward passes, less those that run without gradients by their nature."""
        owners = (Place(facts.module, name) for facts in self.package.files.values() for name in facts.classes)
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
        known = [each for each in own if self.package.function(each) is not None]
        return known if known and self.package.is_module(owner) else []

    @cached_property
    def _with_regions(self) -> frozenset[Place]:
        """The classes with a region in a method of their own."""
        return frozenset(owner for place in self.reach.regions if (owner := self.reach.owner(place)) is not None)
