"""From bytes to the smallest syntax tree that still holds every hit.

Parsing is what a scan costs, so a file is parsed only where a regular expression found something, and
of such a file only the top-level blocks with a hit and those with an import: the rest is blanked to
empty lines, which keeps every line number. Where that leaves no valid Python, the whole file is parsed.
"""

from __future__ import annotations

import ast
import codecs
import io
import re
import tokenize
import warnings
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace

from gradscope.scanning.blanking import HEADER, Blanked, blank

LARGEST_FILE = 8_000_000  # bytes; a generated table, not somebody's model

# Found with plain substring search, which is ten times faster than an alternation.
GRAD_MODE = ("no_grad", "inference_mode", "set_grad_enabled", "enable_grad")
# ``import no_grad as quiet`` gives it a name; ``Net.run = torch.no_grad()(Net.run)`` makes Net worth reading.
RENAMED = re.compile(
    r"(?:no_grad|inference_mode|set_grad_enabled|enable_grad)"
    r"(?:[\s\\]+as[\s\\]+(\w+)|(?:\(\w*\))?\((?!self\b|True|False)([A-Za-z_]\w*)[\w.]*\))"
)
# Of ``torch.tensor(0.5)`` nothing is lost; as much of the literal as can be told without parsing.
_LITERAL = r"(?:[-+\d.,\s\[\]]|(?<=\d)e(?=[-+\d])|True|False|float\([\"'][-+]?inf[\"']\))+(?:\)|(?:dtype|device)\b)"
# Every alternative starts with a dot, so that the search may leap from dot to dot, and there is one for each letter:
# at most of the dots none begins with what follows, and half as many to try took half the time.
TENSOR_OPS = re.compile(
    r"\.(?:d(?:etach_?\(|ata\b)|i(?:tem\(|nt\(\))|n(?:umpy\(|ew_tensor\()|s(?:ample\(|ign\()|l(?:ong\(\))|"
    r"r(?:equires_grad(?:_\((?:requires_grad=)?| = )False|ound\()|f(?:rom_numpy\(|(?<=\)\.f)loat\(\))|"
    r"a(?:s(?:_tensor|array)\(\[|rgm(?:ax|in)\()|g(?:rad\()|j(?:acobian\(|vp\()|h(?:essian\(|vp\()|v(?:jp\(|hp\()|"
    rf"t(?:olist\(|ensor\((?!{_LITERAL})|(?:o|ype)\((?:dtype=)?torch\.(?:u?int|long|bool|short))|"
    r"b(?:ernoulli\()|m(?:ultinomial\()|F(?:unction\b))"
)
# The same where no dot need come before: literals, each with the characters that tell it from a longer name.
BARE_OPS = {"checkpoint(": " (.", "custom_op(": " (.@=", "Function)": "(", "float(": " (=", "grad(": " (="}
_COMPARISON = re.compile(r"[<>]|[=!]=|\b(?:in|is)\b")
_MADE_AT_TOP = re.compile(r"^\w+(?:,[ \t]*\w+)*[ \t]*=[ \t]*(?:\w+\.)*[A-Z]\w*(?:\.from_\w+)?\(", re.MULTILINE)
_FORM_FEED = re.compile(r"^[ \t\f]*\f", re.MULTILINE)
_COOKIE = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)", re.MULTILINE)

# Weights are initialised without gradients nearly everywhere; that alone makes no class worth reading whole.
INITIALISERS = ("_init_weights", "init_weights", "_initialize_weights", "reset_parameters", "_reset_parameters")
_INITIALISER = re.compile(rf"(no_grad|inference_mode)(?:\(\))?\n[ \t]+def (?:{'|'.join(INITIALISERS)})\(")

# The line up to where a parameter is made: ``self.scale = nn.Parameter(...)``.
_KEEPS = re.compile(r"[ \t]*self\.(\w+)(?:[ \t]*:[^=\n]*)?[ \t]*=[ \t]*(?:[\w.]+\.)?$")
_DEF = re.compile(r"def[ \t]+(\w+)")
# Where parameters are made once: constructors, and what prepares or converts a model.
_MAKES_ONCE = re.compile(
    r"init|reset|build|setup|load|convert|merge|add|from_|to_|set_|register|create|make|resize|tie"
)


@dataclass(slots=True)
class Text:
    """A decoded file; ``skipped`` gives the reason where it could not be read."""

    source: str = ""
    skipped: str = ""


