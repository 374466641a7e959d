"""Findings as a GitLab Code Quality report, for the widget of a merge request and the marks in its diff.

Format: https://docs.gitlab.com/ci/testing/code_quality/#code-quality-report-format
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from gradscope.report.places import gravest_first, numbered_fingerprints, place_of
from gradscope.session import Session

# GitLab knows info, minor, major, critical and blocker.
SEVERITIES = {"error": "critical", "warning": "minor", "note": "info"}


def render(session: Session, *, full: bool = False) -> str:
    """Return the findings as one JSON list."""
    return render_several([session], full=full)


def render_several(sessions: Sequence[Session], *, full: bool = False) -> str:
    """Return the findings of all sessions as one JSON list; what a configuration expects is left out.

    GitLab compares the reports of two branches by fingerprint, so that no two findings may share one.
    """
    issues = []
    for session in sessions:
        target = "/".join(str(session.target.get(key, "")) for key in ("name", "entry"))
        findings = [each for each in gravest_first(session.findings) if each.state != "expected"]
        for finding, fingerprint in zip(findings, numbered_fingerprints(findings), strict=True):
            path, line = place_of(session, finding)
            name = f"{session.kind}/{target}/{fingerprint}" if len(sessions) > 1 else fingerprint
            issue: dict[str, Any] = {
                "description": f"{finding.message} {finding.fix}".strip(),
                "check_name": f"{finding.rule} {finding.name}",
                "fingerprint": hashlib.sha256(name.encode()).hexdigest(),
                "severity": SEVERITIES[finding.severity],
                "location": {"path": path.replace("\\", "/").removeprefix("./"), "lines": {"begin": line}},
            }
            issues.append(issue)
    return json.dumps(issues, indent=1) + "\n"
