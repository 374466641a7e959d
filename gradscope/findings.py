"""What gradscope says about one place in the source: the finding, as plain data."""

from __future__ import annotations

import fnmatch
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Severity: TypeAlias = Literal["error", "warning", "note"]
Confidence: TypeAlias = Literal["certain", "likely", "possible"]
# Beside a baseline a finding is new or unchanged; a configuration may declare that it is expected.
State: TypeAlias = Literal["", "new", "unchanged", "expected"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
# Lines of source shown before and after the line of a finding.
AROUND = 3
# What is told apart in a line of source: a string, which stays as it is, and comments and blanks, which mean nothing.
LEXEME = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|#.*|\s+""")
IDLE_BLANK = re.compile(r" (?!\w)|(?<!\w) ")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a source is named by one of the patterns, itself or with what it is part of."""
    return any(fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for pattern in patterns)


def bare(line: str) -> str:
    """Return a line of source without its comment, and with one blank for several."""
    return LEXEME.sub(lambda found: found[1] or " ", line).strip()


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first names and how many there are beside them: ``a, b, c and 4 more``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The lines of source around a finding; ``first`` is the number of the first one, counted from 1."""

    first: int
    lines: tuple[str, ...]

    @classmethod
    def around(cls, lines: Sequence[str], line: int, end_line: int = 0) -> Excerpt | None:
        """Return what lies around a line of a file; None where the file has no such line."""
        if not 0 < line <= len(lines):
            return None
        first, last = max(1, line - AROUND), max(line, min(end_line, line + AROUND)) + AROUND
        return cls(first, tuple(each.rstrip() for each in lines[first - 1 : last]))

    def to_dict(self) -> dict[str, Any]:
        """Return the excerpt as in ``gradscope.session/1``."""
        return {"first": self.first, "lines": list(self.lines)}


@dataclass(frozen=True, slots=True)
class Finding:
    """One place that stops, bends or endangers a gradient.

    ``line`` is the line of the cause (the decorator, the ``with``, the call), ``module`` the
    ``named_modules`` path within the model, ``cuts`` the names of the sources that lose their
    gradient here, ``behind`` the id of the finding that hides this one, and ``verified`` whether
    a further run with this place neutralised showed that it belongs to the fix.
    ``chain`` holds the callers from the entry to the place, outermost first. ``fingerprint`` names
    the finding in a baseline: it stays the same when lines move and files are renamed, and when a
    line gets a comment or other blanks.
    """

    id: str
    rule: str
    name: str
    severity: Severity
    message: str
    path: str
    line: int
    confidence: Confidence = "certain"
    column: int = 1
    end_line: int = 0
    function: str = ""
    module: str = ""
    mechanism: str = ""
    how: str = ""
    cuts: tuple[str, ...] = ()
    behind: str | None = None
    verified: bool = False
    fix: str = ""
    chain: tuple[str, ...] = ()
    source: str = ""
    excerpt: Excerpt | None = None
    fingerprint: str = ""
    state: State = ""

    def __post_init__(self) -> None:
        """Take the fingerprint of the rule, the qualified name and the line of source, blanks and comment aside."""
        if not self.fingerprint:
            code = IDLE_BLANK.sub("", bare(self.source))
            what = "\0".join((self.rule, self.function, code or self.mechanism))
            object.__setattr__(self, "fingerprint", hashlib.sha256(what.encode()).hexdigest()[:16])

    @property
    def counts(self) -> bool:
        """Tell whether the gate looks at it: not where a baseline knows it or a configuration expects it."""
        return self.state in ("", "new")

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as in ``gradscope.session/1``."""
        return {
            "id": self.id,
            "rule": self.rule,
            "name": self.name,
            "severity": self.severity,
            "confidence": self.confidence,
            "message": self.message,
            "path": self.path,
            "line": self.line,
            "column": self.column,
            "end_line": self.end_line or self.line,
            "function": self.function,
            "module": self.module,
            "mechanism": self.mechanism,
            "how": self.how,
            "cuts": list(self.cuts),
            "behind": self.behind,
            "verified": self.verified,
            "fix": self.fix,
            "chain": list(self.chain),
            "source": self.source,
            "excerpt": self.excerpt.to_dict() if self.excerpt else None,
            "fingerprint": self.fingerprint,
            "state": self.state,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Finding:
        """Read a finding back from :meth:`to_dict`."""
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        known["cuts"] = tuple(known.get("cuts", ()))
        known["chain"] = tuple(known.get("chain", ()))
        excerpt = known.get("excerpt")
        known["excerpt"] = Excerpt(excerpt["first"], tuple(excerpt["lines"])) if excerpt else None
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Gradient:
    """What one true backward pass gave a source: its L2 norm, and how many entries are NaN or inf.

    The outputs had random gradients of unit variance, or the loss the gradient 1.
    """

    norm_l2: float
    nonfinite: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the gradient as in ``gradscope.session/1``; a norm that is not finite is None in JSON."""
        return {"norm_l2": self.norm_l2 if math.isfinite(self.norm_l2) else None, "nonfinite": self.nonfinite}


@dataclass(slots=True)
class Source:
    """A tensor that a gradient is wanted for, and what became of that gradient.

    ``status`` is one of ``flows``, ``partial``, ``blocked``, ``nondifferentiable``, ``zero``,
    ``wrong`` and ``unused``; ``frozen`` is an attribute and never a break. ``gradient`` is there where
    it was computed (real mode, sources asked about).
    """

    name: str
    kind: Literal["input", "parameter"]
    status: str
    frozen: bool = False
    findings: list[str] = field(default_factory=list)
    gradient: Gradient | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the source as in ``gradscope.session/1``; what was not computed is left out."""
        data: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "frozen": self.frozen,
            "status": self.status,
            "findings": list(self.findings),
        }
        if self.gradient is not None:
            data["gradient"] = self.gradient.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Source:
        """Read a source back from :meth:`to_dict`."""
        known = dict(data)
        gradient = known.pop("gradient", None)
        if gradient is not None:
            norm = gradient["norm_l2"]
            known["gradient"] = Gradient(math.nan if norm is None else norm, gradient["nonfinite"])
        return cls(**known)
