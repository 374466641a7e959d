"""Source of other packages that the code scanned uses: found by path search, read like the rest, never imported.

``self.encoder.encode(x)`` may run under a switch that stands in an installed package, or in a module beside the script.
Which files these are is told by text alone: the imports of the code scanned, where each name is defined, and what that
definition names in turn. What was found is what Python would import; what was not is left out.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from gradscope.scanning.blanking import HEADER
from gradscope.scanning.reading import decode
from gradscope.scanning.resolve import SourceFile, find_first, locations_of
from gradscope.scanning.switches import add_imports

# So many characters are followed, the nearest first: what is further away is run less often.
MOST_TEXT = 1_500_000
# Re-exports between a name and its definition.
MOST_EXPORTS = 8
# Modules imported with a star that are looked into for one name.
MOST_STARRED = 20
# torch's own functions are known by their rules; in the standard library and in these no tensor is computed with.
KNOWN = frozenset({
    "torch", "__future__", *sys.stdlib_module_names,
    *("numpy scipy pandas PIL cv2 matplotlib sklearn tqdm yaml requests packaging typing_extensions einops "
    "datasets wandb").split(),
})  # fmt: skip

# These begin with a line break, not with ``^``: a literal lets the search leap from line to line.
_IMPORT = re.compile(
    r"\n[ \t]*(?:from[ \t]+([.\w]+)[ \t]+import[ \t]*(?:\([^)]*\)|(?:[^\n\\]|\\\n)*)|"
    r"import[ \t]+(\w+)(?:[^\n\\]|\\\n)*)"
)
_DEFINITION = re.compile(r"\n(?:class|def|async[ \t]+def)[ \t]+(\w+)")
_COMMENT = re.compile(r"#[^\n]*")
_WORD = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


@dataclass(slots=True)
class Outside:
    """What the code scanned uses of others: their files with what each imports, and the packages not found here."""

    files: dict[SourceFile, dict[str, str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Source:
    """A file as text: where its definitions begin, and what its names are imported from."""

    file: SourceFile
    text: str
    blocks: dict[str, str]
    imports: dict[str, str]


def follow(files: Iterable[tuple[SourceFile, bytes]]) -> Outside:
    """Return the files outside of these that define what they use, and what that is made of."""
    search = _Search([_source(file, data) for file, data in files])
    search.run()
    return search.outside


class _Search:
    """The search from file to file, breadth first."""

    def __init__(self, own: list[Source]) -> None:
        self.outside = Outside()
        # For this search alone: files and the import path may change from one to the next.
        self._source = lru_cache(maxsize=None)(_source)
        self._module_at = lru_cache(maxsize=None)(self._find_module)
        self._spec = lru_cache(maxsize=None)(self._find_spec)
        self._own = own
        self._own_paths = {os.path.abspath(source.file.shown) for source in own}
        self._own_modules = {source.file.module for source in own}
        self._folders = tuple(dict.fromkeys(_import_folder(source.file) for source in own if not source.file.archive))
        self._seen: set[tuple[str, str]] = set()
        self._room = MOST_TEXT

    def run(self) -> None:
        """Follow all that the code scanned imports."""
        pending: deque[tuple[str, int]] = deque()
        for source in self._own:
            here = {local: meant for local, meant in source.imports.items() if self._is_outside(meant)}
            gone = {local: meant for local, meant in here.items() if self._spec(meant.partition(".")[0]) is None}
            self.outside.missing += [meant.partition(".")[0] for local, meant in gone.items()
                                     if _makes(source.text, local)]  # fmt: skip
            found = {local: meant for local, meant in here.items() if local not in gone}
            pending.extend((dotted, 0) for dotted in (_used(source.text, found) if found else ()))
        while pending and self._room > 0:
            dotted, depth = pending.popleft()
            for source, name in self._definitions(dotted):
                pending.extend((each, depth + 1) for each in self._uses(source, name, whole=not depth))
        self.outside.missing = sorted(set(self.outside.missing))

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
            if "torch" in source.text or (head and head[2]):  # it may derive from one that has to do with torch
                self._keep(source)
                yield source, name
            return
        for meant in [source.imports[name]] if name in source.imports else _starred(source, name):
            found = list(self._definitions(meant, exports + 1)) if meant != dotted else []
            if found:
                self._keep(source)
                yield from found
                return

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
            here = {word.partition(".")[0] for word in _WORD.findall(block)} & source.blocks.keys()
            pending += here - seen
            seen |= here
            yield from (each for each in _used(block, source.imports) if self._is_near(each, source))

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
            if found is not None:
                return found, rest
            head, _, last = head.rpartition(".")
            rest = f"{last}.{rest}" if rest else last
        return None, ""


def _import_folder(file: SourceFile) -> str:
    """Return the folder that a file's own top-level module lies in, where its neighbours are imported from."""
    above = file.module.count(".") + (1 if file.is_package else 0)
    folders = Path(file.path).absolute().parents
    return str(folders[min(above, len(folders) - 1)])


