"""What the code scanned calls of other packages and gets no gradient from: judged at the call, in its own source.

The switch itself stands in a file that no target holds. Nobody can mend it there, write an ignore comment beside it or
see it annotated in a pull request; the call is theirs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from gradscope.findings import SEVERITIES, Severity
from gradscope.paths import short_path
from gradscope.scanning.facts import Call, FileFacts, Function, Site
from gradscope.scanning.judge import Judge
from gradscope.scanning.judgement import FROZEN, Judgement, where
from gradscope.scanning.made import maker_of
from gradscope.scanning.package import Place
from gradscope.scanning.reach import Use, source_of
from gradscope.scanning.steps import called, is_trained, steps
from gradscope.scanning.training import Way

TRAINED = "Its parameters are handed to an optimizer all the same."


@dataclass(slots=True)
class Borrowed:
    """A call by which the code scanned comes to a switch outside of it, and the way from an entry to that."""

    caller: Place
    call: Call
    way: Way
    judgement: Judgement


def borrowed(judge: Judge, asked: Iterable[Use], text_of: Callable[[str], str]) -> list[Judgement]:
    """Return a judgement for each call of the code scanned that loses a gradient in a file outside of it.

    Asked about are forward passes, steps of training and the entries ``asked``. ``text_of`` gives a file's source by
    its path.
    """
    if not judge.package.outside:  # a large package: what its entries reach is not looked up another time
        return []
    by_call: dict[tuple[Place, str], list[Borrowed]] = {}
    asked = list(asked)
    for each in _Borrowing(judge).found(asked):
        by_call.setdefault((each.caller, each.call.target), []).append(each)
    groups = (sorted(group, key=lambda each: len(each.way)) for group in by_call.values())
    inherited = (each for use in asked for each in _inherited(judge, *use))
    return [*(_at_the_call(judge, group, text_of) for group in groups), *inherited]


class _Borrowing:
    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.reach = judge.reach
        self.package = judge.package

    def found(self, asked: list[Use]) -> Iterator[Borrowed]:
        """Yield every switch outside that an entry comes to."""
        for owner, entry in self.judge.training.trained:
            for facts, site, place, way in self._reached((entry, owner)):
                judgement = self.judge.in_forward(facts, site, place, way, (entry, owner))
                if judgement.severity != "note":
                    yield from self._leaving(judgement.chain, owner, judgement)
        for use in dict.fromkeys([*steps(self.reach), *asked]):
            for facts, site, _, way in self._reached(use):
                message = f"{where(site)}: no gradient gets back through this call of {called(use[0])}."
                severity: Severity = "error" if use in asked and not site.conditional else "warning"
                if len(way) > 1 and self._is_part(use, way[1]):
                    yield from self._leaving(way, use[1], Judgement(facts, site, severity, "likely", message, way))

    def _reached(self, use: Use) -> Iterator[tuple[FileFacts, Site, Place, Way]]:
        """Yield every switch outside that a function comes to, with the way there."""
        for place, way in self.reach.reachable(*use).items():
            if place.module in self.package.outside and place in self.reach.regions:
                facts = self.package.files[place.module]
                yield from ((facts, site, place, way) for site in self.reach.blockers(place) if site.how != "class")

    def _is_part(self, use: Use, called: Place) -> bool:
        """Tell whether what a function gives out, or goes backward from, is made of what a call gives."""
        function = self.package.function(use[0])
        names = {name for call, target in self.package.callees(*use) if target == called for name in _atoms_of(call)}
        return function is not None and any(source_of(atom) in names for atom in function.returns)

    def _leaving(self, way: Way, owner: Place | None, judgement: Judgement) -> Iterator[Borrowed]:
        """Yield the call by which a way leaves the code scanned, if what it gives is given out with gradients on."""
        at = next((number for number, place in enumerate(way) if place.module in self.package.outside), 0)
        caller = way[at - 1]
        function, called = self.package.function(caller), self.package.function(way[at])
        if not at or function is None or called is None:
            return
        if not self.reach.live(called.returns, way[at]):
            return  # it gives nothing, or integers: save(), generate()
        nothing_else = not self.reach.live(function.returns, caller)
        for call, target in self.package.callees(caller, self.reach.owner_for(caller, owner)):
            if target == way[at] and (_is_given_out(function, call) or nothing_else):
                yield Borrowed(caller, call, way, judgement)
                return


def _inherited(judge: Judge, place: Place, owner: Place | None) -> Iterator[Judgement]:
    """Yield a judgement, at the class, of each switch in a method that it has from a class outside."""
    outside = judge.package.outside
    if place.module not in outside or owner is None or owner.module in outside:
        return
    facts, name = judge.package.files[owner.module], f"{owner.name}.{place.name.rpartition('.')[2]}"
    line = facts.classes[owner.name].line
    for site in judge.reach.blockers(place):
        there = Judgement(judge.package.files[place.module], site, "error", "likely", "", [place])
        message = f"{where(site)} ({_spot(there)}): {name} is inherited, and no gradient gets back through it."
        here = replace(site, line=line, column=1, end_line=line, function=name, how="call")
        yield Judgement(facts, here, "error", "likely", message, [place], _advice(judge, there), (site,))


def _atoms_of(call: Call) -> set[str]:
    """Return the atoms that stand for what a call gives: ``self.tower.encode(x)`` is of ``self.tower``."""
    root, _, rest = call.target.partition(".")
    name = rest.partition(".")[0]
    of_a_part = {f"attr:{name}", f"call:self.{name}"} if root == "self" and "." in rest else set()
    return {f"call:{call.target}"} | of_a_part


def _is_given_out(function: Function, call: Call) -> bool:
    """Tell whether a function gives out what a call gives, and makes it with gradients on.

    Where it switches them off itself, that is what is to be said.
    """
    return any(source_of(atom) in _atoms_of(call) and "off:" not in atom for atom in function.returns)


def _at_the_call(judge: Judge, group: list[Borrowed], text_of: Callable[[str], str]) -> Judgement:
    """Return one judgement, in the caller's file, of all that a call comes to; the nearest switch is told of first."""
    first = group[0]
    inner, site = first.judgement, first.judgement.site
    facts = judge.package.files[first.caller.module]
    function = judge.package.function(first.caller)
    assert function is not None  # its calls were followed
    lines = text_of(facts.path).split("\n")
    written = _written(first.call, function, lines)
    message = f"{where(site)} ({_spot(inner)}){inner.message.removeprefix(where(site))}"
    others = (each.judgement for each in group[1:] if each.judgement.site is not site)
    behind = list(dict.fromkeys(f"{each.site.function} ({_spot(each)})" for each in others))
    if behind:
        message += f" Behind it: {', '.join(behind)}."
    severity = min((each.judgement.severity for each in group), key=SEVERITIES.index)
    if severity == "warning" and function.goes_backward and is_trained(facts, function, written.on):
        severity, message = "error", f"{message} {TRAINED}"
    kept = first.call.target.split(".")[1] if first.call.target.startswith("self.") else ""
    if judge.training.freezes(judge.reach.owner(first.caller), {kept}):
        severity, message = max(severity, "warning", key=SEVERITIES.index), f"{message} {FROZEN}"
    here = replace(site, line=written.line, column=1, end_line=written.line, function=first.caller.name, how="call")
    sites = tuple(each.judgement.site for each in group)
    return Judgement(facts, here, severity, inner.confidence, message, first.way, _advice(judge, inner), sites)


