"""Findings as GitHub annotations: the workflow commands that mark lines in a pull request.

Format: https://docs.github.com/en/actions/reference/workflow-commands-for-github-actions
"""

from __future__ import annotations

from collections.abc import Sequence

from gradscope.findings import Finding
from gradscope.report.places import gravest_first
from gradscope.session import Session

LEVELS = {"error": "error", "warning": "warning", "note": "notice"}


# GitHub shows that many of a kind for a step, and says nothing of the others.
MOST_OF_A_KIND = 10


def render(session: Session, *, full: bool = False) -> str:
    """Return one workflow command per finding, gravest first, as many as GitHub shows; all of them if ``full``."""
    return render_several([session], full=full)


def render_several(sessions: Sequence[Session], *, full: bool = False) -> str:
    """Return the commands for the findings of all sessions; what is known or expected is not marked again."""
    findings = gravest_first([
        finding for session in sessions for finding in session.findings if finding.state in ("", "new")
    ])  # fmt: skip
    shown: list[Finding] = []
    for severity in LEVELS:
        shown += [each for each in findings if each.severity == severity][: None if full else MOST_OF_A_KIND]
    left = len(findings) - len(shown)
    if left and sum(each.severity == "note" for each in shown) == MOST_OF_A_KIND:
        shown, left = shown[:-1], left + 1  # the last notice tells of what is left out
    lines = [_command(finding) for finding in shown]
    if left:
        lines.append(f"::notice title=gradscope::{left} more findings are in the summary of the job.\n")
    return "".join(lines)


def _command(finding: Finding) -> str:
    place = ""
    if finding.path and not finding.path.startswith("<"):
        place = f"file={_property(finding.path)},line={finding.line},endLine={finding.end_line or finding.line},"
    title = _property(f"{finding.rule} {finding.name}")
    message = f"{finding.message} {finding.fix}".strip()
    return f"::{LEVELS[finding.severity]} {place}title={title}::{_data(message)}\n"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
