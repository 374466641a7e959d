"""Findings as GitHub annotations: the workflow commands that mark lines in a pull request.

Format: https://docs.github.com/en/actions/reference/workflow-commands-for-github-actions
"""

from __future__ import annotations

from gradscope.session import Session

LEVELS = {"error": "error", "warning": "warning", "note": "notice"}


def render(session: Session, *, full: bool = False) -> str:
    """Return one workflow command per finding, gravest first (GitHub shows ten of a kind per step)."""
    lines = []
    for finding in sorted(session.findings, key=lambda each: tuple(LEVELS).index(each.severity)):
        title = f"{finding.rule} {finding.name}"
        place = f"file={_property(finding.path)},line={finding.line},endLine={finding.end_line or finding.line}"
        message = f"{finding.message} {finding.fix}".strip()
        lines.append(f"::{LEVELS[finding.severity]} {place},title={_property(title)}::{_data(message)}\n")
    return "".join(lines)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