def decode(data: bytes) -> Text:
    """Decode Python source by its own rules: byte-order mark, PEP 263 comment, UTF-8."""
    if len(data) > LARGEST_FILE:
        return Text(skipped=f"larger than {LARGEST_FILE // 1_000_000} MB")
    if b"\0" in data:
        return Text(skipped="holds NUL bytes, so it is not Python source")
    try:
        encoding = "utf-8"
        if data.startswith(codecs.BOM_UTF8) or b"coding" in data[:400]:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        source = data.decode(encoding)
    except (SyntaxError, LookupError, UnicodeDecodeError) as error:
        return Text(skipped=f"cannot be decoded: {error}")
    if "\r" in source:
        source = source.replace("\r\n", "\n").replace("\r", "\n")
    if "\f" in source:  # at the start of a line it means that the indentation begins anew
        source = _FORM_FEED.sub("", source).replace("\f", " ")
    return Text(source)


def hides_text(data: bytes) -> bool:
    """Tell whether a file's bytes may not show what its text says: NUL bytes, or an encoding unlike ASCII."""
    if b"\0" in data:
        return True
    cookie = _COOKIE.search(data[:400]) if b"coding" in data[:400] else None
    return cookie is not None and not cookie[1].lower().startswith((b"utf-8", b"utf8", b"latin", b"iso-8859", b"ascii"))


def headers(source: str) -> dict[str, tuple[str, ...]]:
    """Return every top-level class and its bases as written, without parsing."""
    found: dict[str, tuple[str, ...]] = {}
    for name, bases in HEADER.findall(f"\n{source}"):
        parts = (part.split("#")[0].split("[")[0].strip() for part in bases.split(","))
        found[name] = tuple(part for part in parts if part and "=" not in part)
    return found


@dataclass(frozen=True, slots=True)
class Needles:
    """What is looked for in a file before anything is parsed.

    ``names`` are literals that make a whole class worth reading: torch's switches, the package's own
    wrappers, functions and classes known to be stopped. They count where they are whole identifiers.
    Without ``operations``, as in files that no target holds, they are all that is looked for.
    """

    names: tuple[str, ...] = GRAD_MODE
    operations: bool = True

    def are_in(self, data: bytes) -> bool:
        """Tell whether a file's bytes hold anything to look into."""
        for name in self.names:
            if name.encode() in data:
                return True
        return (
            self.operations
            and b"torch" in data
            and (
                _TENSOR_OPS_BYTES.search(data) is not None
                or any(literal in data and any(each in data for each in whole) for literal, whole in _BARE_OPS_BYTES)
                or (b"Parameter(" in data and _makes_in_passing(data))
            )
        )

    def with_renames(self, source: str, switches: list[int]) -> Needles:
        """Return the needles of one file: ``from .tower import Tower as T`` adds a name of its own."""
        found = [match.groups("") for match in (RENAMED.match(source, at) for at in switches) if match]
        own = (name for name in self.names if name not in GRAD_MODE and f"{name} as " in source)
        found += [(other, "") for name in own for other in re.findall(rf"\b{re.escape(name)} as (\w+)", source)]
        if not found:
            return self
        applied = [f"{word} {root}" for _, root in found if root for word in ("class", "def")]
        return replace(self, names=(*self.names, *(name for name, _ in found if name), *applied))

    def deep(self, source: str) -> list[int]:
        """Return the offsets of the names, ascending."""
        return sorted(
            at
            for name in self.names
            for at in places(source, name)
            if (name in GRAD_MODE or _stands_alone(source, at, name)) and not _is_remark(source, at)
        )


def parameters_made(source: str) -> list[int]:
    """Return the offsets at which parameters are made, ascending."""
    return list(places(source, "Parameter("))


def buffers_registered(source: str) -> list[int]:
    """Return the offsets at which buffers are registered, ascending."""
    return list(places(source, "register_buffer("))


def calls_of_backward(source: str) -> list[int]:
    """Return the offsets at which a loss goes backward, ascending."""
    return list(places(source, ".backward("))


def made_by_script(source: str, backward: list[int], is_glue: bool) -> list[int]:
    """Return the offsets at which a script that trains makes objects, and goes backward if it puts models together.

    What its loop calls is only told by these; a function that goes backward may use what the script made.
    """
    if not backward:
        return []
    made = [match.start() for match in _MADE_AT_TOP.finditer(source)]
    return sorted([*made, *backward]) if is_glue else made