def _spot(judgement: Judgement) -> str:
    return f"{short_path(judgement.facts.path)}:{judgement.site.line}"


@dataclass(frozen=True, slots=True)
class Written:
    """Where a call stands, by its text: its line, and the name of what it is made on (``self.tower``, ``model``)."""

    line: int
    on: str = ""


def _written(call: Call, function: Function, lines: list[str]) -> Written:
    """Return where a function makes a call; the function's own line where it is written otherwise."""
    owner, _, last = call.target.rpartition(".")
    name = rf"({re.escape(owner)})" if owner.startswith("self") else r"(\w+)"
    item = r"(?:\[[^\]\n]*\])?"
    patterns = [rf"(?<![\w.]){name}{item}\.{re.escape(last)}\s*\(", rf"(?<![\w.])()(?:\w+\.)*{re.escape(last)}\b"]
    patterns += [rf"()\.{re.escape(last)}\s*\("]
    if last == "__call__":  # of an instance: under its own name
        names = _names_of(owner, lines[function.line - 1 : function.end_line]) or _names_of(owner, lines)
        patterns = [rf"(?<![\w.])({name}){item}\s*\(" for name in names]
    for pattern in patterns:
        for number in range(function.line, min(function.end_line, len(lines)) + 1):
            found = re.search(pattern, lines[number - 1])
            if found:
                return Written(number, found[1])
    return Written(function.line)


def _names_of(kind: str, lines: list[str]) -> list[str]:
    """Return the names by which some lines know what is an instance of a class, or of what a function gives."""
    made = re.escape((maker_of(kind) or kind).rpartition(".")[2])
    own = re.compile(rf"((?:\w+[ \t]*,[ \t]*)*\w+)[ \t]*(?::[^,=)]*|=[ \t]*[\w.]*)\b{made}\b")
    item = re.search(r"\[(\d+)\]$", kind)
    found = [[name.strip() for name in match[1].split(",")] for line in lines if (match := own.search(line))]
    return [names[int(item[1])] if item and int(item[1]) < len(names) else names[-1] for names in found]


def _advice(judge: Judge, inner: Judgement) -> str:
    """Return what to call instead: other methods of the class, the modules inside it, the function undecorated."""
    place = Place(inner.facts.module, inner.site.function)
    owner = judge.reach.owner(place)
    report = judge.report_of.get(owner) if owner else None
    entry = next((each for each in report.entries if each.place == place), None) if report else None
    if entry and entry.alternatives:
        return f"Call {', '.join(entry.alternatives[:4])} of it where a gradient is wanted."
    if report and report.clean:
        return f"Call the modules inside it: {', '.join(report.clean[:6])}."
    if inner.site.how == "decorator":
        return f"Call the undecorated function: {place.name}.__wrapped__(...)."
    return "Run what it runs yourself, without the switch; gradscope trace names the smallest fix."
