"""What of a file is parsed: all but the blocks without a hit becomes empty lines, which keeps every line number.

Of a class that holds no switch, the methods without a hit are blanked too. A function that stands word for word in
a file read before (``copies.py``) becomes a stub of as many lines: it is in the tree, and none of its body is.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

# These begin with a line break, not with ``^``: a literal lets the search leap from line to line.
HEADER = re.compile(r"\nclass[ \t]+(\w+)[ \t]*(?:\(([^()]*(?:\([^()]*\)[^()]*)*)\))?[ \t]*:")
# A new top-level statement: not indented, not a closing bracket, not a comment, not the tail of another.
BLOCK = re.compile(r"\n(?=[^ \t\r\n)\]}#])(?!else\b|elif\b|except\b|finally\b|case\b)")
# In a class: a method, its decorator, or any other statement of the class body.
METHOD = re.compile(r"\n    (?=[^ \t\n)\]}#])")
DEF = re.compile(r"[ \t]*(?:async[ \t]+)?def[ \t]+(\w+)")
# What is kept on ``self`` is read off these.
CONSTRUCTORS = ("__init__", "build", "setup", "_build", "post_init")
# No stub is made of what the reader of a class looks into as well, for what the class is.
_NO_STUBS = (*CONSTRUCTORS, "__enter__", "backward", "vjp")

# A line of which only the indentation counts: what is on the next one, wherever that begins, is indented so.
_GOES_ON = re.compile(r"(?:^|\n)[ \t]*\\\n")
_TRIPLE_QUOTES = (re.compile('"""'), re.compile("'''"))
_DEFINITION = ("class ", "def ", "async def ")


@dataclass(slots=True)
class Blanked:
    """The source that is left of a file, and what was done to it.

    ``left_out`` are the methods that were blanked, by class. ``functions`` are the texts of those that were not, by
    the offset of their first line (a decorator's, where there is one), ``stubs`` the offsets of those made a stub.
    """

    source: str
    left_out: dict[str, list[str]] = field(default_factory=dict)
    functions: dict[int, str] = field(default_factory=dict)
    stubs: set[int] = field(default_factory=set)


def blank(source: str, offsets: list[int], deep: list[int], known: Container[str] = ()) -> Blanked:
    """Replace what holds no offset of interest by empty lines, and functions whose text is known by stubs."""
    if "\\\n" in source and _GOES_ON.search(source):
        return Blanked(source)
    return _Blanking(source, offsets, deep, known).done()


class _Blanking:
    """One file while it is blanked."""

    def __init__(self, source: str, offsets: list[int], deep: list[int], known: Container[str]) -> None:
        self.source, self.offsets, self.deep, self.known = source, offsets, deep, known
        self.quotes = _triple_quotes(source)
        self.made = Blanked(source)

    def done(self) -> Blanked:
        source = self.source
        starts = [match.end() for match in BLOCK.finditer(source)]
        if source and BLOCK.match(f"\n{source[:8]}"):
            starts.insert(0, 0)
        if starts:
            blocks = list(self._parts(starts, len(source), 0))
            rest = source[blocks[-1][2] if blocks else starts[0] :]
            self.made.source = "".join([source[: starts[0]], *(self._block(*block) for block in blocks), rest])
        return self.made

    def _parts(self, starts: list[int], end: int, indent: int) -> Iterator[tuple[int, int, int]]:
        """Yield the stretches from statement to statement: begin, the last start in it, and end."""
        pending = starts[0]
        for start, stop in pairwise([*starts, end]):
            # A decorator belongs to what follows, and so does the head of an open string.
            if self.source[start + indent] != "@" and not _is_open(self.quotes, pending, stop):
                yield pending, start, stop
                pending = stop

    def _block(self, begin: int, start: int, end: int) -> str:
        source = self.source
        if not _any_within(self.offsets, begin, end):
            is_import = not source.startswith(_DEFINITION, start) and source.find("import", begin, end) >= 0
            return source[begin:end] if is_import else "\n" * source.count("\n", begin, end)
        if source.startswith("class ", start):
            return self._class(begin, start, end)
        return self._function(begin, start, end)

    def _class(self, begin: int, start: int, end: int) -> str:
        block = self.source[begin:end]
        name = HEADER.search(f"\n{block}")
        starts = [begin + match.start() + 1 for match in METHOD.finditer(block)]
        if name is None or not starts:
            return block
        is_whole = _any_within(self.deep, begin, end) or _any_within(  # an autograd.Function: backward matters
            self.offsets, start, self.source.find("\n", start)
        )
        kept, last = [self.source[begin : starts[0]]], starts[0]
        for first, at, last in self._parts(starts, end, 4):
            found = None if is_whole or _any_within(self.offsets, first, last) else DEF.match(self.source, at)
            if found is None:
                kept.append(self._function(first, at, last))
            else:
                self.made.left_out.setdefault(name[1], []).append(found[1])
                kept.append("\n" * self.source.count("\n", first, last))
        return "".join([*kept, self.source[last:end]])

    def _function(self, begin: int, start: int, end: int) -> str:
        """Return a statement as it stands; of a function take note, or give a stub where its text is known."""
        block = self.source[begin:end]
        found = DEF.match(self.source, start)
        if found is None or not (start == begin or block.lstrip(" ").startswith("@")) or found[1] in _NO_STUBS:
            return block
        text = _without_tail(block)
        self.made.functions[begin] = text
        if text not in self.known:
            return block
        self.made.stubs.add(begin)
        lines, below = "\n" * text.count("\n"), "\n" * block.count("\n", len(text))
        return f"{found[0]}(_=[{lines}]): 0{below}"


def _without_tail(block: str) -> str:
    """Return a function's text without the blank lines and the comments behind it."""
    text = block.rstrip()
    while True:
        last = text.rfind("\n") + 1
        line = text[last:].lstrip()
        if not (last and line.startswith("#")) or '"' in line or "'" in line:  # it may end a string
            return text
        text = text[:last].rstrip()


def _triple_quotes(source: str) -> list[list[int]]:
    """Return the offsets of the triple quotes, ascending, by kind: those of which there are any."""
    return [[match.start() for match in kind.finditer(source)] for kind in _TRIPLE_QUOTES if kind.pattern in source]


def _is_open(quotes: list[list[int]], start: int, end: int) -> bool:
    """Tell whether a string that runs over lines begins in a stretch and does not end there."""
    for places in quotes:  # noqa: SIM110 - asked of every statement, and a generator takes three times as long
        if (bisect_left(places, end) - bisect_left(places, start)) % 2:
            return True
    return False


def _any_within(offsets: list[int], start: int, end: int) -> bool:
    at = bisect_left(offsets, start)
    return at < len(offsets) and offsets[at] < end