def tensor_ops(source: str, parameters: list[int]) -> list[int]:
    """Return the offsets of tensor operations that may stop a gradient, ascending."""
    found = [
        match.start()
        for match in TENSOR_OPS.finditer(source)
        if match[0] != ".float()" or _may_compare(source, match.start())
    ]
    for literal, before in BARE_OPS.items():
        for at in places(source, literal):
            end = at + len(literal)
            if source[at - 1 : at] in before and not (literal == "float(" and source.startswith(('"', "'"), end)):
                found.append(end - 1)  # not float("inf")
    found += _made_in_passing(source, parameters)
    return sorted(at for at in found if not _is_remark(source, at))


def kept_parameters(source: str, parameters: list[int]) -> dict[str, list[str]]:
    """Return the names of the parameters that each top-level class keeps, by its name, without parsing."""
    kept: dict[str, list[str]] = {}
    for at in parameters:
        match = _KEEPS.match(source[source.rfind("\n", 0, at) + 1 : at])
        owner = HEADER.match(source, max(source.rfind("\nclass ", 0, at), 0)) if match else None
        if match is not None and owner is not None:
            kept.setdefault(owner[1], []).append(match[1])
    return kept


def _made_in_passing(source: str, parameters: list[int]) -> Iterator[int]:
    """Yield the offsets at which a parameter is made by a method that runs more than once, judged by its name."""
    for at in parameters:
        before = _DEF.match(source, max(source.rfind("def ", 0, at), 0))
        if before is not None and not _MAKES_ONCE.search(before[1]) and not source[at - 1 : at].isalnum():
            yield at


def _makes_in_passing(data: bytes) -> bool:
    source = data.decode("latin-1")  # whatever the encoding: only offsets and ASCII are asked for
    return next(_made_in_passing(source, parameters_made(source)), None) is not None


def _may_compare(source: str, end: int) -> bool:
    """Tell whether the brackets that end at an offset may hold a comparison: ``(score > 0.5).float()``."""
    line = source[source.rfind("\n", 0, end) + 1 : end]
    return _COMPARISON.search(line) is not None or line.count(")") > line.count("(")


def places(source: str, literal: str) -> Iterator[int]:
    """Yield the offsets of a literal."""
    at = source.find(literal)
    while at >= 0:
        yield at
        at = source.find(literal, at + 1)


def _is_remark(source: str, at: int) -> bool:
    """Tell whether an offset lies on a line of a comment or of an example in a docstring."""
    start = source.rfind("\n", 0, at) + 1
    return source[start:at].lstrip().startswith((">>>", "...", "#"))


def _stands_alone(source: str, at: int, name: str) -> bool:
    before, after = source[at - 1 : at], source[at + len(name) : at + len(name) + 1]
    goes_on_before = name[0].isidentifier() and (before.isalnum() or before == "_")
    goes_on_after = name[-1].isidentifier() and (after.isalnum() or after == "_")
    return not (goes_on_before or goes_on_after)


_TENSOR_OPS_BYTES = re.compile(TENSOR_OPS.pattern.encode())
_BARE_OPS_BYTES = [
    (literal.encode(), [f"{first}{literal}".encode() for first in before]) for literal, before in BARE_OPS.items()
]


@dataclass(slots=True)
class Parsed:
    """A syntax tree of what matters in a file, and what was blanked in it; or why there is none."""

    tree: ast.Module | None = None
    skipped: str = ""
    blanked: Blanked = field(default_factory=lambda: Blanked(""))


def parse(source: str, offsets: list[int], deep: list[int], known: Container[str] = ()) -> Parsed:
    """Parse the blocks that hold one of the offsets; of classes without a deep one, the methods that do.

    Of functions whose text is known a stub is parsed.
    """
    deep = [at for at in deep if not _INITIALISER.match(source, at)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the target's strings are not our business
        try:
            blanked = blank(source, offsets, deep, known)
            return Parsed(ast.parse(blanked.source), "", blanked)
        except (SyntaxError, ValueError):
            pass
        except (RecursionError, MemoryError):
            return Parsed(skipped="nested too deeply to be parsed")
        try:
            return Parsed(ast.parse(source))
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None)
            where = f" (line {line})" if line else ""
            return Parsed(skipped=f"is not valid Python here: {getattr(error, 'msg', error)}{where}")
        except (RecursionError, MemoryError):
            return Parsed(skipped="nested too deeply to be parsed")


def parse_function(text: str, line: int) -> ast.FunctionDef | ast.AsyncFunctionDef:
    """Parse a function by itself, which begins on this line of its file; a method's text is indented."""
    is_method = text.startswith(" ")
    above = "\n" * (line - 2) + "class _:\n" if is_method else "\n" * (line - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ast.parse(above + text).body[0]
    return found.body[0] if is_method else found  # type: ignore[attr-defined, return-value]
