"""Source of other packages that the code scanned uses: found by path search, read like the rest, never imported.

``self.encoder.encode(x)`` may run under a switch that stands in an installed package, or in a module beside the script.
Which files these are is told by text alone: the imports of the code scanned, where each name is defined, and what that
definition names in turn. What was found is what Python would import; what was not is left out.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from gradscope.scanning.blanking import HEADER
from gradscope.scanning.makers import LOADERS
from gradscope.scanning.resolve import SourceFile, find_first, locations_of
from gradscope.scanning.sources import (
    IS_MODEL,
    KNOWN,
    WORD,
    Source,
    gives_others,
    makes_models,
    may_give_any,
    meanings,
    names_used,
    source_of_file,
    words_given,
)

# So many characters are followed, the nearest first: what is further away is run less often.
MOST_TEXT = 1_500_000
# A package of more than so many characters is no script, of which all is told that was not followed.
MOST_OF_A_SCRIPT = 300_000
# Re-exports between a name and its definition.
MOST_EXPORTS = 8
# Functions, from one to the next, that have a model made.
LONGEST_CHAIN = 24


@dataclass(slots=True)
class Outside:
    """What the code scanned uses of others: their files with what each imports, and the packages not found here.

    ``makers`` are what it may get models from (``makers.py``), by dotted name, each as the code scanned writes it.
    """

    files: dict[SourceFile, dict[str, str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    makers: dict[str, set[str]] = field(default_factory=dict)


def follow(files: Iterable[tuple[SourceFile, bytes]]) -> Outside:
    """Return the files outside of these that define what they use, and what that is made of."""
    search = _Search([source_of_file(file, data) for file, data in files])
    search.run()
    return search.outside


class _Search:
    """The search from file to file, breadth first."""

    def __init__(self, own: list[Source]) -> None:
        self.outside = Outside(makers={name: {name.partition(".")[2]} for name in LOADERS})
        # For this search alone: files and the import path may change from one to the next.
        self._source = lru_cache(maxsize=None)(source_of_file)
        self._module_at = lru_cache(maxsize=None)(self._find_module)
        self._spec = lru_cache(maxsize=None)(self._find_spec)
        self._own = own
        self._own_paths = {os.path.abspath(source.file.shown) for source in own}
        self._own_modules = {source.file.module for source in own}
        self._folders = tuple(dict.fromkeys(_import_folder(source.file) for source in own if not source.file.archive))
        # Where a script's own modules lie, which nobody installed.
        self._beside = {folder for folder in self._folders if not folder.endswith("-packages")}
        self._looked_into: set[SourceFile] = set()
        self._seen: set[tuple[str, str]] = set()
        self._made: dict[str, None] = {}  # what makes models for the code scanned, and their classes
        self._is_script = sum(len(source.text) for source in own) < MOST_OF_A_SCRIPT
        self._room = MOST_TEXT

    def run(self) -> None:
        """Follow all that the code scanned imports."""
        pending: deque[tuple[str, int]] = deque()
        for source in self._own:
            here = {local: meant for local, meant in source.imports.items() if self._is_outside(meant)}
            gone = {local: meant for local, meant in here.items() if self._spec(meant.partition(".")[0]) is None}
            self.outside.missing += [meant.partition(".")[0] for local, meant in gone.items()
                                     if makes_models(source.text, local, in_script=self._is_script)]  # fmt: skip
            found = {local: meant for local, meant in here.items() if local not in gone}
            used = names_used(source.text, found) if found else {}
            self._note_makers(source, used)
            pending.extend((dotted, 0) for dotted in (*used, *self._made))
        while pending and self._room > 0:
            dotted, depth = pending.popleft()
            for source, name in self._definitions(dotted):
                if self._is_beside(source) and source.file not in self._looked_into:
                    self._looked_into.add(source.file)
                    self._note_makers(source, self._used_outside(source))
                    pending.extend((each, 0) for each in self._made)
                pending.extend((each, depth + 1) for each in self._uses(source, name, whole=not depth))
        self.outside.missing = sorted(set(self.outside.missing))

    # --- what models are got from -----------------------------------------------------------------

    def _note_makers(self, source: Source, used: dict[str, str]) -> None:
        """Take note of what a file of the code scanned may get models from, and of all that these are made by."""
        for called, written in used.items():
            dotted = called.removesuffix(".get")  # registry.get(name)
            found = self._located(dotted) if written.endswith(("(", "[")) else None
            if found is not None and (self._gives_models(*found) or (self._is_script and may_give_any(*found))):
                self._is_maker(dotted, written[:-1])
        roots = {written.partition(".")[0].rstrip("([") for written in used.values()}
        for name, block in source.blocks.items() if roots else ():
            if any(root in block for root in roots) and self._gives_models(source, name):
                self._is_maker(f"{source.file.module}.{name}", name if block.startswith(f"\n{name}") else f"{name}(")

    def _is_maker(self, dotted: str, *written: str) -> None:
        self.outside.makers.setdefault(dotted, set()).update(written)

    def _gives_models(self, source: Source, name: str, rest: str = "") -> bool:
        """Tell whether calling this gives a model of a class that its name does not tell; note what makes it."""
        block = source.blocks[name]
        if block.startswith("\nclass"):
            is_one = gives_others(block, name, rest)
            if is_one:
                self._is_maker(f"{source.file.module}.{name}.{rest}")
                self._made[f"{source.file.module}.{name}"] = None
            return is_one
        chain, classes = self._chain(source, name)
        if rest or not classes:
            return False
        for home, each in chain:
            self._is_maker(f"{home.file.module}.{each}")
        self._made.update(dict.fromkeys(f"{home.file.module}.{each}" for home, each in (*chain, *classes)))
        return True

    def _chain(self, source: Source, name: str) -> tuple[list[tuple[Source, str]], list[tuple[Source, str]]]:
        """Return a function or table with those that make for it what it gives, and the classes of models they make."""
        pending, seen = [(source, name)], {(source.file.shown, name)}
        chain: list[tuple[Source, str]] = []
        classes: list[tuple[Source, str]] = []
        while pending and len(chain) < LONGEST_CHAIN:
            home, each = pending.pop(0)
            block = home.blocks[each]
            if block.startswith("\nclass"):
                classes += [(home, each)] if IS_MODEL.search(block) else []
                continue
            chain.append((home, each))
            for word in words_given(block):
                root, _, rest = word.partition(".")
                found = (home, root, rest) if root in home.blocks and root != each else None
                if root in home.imports:
                    found = self._located(".".join(filter(None, (home.imports[root], rest))))
                if found is not None and found[2] != "apply" and (found[0].file.shown, found[1]) not in seen:
                    seen.add((found[0].file.shown, found[1]))
                    pending.append(found[:2])
        return chain, classes

    def _located(self, dotted: str, exports: int = 0) -> tuple[Source, str, str] | None:
        """Return the file that defines what a dotted name means, the name there and what is meant of that."""
        module, rest = self._module(dotted)
        name, _, of_it = rest.partition(".")
        if module is None or not name or exports > MOST_EXPORTS or module.shown in self._own_paths:
            return None
        source = self._source(module)
        if name in source.blocks:
            return source, name, of_it
        for meant in meanings(source, name):
            found = self._located(f"{meant}.{of_it}" if of_it else meant, exports + 1) if meant != dotted else None
            if found is not None:
                return found
        return None

    def _is_outside(self, dotted: str) -> bool:
        parts = dotted.split(".")
        heads = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        return parts[0] not in KNOWN and not any(head in self._own_modules for head in heads)

    def _is_near(self, dotted: str, source: Source) -> bool:
        """Tell whether a name is of the package that a file is in, or of a module beside the code scanned."""
        root = dotted.partition(".")[0]
        if root == source.file.module.partition(".")[0]:
            return True
        found = self._module_at(root) if self._is_outside(root) else None
        return found is not None and _import_folder(found) in self._folders

    def _is_beside(self, source: Source) -> bool:
        return not source.file.archive and _import_folder(source.file) in self._beside

    def _used_outside(self, source: Source) -> dict[str, str]:
        here = {local: meant for local, meant in source.imports.items() if self._is_outside(meant)}
        return names_used(source.text, here) if here else {}

    def _definitions(self, dotted: str, exports: int = 0) -> Iterator[tuple[Source, str]]:
        """Yield the file that defines what a dotted name means, through re-exports, once each."""
        module, rest = self._module(dotted)
        name = rest.partition(".")[0]
        if module is None or not name or exports > MOST_EXPORTS or module.shown in self._own_paths:
            return
        if (module.shown, name) in self._seen:
            return
        self._seen.add((module.shown, name))
        source = self._source(module)
        if name in source.blocks:
            head = HEADER.match(source.blocks[name])
            # It may derive from one that has to do with torch, or have it made.
            if "torch" in source.text or (head and head[2]) or f"{source.file.module}.{name}" in self._made:
                self._keep(source)
                yield source, name
            return
        for meant in meanings(source, name):
            found = list(self._definitions(meant, exports + 1)) if meant != dotted else []
            if found or self._is_kept(meant):
                self._keep(source)
                yield from found
                return

    def _is_kept(self, dotted: str) -> bool:
        """Tell whether the file that defines what a name means was come to on another way."""
        located = self._located(dotted)
        return located is not None and located[0].file in self.outside.files

    def _keep(self, source: Source) -> None:
        if source.file not in self.outside.files:
            self.outside.files[source.file] = source.imports
            self._room -= len(source.text)

    def _uses(self, source: Source, name: str, *, whole: bool) -> Iterator[str]:
        """Yield what a definition uses of other files near it, itself or through others of its own file.

        Where not ``whole``, only what it derives from.
        """
        pending, seen = [name], {name}
        while pending:
            block = source.blocks[pending.pop()]
            if not whole:
                head = HEADER.match(block)
                block = (head[2] or "") if head else ""
            here = {word.partition(".")[0] for word in WORD.findall(block)} & source.blocks.keys()
            pending += here - seen
            seen |= here
            follows = self._is_outside if self._is_beside(source) else partial(self._is_near, source=source)
            yield from filter(follows, names_used(block, source.imports))

    def _find_module(self, dotted: str) -> SourceFile | None:
        """Return the file that holds the source of a module; None where there is none."""
        spec = self._spec(dotted)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            return None
        return SourceFile(spec.origin, dotted, os.path.basename(spec.origin) == "__init__.py", is_outside=True)

    def _find_spec(self, dotted: str) -> ModuleSpec | None:
        above, _, last = dotted.rpartition(".")
        if not above:  # what lies beside a script comes first, as it does when that is run
            beside = PathFinder.find_spec(last, list(self._folders)) if self._folders else None
            return beside or find_first(last)
        parent = self._spec(above)
        locations = locations_of(parent) if parent is not None else []
        return PathFinder.find_spec(last, locations) if locations else None

    def _module(self, dotted: str) -> tuple[SourceFile | None, str]:
        """Return the file of the longest module that a dotted name begins with, and the rest."""
        head, rest = dotted, ""
        while head:
            found = self._module_at(head)
            if found is not None and (rest or not self._is_rebound(head)):
                return found, rest
            head, _, last = head.rpartition(".")
            rest = f"{last}.{rest}" if rest else last
        return None, ""

    def _is_rebound(self, dotted: str) -> bool:
        """Tell whether a package gives the name of a module in it to something else: ``from .score import score``."""
        above, _, name = dotted.rpartition(".")
        package = self._module_at(above) if above else None
        source = self._source(package) if package is not None and package.is_package else None
        if source is None:
            return False
        meant = meanings(source, name)
        return name in source.blocks or any(each == f"{dotted}.{name}" for each in meant)


def _import_folder(file: SourceFile) -> str:
    """Return the folder that a file's own top-level module lies in, where its neighbours are imported from."""
    above = file.module.count(".") + (1 if file.is_package else 0)
    folders = Path(file.path).absolute().parents
    return str(folders[min(above, len(folders) - 1)])
