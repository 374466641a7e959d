"""How a session stands beside its baseline and its configuration, and what is left to do: the same in every report."""

from __future__ import annotations

from collections import Counter
from typing import Any

from gradscope.findings import Finding
from gradscope.session import Session


def standing(session: Session) -> list[str]:
    """Return how the findings stand beside the baseline and the configuration; nothing where there is neither."""
    expected = session.count_state("expected")
    said = []
    if expected:
        words = "1 finding is expected and does" if expected == 1 else f"{expected} findings are expected and do"
        said.append(f"{words} not count")
    if session.baseline is None:
        return said
    new, unchanged = session.count_state("new"), session.count_state("unchanged")
    failed = session.in_doubt or any(run["failure"] for run in session.runs)
    passes = "" if new or failed else "; nothing new, so the gate passes"
    counts = f"{new} new, {unchanged} unchanged, {session.baseline.fixed} fixed"
    return [*said, f"beside {session.baseline.path}: {counts}{passes}"]


def is_meant(session: Session) -> bool:
    """Tell whether all that stops a gradient is declared: nobody wants a way out of what is meant to be so."""
    cuts = _cuts(session)
    return bool(cuts) and all(finding.state == "expected" for finding in cuts)


def to_mend(session: Session) -> list[Finding]:
    """Return the cuts that nobody declared, which a fix is wanted for."""
    return [finding for finding in _cuts(session) if finding.state != "expected"]


def counts_of(session: Session, run: dict[str, Any]) -> Counter[str]:
    """Return of one run of a check how many findings count, by severity, and how many have which state."""
    found = [finding for finding in session.findings if finding.id in run["findings"]]
    counting = Counter[str](finding.severity for finding in found if finding.counts)
    return counting + Counter[str](finding.state for finding in found)


def _cuts(session: Session) -> list[Finding]:
    return [each for each in session.findings if each.severity == "error" and each.how != "expectation"]
