"""Which classes a value is of that a function made: its notation (``makers.py``) read with all files at hand."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from gradscope.scanning.facts import FileFacts, Function
from gradscope.scanning.instances import is_factory

if TYPE_CHECKING:
    from gradscope.scanning.package import Package, Place

# From function to function: load -> create -> build.
FARTHEST = 8
_NOTATION = re.compile(r"\?([^@\[\]]+)(?:@([^\[\]]*))?((?:\[[^\]]*\])*)$")
_OF_THE_CLASS = re.compile(r"(?<=^\?)cls(?=\.)|^cls$")


def classes_made(package: Package, kind: str, module: str, depth: int = 0) -> Iterator[Place]:
    """Yield the classes of the scan that a value of this notation, written in ``module``, may be of."""
    for each in filter(None, kind.split("|")) if depth < FARTHEST else ():
        match = _NOTATION.match(each)
        name, key, items = match.groups("") if match else (each, "", "")
        if match and is_factory(name.rpartition(".")[0]):  # AutoModel.from_pretrained
            continue
        found = package.find(name, module) or package.of_instance(name, module) if match else None
        place = found if match else package.find_class(name, module)
        if place is None:
            continue
        function, tables = package.function(place), package.files[place.module].tables
        if function is not None:
            for made, where in _given(package, function, (name, module), items):
                yield from classes_made(package, made, where or place.module, depth + 1)
        elif place.name in tables:
            for made in _kept(tables[place.name], key):
                yield from classes_made(package, _with_items(made, items), place.module, depth + 1)
        elif not items:
            yield place


def _given(package: Package, function: Function, called: tuple[str, str], items: str) -> Iterator[tuple[str, str]]:
    """Yield the notations of what a function gives, each with the module that it is written in: its own, if empty.

    ``called`` is the name that the function is called by, and where.
    """
    first, _, rest = items[1:].partition("]")
    if first and first not in function.gives:
        first, rest = "", items
    made = function.gives.get(first, "")
    if not function.gives:  # it was only read for what its result depends on
        atoms = (atom[5:] for atom in sorted(function.returns) if atom.startswith("call:"))
        made = "".join(f"|{each}" for each in atoms if each.rpartition(".")[2][:1].isupper())
    for each in filter(None, made.split("|")):
        own = _OF_THE_CLASS.sub(called[0].rpartition(".")[0], each)  # cls is what the caller calls so
        yield _with_items(own, rest), called[1] if own != each else ""


def _kept(table: dict[str, str], key: str) -> list[str]:
    """Return the notations of what is made by what a table keeps under a key; of all, where that is not there."""
    if key and list(table) == [""]:  # another name for a table
        return ["".join(f"|{each}@{key}" for each in filter(None, table[""].split("|")))]
    return [table[key]] if key in table else list(table.values())


def _with_items(kind: str, items: str) -> str:
    """Return the notation for a part of what another one stands for."""
    return "".join(f"|{each}{items}" for each in filter(None, kind.split("|"))) if items else kind


def makers_in(facts: FileFacts, makers: Collection[str]) -> Iterator[str]:
    """Yield the functions of a file that give what others do of which models are got."""
    for function in facts.functions.values():
        kinds = (each for kind in function.gives.values() for each in kind.split("|"))
        names = {maker_of(each) for each in kinds} if "." not in function.name else set()
        if any(name in makers or f"{facts.module}.{name}" in makers for name in names):
            yield f"{facts.module}.{function.name}"


def maker_of(kind: str) -> str:
    """Return the name of the function or table in a notation: of ``?clip.load[0]`` that is ``clip.load``."""
    match = _NOTATION.match(kind)
    return match[1] if match else ""
