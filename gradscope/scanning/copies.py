"""Functions that stand word for word in several files: read once, and taken over where they would be read the same.

A third of what is parsed of a large package are such copies, of a helper or of the model that another began as. What
was read of one holds for the next if the questions that came up in reading it have the same answers there: what a
name stands for, what the class keeps under an attribute. Neither parsing nor reading them again saved a tenth of a
scan of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gradscope.scanning.blanking import Blanked
from gradscope.scanning.body import Body
from gradscope.scanning.facts import Atoms, Class, Function, Site
from gradscope.scanning.lines import first_line, line_numbers
from gradscope.scanning.reading import parse_function
from gradscope.scanning.signatures import FunctionNode
from gradscope.scanning.switches import Names

# An atom that ends in a line: ``cut:12``, ``off:cut:12``, ``in:12``.
_LINE = re.compile(r"((?:^|:)(?:cut|in):)(\d+)$")


@dataclass(slots=True)
class Reading:
    """What was read of a function; the names and attributes that it took to be read, and what these meant."""

    names: tuple[str, ...]
    attributes: tuple[str, ...]
    answers: list[object]
    first_line: int
    function: Function
    sites: list[Site]

    def at(self, name: str, line: int) -> tuple[Function, list[Site]]:
        """Return what it comes to under another name, on other lines."""
        by = line - self.first_line
        function = self.function
        moved = replace(
            function, name=name, line=function.line + by, end_line=function.end_line + by,
            returns=_atoms_moved(function.returns, by),
        )  # fmt: skip
        sites = [
            replace(
                site, function=name, line=site.line + by, end_line=site.end_line + by,
                depends=_atoms_moved(site.depends, by), effects=_atoms_moved(site.effects, by),
            )
            for site in self.sites
        ]  # fmt: skip
        return moved, sites


class Copies:
    """What was read of functions, by their text."""

    def __init__(self) -> None:
        self.readings: dict[str, list[Reading]] = {}

    def __contains__(self, text: object) -> bool:
        return text in self.readings

    def clear(self) -> None:
        """Forget all of them."""
        self.readings.clear()


class CopiesInFile:
    """The functions of one file that are copies, or may be the first of some."""

    def __init__(self, copies: Copies, names: Names, source: str, blanked: Blanked) -> None:
        self._copies = copies
        self._names = names
        by_line = dict(zip(line_numbers(source, list(blanked.functions)), blanked.functions.items(), strict=True))
        self._texts = {line: text for line, (_, text) in by_line.items()}
        self._stubs = {line for line, (at, _) in by_line.items() if at in blanked.stubs}

    def whole(self, node: FunctionNode) -> FunctionNode:
        """Return the function that a stub stands for; any other as it is."""
        if node.lineno not in self._stubs or not _is_stub(node):
            return node
        return parse_function(self._texts[node.lineno], node.lineno)

    def known(self, node: FunctionNode, klass: Class | None, none_here: bool) -> Reading | None:
        """Return what was read of a stub's text in a place where every name meant the same."""
        if node.lineno not in self._stubs or not _is_stub(node) or self._names.aliases:
            return None
        for known in self._copies.readings.get(self._texts[node.lineno], ()):
            if known.answers == _answers(known.names, known.attributes, self._names, klass, none_here):
                return known
        return None

    def note(self, body: Body, function: Function, klass: Class | None, none_here: bool) -> None:
        """Keep what was read of a function just now, when ``names`` still knows what it was asked."""
        line = first_line(body.node)
        text = self._texts.get(line)
        if text is None or not body.is_alone or self._names.aliases or self._names.wrappers:
            return
        if text.count("\n") != function.end_line - line:  # it is not just the function
            return
        asked, attributes = tuple(self._names.asked), tuple(function.reads)
        answers = _answers(asked, attributes, self._names, klass, none_here)
        reading = Reading(asked, attributes, answers, line, function, body.sites)
        self._copies.readings.setdefault(text, []).append(reading)


def _is_stub(node: FunctionNode) -> bool:
    return [argument.arg for argument in node.args.args] == ["_"]


def _answers(
    asked: Iterable[str], attributes: Iterable[str], names: Names, klass: Class | None, none_here: bool
) -> list[object]:
    """Return the answers to all that reading a function asks of its file and its class."""
    imported = frozenset(names.imports.values())
    answers: list[object] = [none_here]
    for name in asked:
        meant = names.imports.get(name, name)
        root = meant.partition(".")[0]
        answers.append((meant, root in imported, names.is_elsewhere(root)))
    if klass is not None:
        answers += (bool(klass.bases), "__call__" in klass.methods)
        answers += [(klass.attributes.get(name, ""), name in klass.methods) for name in attributes]
    return answers


def _atoms_moved(atoms: Atoms, by: int) -> Atoms:
    if not by or not any(map(_LINE.search, atoms)):
        return atoms
    return frozenset(_LINE.sub(lambda match: f"{match[1]}{int(match[2]) + by}", atom) for atom in atoms)
