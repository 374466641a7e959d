"""Several sessions as one: what `gradscope check` found on all that a project configures."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gradscope._version import __version__
from gradscope.baseline import label_of
from gradscope.errors import ExitCode, GradscopeError
from gradscope.findings import SEVERITIES, Finding
from gradscope.session import VERDICTS, Comparison, Session

Place = tuple[str, str, int, str]


@dataclass(frozen=True, slots=True)
class Part:
    """One run of a check: the session it gave, or why it gave none."""

    name: str
    kind: str
    session: Session | None = None
    failure: GradscopeError | None = None
    seconds: float = 0.0


def merged(parts: Sequence[Part], name: str, baseline: Comparison | None = None) -> Session:
    """Return one session of kind ``check``: every finding once, and for each run what became of it.

    The same place found by a scan and by traces is one finding, the gravest of them; it is expected where all traces
    that meet it expect it: the scan alone cannot know. Sources and graphs stay with the traces.
    """
    sessions = [part.session for part in parts if part.session is not None]
    chosen = _once(sessions)
    numbers = {place: f"F{number}" for number, place in enumerate(chosen, start=1)}
    runs = [_run(part, numbers) for part in parts]
    failed = [f"{part.name}: {part.failure.message}" for part in parts if part.failure is not None]
    return Session(
        kind="check",
        verdict=next((each for each in VERDICTS if any(one.verdict == each for one in sessions)), "flows"),
        tool={"name": "gradscope", "version": __version__},
        environment=_environment(sessions),
        target={"name": name, "entry": ""},
        findings=[_renumbered(finding, numbers, sessions) for finding in chosen.values()],
        remarks=list(dict.fromkeys(f"{label_of(each)}: {remark}" for each in sessions for remark in each.remarks)),
        unseen=[*failed, *(f"{label_of(each)}: {unseen}" for each in sessions for unseen in each.unseen)],
        stats={"seconds": round(sum(part.seconds for part in parts), 3)},
        baseline=baseline,
        runs=runs,
    )


def _once(sessions: Iterable[Session]) -> dict[Place, Finding]:
    """Return each finding once, by its place, the gravest first."""
    found: dict[Place, list[tuple[Session, Finding]]] = {}
    for session in sessions:
        for finding in session.findings:
            found.setdefault(_place(finding), []).append((session, finding))
    chosen = {place: _choose(seen) for place, seen in found.items()}
    return dict(sorted(chosen.items(), key=lambda item: SEVERITIES.index(item[1].severity)))


def _choose(seen: Sequence[tuple[Session, Finding]]) -> Finding:
    traced = [finding for session, finding in seen if session.kind == "trace"]
    if traced and all(finding.state == "expected" for finding in traced):
        return traced[0]
    # At a tie the trace: it knows what is cut off, and has tried the fix.
    counting = [finding for finding in traced if finding.state != "expected"]
    counting += [finding for session, finding in seen if session.kind != "trace"]
    return min(counting, key=lambda finding: SEVERITIES.index(finding.severity))


def _place(finding: Finding) -> Place:
    # Several expectations may be written in one line.
    said = finding.message if finding.how == "expectation" else ""
    return finding.rule, finding.path.replace("\\", "/"), finding.line, said


def _renumbered(finding: Finding, numbers: dict[Place, str], sessions: Iterable[Session]) -> Finding:
    behind = None
    for session in sessions:
        if finding.behind and finding in session.findings:
            behind = numbers[_place(session.finding(finding.behind))]
    return dataclasses.replace(finding, id=numbers[_place(finding)], behind=behind)


def _run(part: Part, numbers: dict[Place, str]) -> dict[str, Any]:
    session, failure = part.session, part.failure
    statuses = [source.status for source in session.sources.values()] if session is not None else []
    return {
        "name": part.name,
        "kind": part.kind,
        "verdict": session.verdict if session is not None else None,
        "findings": list(dict.fromkeys(numbers[_place(each)] for each in session.findings)) if session else [],
        "sources": {status: statuses.count(status) for status in dict.fromkeys(statuses)},
        "failure": str(failure) if failure is not None else "",
        "in_doubt": session is not None and session.in_doubt,
        "failure_code": int(failure.exit_code) if failure is not None else int(ExitCode.CLEAN),
        "seconds": round(part.seconds, 3),
    }


def _environment(sessions: Sequence[Session]) -> dict[str, str]:
    known = {"python": platform.python_version(), "platform": platform.system().lower()}
    for session in sessions:
        known.update(session.environment)
    return known
