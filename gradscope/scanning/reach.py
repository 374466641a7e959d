"""Which public callable reaches which region, through which calls; and what of a class stays clean."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TypeAlias

from gradscope.scanning.facts import APART, DATA, LOSS, Atoms, Call, Function, Site
from gradscope.scanning.intent import is_tool
from gradscope.scanning.package import Package, Place

FORWARDS = ("forward", "__call__")
# A function and the class of ``self`` in it.
Use: TypeAlias = tuple[Place, Place | None]
# What a call may lead to without computing anything of the model's.
NOT_COMPUTE = ("__init__", "__repr__", "__len__", "__getattr__", "__setattr__", "__del__", "__exit__", "__enter__")

# Callables kept on self that prepare inputs or settings and run no module.
_PREPARES = re.compile(
    r"^_?(?:pre_?proc|transform|tokeni[sz]|processor|get_)|(?:fn|func|function|config|init|processor|tokenizer)$"
)
_GIVES_TEXT = re.compile(r"^(?:.*\.)?_?transcribe(?:_\w+)?$")
# A module that counts what it is given (reinforcement learning's observations and returns): buffers, no parameter.
_COUNTS = re.compile(r"(?:^|_)(?:running|mean)_(?:mean_)?(?:std|var)$|^(?:obs|value|reward|return)_rms$")
# Modules that crop, flip and resample: they have nothing to train.
_TRANSFORMS = re.compile(r"\|?torch(?:vision|audio)\.transforms\.")
# A class of another package that is a module, as far as its name says.
_MODEL_NAME = re.compile(r"(?:Model|Module|Network|Net|Encoder|Decoder|Transformer|Backbone|LM|Generation|VAE)$")
# nn.Module's own methods: they compute nothing of the forward pass.
MODULE_API = frozenset(
    "add_module apply bfloat16 buffers children compile cpu cuda double eval extra_repr float get_buffer "
    "get_parameter get_submodule half load_state_dict log log_dict modules named_buffers named_children named_modules "
    "named_parameters parameters post_init print register_backward_hook register_buffer register_forward_hook "
    "register_forward_pre_hook register_full_backward_hook register_module register_parameter "
    "register_state_dict_pre_hook requires_grad_ save_hyperparameters set_extra_state share_memory state_dict to "
    "to_empty train type zero_grad".split()
)


@dataclass(slots=True)
class Chain:
    """A way from an entry to regions: the functions in order, and the sites with the function each is in.

    ``sometimes``: ``self.training`` decides whether a region is come to; ``partly``: a gradient also gets past it.
    """

    steps: list[Place]
    sites: list[tuple[Place, Site]]
    sometimes: bool = False
    partly: bool = False

    @property
    def conditional(self) -> bool:
        """Whether only run time decides about every switch on the way."""
        return all(site.conditional for _, site in self.sites)


class Reach:
    """Joins the regions of a package with its calls."""

    def __init__(self, package: Package, harmless: dict[tuple[Place, Site], str]) -> None:
        self.package = package
        self.harmless = harmless
        self.live = lru_cache(maxsize=None)(self._live)
        self.blockers = lru_cache(maxsize=None)(self._blockers)
        self._flows: dict[Use, bool] = {}
        self._touches: dict[Use, bool] = {}
        self.regions: dict[Place, list[Site]] = {}
        for facts in package.files.values():
            for site in facts.sites:
                if site.rule.startswith("GS10") and site.rule != "GS107":
                    self.regions.setdefault(Place(facts.module, site.function), []).append(site)

    def owner(self, place: Place) -> Place | None:
        """Return the class of ``self`` in a method."""
        klass = self.package.class_of(place)
        return Place(place.module, klass.name) if klass else None

    # --- what a result depends on ---------------------------------------------------------------

    def _live(self, atoms: Atoms, place: Place) -> Atoms:
        """Return the atoms that can carry a gradient: float inputs, parameters, modules."""
        owner = self.owner(place)
        return frozenset(atom for atom in atoms if self.is_live(atom, place, owner))

    def is_live(self, atom: str, place: Place, owner: Place | None) -> bool:
        """Tell whether an atom can carry a gradient: a float input, a parameter, a module."""
        kind, _, name = atom.partition(":")
        if kind == "off":
            return self.is_live(name, place, owner)
        if kind == "param":
            return True
        if kind == "arg":
            return self._is_passed_on(name, place, owner)
        if kind == "attr":
            return owner is not None and self._holds_weights(owner, name)
        return kind == "call" and self._gives_live(name, place, owner)

    def _gives_live(self, name: str, place: Place, owner: Place | None) -> bool:
        """Tell whether what a call gives can carry a gradient whatever it is given: it runs a module."""
        if name.startswith("self."):
            is_part = owner is not None and not _TRANSFORMS.match(self.package.attribute(owner, name[5:]))
            return owner is not None and is_part and self.computes(owner, name[5:])
        if name.startswith("super()."):
            found = self.package.target(name, place, owner)
            if found is not None:
                return self.touches(found, self.owner_for(found, owner))
            return name[8:] in FORWARDS and owner is not None and self.package.is_module(owner)
        function = self.package.function(place)
        return (function is not None and name in function.parameters) or self._gives_module(name, place, owner)

    def _gives_module(self, name: str, place: Place, owner: Place | None) -> bool:
        """Tell whether a function gives a model that it made."""
        found = self.package.target(name, place, owner)
        function = self.package.function(found) if found is not None else None
        made = self.package.made(f"?{name}", place.module) if function is not None and function.gives else ()
        return any(map(self.package.is_module, made))

    def flows(self, place: Place, owner: Place | None) -> bool:
        """Tell whether some of what a function gives back is computed with gradients on, here and in what it calls."""
        return _somewhere((place, owner), self._flows, self._flows_in)

    def _flows_in(self, use: Use) -> bool | list[Use]:
        place, owner = use
        function = self.package.function(place)
        if function is None or is_left_open(function):
            return True
        ways = [self._way_out(atom, place, owner) for atom in function.returns]
        return True in ways or [way for way in ways if not isinstance(way, bool)]

    def _flows_out(self, atom: str, place: Place, owner: Place | None) -> bool:
        way = self._way_out(atom, place, owner)
        return way if isinstance(way, bool) else self.flows(*way)

    def _way_out(self, atom: str, place: Place, owner: Place | None) -> bool | Use:
        """Tell whether a gradient reaches what an atom is about; or the function that decides about it."""
        kind, _, name = atom.partition(":")
        if kind == "off" or ":off:" in atom or not self.is_live(atom, place, owner):
            return False
        target = self.package.target(name.partition(":")[0], place, owner) if kind in ("call", "arg") else None
        if target is None or self.package.function(target) is None:
            return True
        return target, self.owner_for(target, owner)

    def gives_data(self, place: Place) -> bool:
        """Tell whether a function is said to give arrays or text: it may be a way to use a model, and none to train."""
        function = self.package.function(place)
        return function is not None and (DATA in function.returns or bool(_GIVES_TEXT.match(function.name)))

    def is_given_back(self, site: Site, place: Place) -> bool:
        """Tell whether what a block computes is part of what its function gives back or keeps."""
        function = self.package.function(place)
        if function is None or function.kind == "generator" or site.effects:
            return True
        # returned from inside the block: marked by no line, since nothing is assigned
        return f"in:{site.line}" in function.returns or not site.gives

    def gets_past(self, site: Site, place: Place) -> bool:
        """Tell whether all that a block computes with also reaches the result of its function with gradients on.

        A result that is made of the stopped values alone (``apart``) is lost whatever the others do, but for a
        figure beside a loss: nobody trains through that.
        """
        function, owner = self.package.function(place), self.owner(place)
        if function is None or (APART in function.returns and not self.is_beside_loss(site, place)):
            return False
        sources = {source_of(atom) for atom in self.live(site.depends, place)}
        return sources <= self.flowing(function.returns, place, owner)

    def is_beside_loss(self, site: Site, place: Place) -> bool:
        """Tell whether a block only makes figures, of what was computed before, in a function that gives a loss."""
        function = self.package.function(place)
        return function is not None and LOSS in function.returns and not self._runs_model(site, place)

    def _runs_model(self, site: Site, place: Place) -> bool:
        """Tell whether a block itself runs a module or uses a weight."""
        owner = self.owner(place)
        if any(self.is_live(atom, place, owner) for atom in site.runs):
            return True
        called = (atom[5:] for atom in site.runs if atom.startswith("call:"))
        return any(
            self.touches(target, self.owner_for(target, owner))
            for name in called for target in self.package.targets(name, place, owner)
        )  # fmt: skip

    def flowing(self, atoms: Atoms, place: Place, owner: Place | None) -> set[str]:
        """Return what a gradient reaches through these, of all that they are about."""
        return {source_of(atom) for atom in atoms if self._flows_out(atom, place, owner)}

    def _is_passed_on(self, way: str, place: Place, owner: Place | None) -> bool:
        """Tell whether an argument is live and comes out again of the function it was given to."""
        target, position, atom = way.split(":", 2)
        found = self.package.target(target, place, owner)
        function = self.package.function(found) if found else None
        if function is not None and not is_left_open(function) and position != "*":
            names = function.signature
            name = position
            if position.isdigit():
                name = names[int(position)] if int(position) < len(names) else ""
            passed_on = any(each == f"param:{name}" or each.endswith(f":param:{name}") for each in function.returns)
            if name and not passed_on:
                return False
        return self.is_live(atom, place, owner)

    def _holds_weights(self, owner: Place, name: str) -> bool:
        computed = self.package.property(owner, name)
        return self._keeps_weights(owner, name) if computed is None else self.touches(computed, owner)

    def _keeps_weights(self, owner: Place, name: str) -> bool:
        kind = self.package.attribute(owner, name)
        if kind in ("parameter", "module"):
            return True
        if kind in ("", "buffer", "plain", "weightless"):
            return False
        classes = self.package.classes_of(owner, name)
        if classes:
            return any(map(self.package.is_module, classes))
        return kind.startswith("|") or (not kind.startswith("?") and bool(_MODEL_NAME.search(kind)))

    def computes(self, owner: Place, name: str) -> bool:
        """Tell whether ``self.name(...)`` runs a module: a method that does, or a callable kept on ``self``."""
        method = self.package.method(owner, name)
        if method is not None:
            function = self.package.function(method)
            return self.touches(method, owner) or (
                function is not None and is_left_open(function) and not is_tool(name) and self.package.is_module(owner)
            )
        kind = self.package.attribute(owner, name)
        if name in MODULE_API or _COUNTS.search(name):
            return False
        if kind in ("", "module") or (kind.startswith("?") and not self.package.classes_of(owner, name)):
            return not _PREPARES.search(name)
        return self._holds_weights(owner, name)

    def touches(self, place: Place, owner: Place | None) -> bool:
        """Tell whether a function uses a module or a parameter, itself or through what it calls."""
        return _somewhere((place, owner), self._touches, self._touches_in)

    def _touches_in(self, use: Use) -> bool | list[Use]:
        place, owner = use
        function = self.package.function(place)
        if function is None:
            return False
        if owner is not None and any(self._keeps_weights(owner, name) for name in function.reads):
            return True
        if any(self._is_kept_callable(call.target, owner) or call.target in function.parameters
               for call in function.calls):  # fmt: skip
            return True
        # a property that is read is one of them
        return [(target, self.owner_for(target, owner)) for _, target in self.package.callees(place, owner)]

    def _is_kept_callable(self, target: str, owner: Place | None) -> bool:
        if owner is None or not target.startswith("self.") or target.count(".") != 1:
            return False
        name = target[5:]
        return self.package.method(owner, name) is None and self.computes(owner, name) and self.package.is_module(owner)

    def owner_for(self, target: Place, owner: Place | None) -> Place | None:
        """Return the class of ``self`` once ``target`` is called: the same object for its own methods."""
        home = self.owner(target)
        if owner is not None and home is not None and home in self.package.mro(owner):
            return owner
        return home

    # --- chains ---------------------------------------------------------------------------------

    def _blockers(self, place: Place) -> list[Site]:
        """Return the regions of a function that stop a gradient somebody may want, outermost first."""
        return [
            site
            for site in self.regions.get(place, ())
            if (place, site) not in self.harmless and self.live(site.depends | site.effects, place)
        ]

    def chain(self, entry: Place, owner: Place | None) -> Chain | None:
        """Return the way from an entry to the nearest region, and from there on to those behind it."""
        steps: list[Place] = [entry]
        sites: list[tuple[Place, Site]] = []
        seen: set[Place] = set()
        while True:
            path = self._nearest(steps[-1], owner, seen)
            if path is None:
                break
            steps += path[1:]
            seen.update(path)
            sites += [(path[-1], site) for site in self.blockers(path[-1])]
        if not sites:
            return None
        to_the_first = steps[: steps.index(sites[0][0]) + 1]  # what lies behind it opens nothing
        return Chain(steps, sites, self._is_sometimes(to_the_first, owner), self.flows(entry, owner))

    def _is_sometimes(self, steps: list[Place], owner: Place | None) -> bool:
        for here, there in pairwise(steps):
            calls = [call for call, target in self.package.callees(here, owner) if target == there]
            if calls and all(call.sometimes for call in calls):
                return True
        return False

    def _nearest(self, start: Place, owner: Place | None, seen: set[Place]) -> list[Place] | None:
        queue: deque[tuple[list[Place], Place | None]] = deque([([start], owner)])
        visited = {start}
        while queue:
            path, current_owner = queue.popleft()
            here = path[-1]
            if here not in seen and self.blockers(here):
                return path
            if len(path) > 8:
                continue
            for call, target in self.package.callees(here, current_owner):
                name = target.name.rpartition(".")[2]
                if target in visited or name in NOT_COMPUTE:
                    continue
                if not call.used and not any(site.effects for site in self.blockers(target)):
                    continue
                visited.add(target)
                queue.append(([*path, target], self.owner_for(target, current_owner)))
        return None

    @cached_property
    def _callers(self) -> dict[Place, list[Place]]:
        """The functions that call a function, by that function."""
        callers: dict[Place, list[Place]] = {}
        for facts in self.package.files.values():
            for name in facts.functions:
                if name.rpartition(".")[2] not in NOT_COMPUTE:
                    place = Place(facts.module, name)
                    for _, target in self.package.callees(place, self.owner(place)):
                        callers.setdefault(target, []).append(place)
        return callers

    def leading_to(self, goals: set[Place]) -> set[Place]:
        """Return the functions from which a call, or a chain of calls, leads to one of the goals; goals included."""
        found = set(goals)
        pending = list(goals)
        while pending:
            goal = pending.pop()
            for caller in (each for met in (goal, *self._in_place_of(goal)) for each in self._callers.get(met, ())):
                if caller not in found:
                    found.add(caller)
                    pending.append(caller)
        return found

    def _in_place_of(self, place: Place) -> Iterator[Place]:
        """Yield the methods of base classes that one outside of the code scanned overrides: who calls them calls it."""
        owner = self.owner(place) if place.module in self.package.outside else None
        for base in self.package.mro(owner)[1:] if owner is not None else ():
            yield Place(base.module, f"{base.name}.{place.name.rpartition('.')[2]}")

    def reachable(self, entry: Place, owner: Place | None, *, always: bool = False) -> dict[Place, list[Place]]:
        """Return every function that an entry's value is computed with, and the way to each.

        ``always`` leaves out the calls that are made in training only, or in evaluation only.
        """
        found = {entry: [entry]}
        queue: deque[tuple[Place, Place | None]] = deque([(entry, owner)])
        while queue:
            here, current_owner = queue.popleft()
            for call, target in self.package.callees(here, current_owner):
                is_taken = self.counts(call, target) and not (always and call.sometimes not in ("", "training"))
                if is_taken and target not in found and target.name.rpartition(".")[2] not in NOT_COMPUTE:
                    found[target] = [*found[here], target]
                    queue.append((target, self.owner_for(target, current_owner)))
        return found

    def counts(self, call: Call, target: Place) -> bool:
        """Tell whether a call adds to its caller's result: by its value, or by what a block leaves on ``self``."""
        sites = self.regions.get(target, ())
        return call.used or any(site.how == "block" and site.effects and site.depends for site in sites)


def is_left_open(function: Function) -> bool:
    """Tell a method that gives nothing itself: where its value is used, a subclass has one in its place."""
    return not function.gives_value and function.kind not in ("generator", "property") and not function.calls


def _somewhere(start: Use, known: dict[Use, bool], look: Callable[[Use], bool | list[Use]]) -> bool:
    """Tell whether something holds of a function or of one that it leads to.

    ``look`` gives the answer for one function, or the functions that decide. Cycles are why this is no
    recursion that remembers: what lies on a cycle would be answered by where the search began.
    """
    seen, pending = {start}, [start]
    while pending:
        use = pending.pop()
        answer = known[use] if use in known else look(use)
        if answer is True:
            known[start] = True
            return True
        for each in answer or ():
            if each not in seen:
                seen.add(each)
                pending.append(each)
    known.update(dict.fromkeys(seen, False))
    return False


def source_of(atom: str) -> str:
    """Return what an atom is about in the end: ``param:x`` of ``off:arg:self.scale:0:param:x``."""
    return ":".join(atom.rsplit(":", 2)[-2:])