def _source(file: SourceFile, data: bytes | None = None) -> Source:
    try:
        text = f"\n{decode(file.read() if data is None else data).source}"
    except OSError:
        text = ""
    starts = list(_DEFINITION.finditer(text))
    ends = [*(match.start() for match in starts[1:]), len(text)]
    blocks = {match[1]: text[match.start() : end] for match, end in zip(starts, ends, strict=False)}
    imports: dict[str, str] = {}
    module = f"{file.module}.__init__" if file.is_package else file.module
    for match in _IMPORT.finditer(text):
        base = match[1] or match[2]
        if base.partition(".")[0] not in KNOWN or not base.partition(".")[0]:
            _add(imports, match, module)
    return Source(file, text, blocks, imports)


def _add(imports: dict[str, str], match: re.Match[str], module: str) -> None:
    """Take note of what an import binds, as :func:`add_imports` does with its syntax tree."""
    text = _COMMENT.sub("", match[0]).replace("\\\n", " ")
    names = text.partition("import")[2].strip().strip("()") if match[1] else text.strip()[len("import") :]
    found = [each.split(" as ") for each in names.replace("\n", " ").split(",")]
    aliases = [ast.alias(name[0].strip(), name[1].strip() if name[1:] else None) for name in found if name[0].strip()]
    if match[1]:
        home = match[1].lstrip(".")
        node: ast.Import | ast.ImportFrom = ast.ImportFrom(home, aliases, len(match[1]) - len(home))
    else:
        node = ast.Import(aliases)
    add_imports(imports, node, module)


def _starred(source: Source, name: str) -> list[str]:
    """Return what a name may be in the modules that a file imports everything from, the likeliest first.

    transformers has four hundred of them, and ``BertModel`` is in the one called ``bert``.
    """
    bases = [base for key, base in source.imports.items() if key.startswith("*")]
    lower = name.lower()

    def unlikely(base: str) -> int:
        last = base.rpartition(".")[2].replace("_", "")
        return -len(last) if last in lower else 0

    return [f"{base}.{name}" for base in sorted(bases, key=unlikely)[:MOST_STARRED]]


def _used(text: str, imports: dict[str, str]) -> list[str]:
    """Return the imported names that a text uses, dotted as far as it writes them."""
    found: dict[str, None] = {}
    for word in dict.fromkeys(_WORD.findall(text)):
        root, _, rest = word.partition(".")
        if root in imports:
            found[".".join(filter(None, (imports[root], rest)))] = None
    return list(found)


def _makes(text: str, local: str) -> bool:
    """Tell whether a text with modules or training in it makes an instance of a class that an import gave a name."""
    is_trained = "nn.Module" in text or ".backward(" in text
    found = re.search(rf"=[ \t]*({re.escape(local)}(?:\.\w+)*)\(", text) if is_trained else None
    return found is not None and any(part[:1].isupper() for part in found[1].split("."))
