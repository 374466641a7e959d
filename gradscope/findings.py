"""What gradscope says about one place in the source: the finding, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Severity: TypeAlias = Literal["error", "warning", "note"]
Confidence: TypeAlias = Literal["certain", "likely", "possible"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    """One place that stops, bends or endangers a gradient.

    ``line`` is the line of the cause (the decorator, the ``with``, the call), ``module`` the
    ``named_modules`` path within the model, ``cuts`` the names of the sources that lose their
    gradient here, ``behind`` the id of the finding that hides this one, and ``verified`` whether
    a further run with this place neutralised showed that it belongs to the fix.
    ``chain`` holds the callers from the entry to the place, outermost first.
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
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Finding:
        """Read a finding back from :meth:`to_dict`."""
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        known["cuts"] = tuple(known.get("cuts", ()))
        known["chain"] = tuple(known.get("chain", ()))
        return cls(**known)


@dataclass(slots=True)
class Source:
    """A tensor that a gradient is wanted for, and what became of that gradient.

    ``status`` is one of ``flows``, ``partial``, ``blocked``, ``nondifferentiable``, ``zero``,
    ``wrong`` and ``unused``; ``frozen`` is an attribute and never a break.
    """

    name: str
    kind: Literal["input", "parameter"]
    status: str
    frozen: bool = False
    findings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the source as in ``gradscope.session/1``."""
        return {
            "name": self.name,
            "kind": self.kind,
            "frozen": self.frozen,
            "status": self.status,
            "findings": list(self.findings),
        }
