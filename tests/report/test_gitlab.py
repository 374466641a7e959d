"""GitLab Code Quality: the fields that its documentation asks for, and fingerprints that tell findings apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from real import REAL, scanned, traced

from gradscope.cli.output import SCAN_FORMATS, parse_output
from gradscope.findings import Finding
from gradscope.report import gitlab
from gradscope.session import Session

# https://docs.gitlab.com/ci/testing/code_quality/#code-quality-report-format, as read in 2026-11; GitLab
# publishes no schema.
DOCUMENTED: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["description", "check_name", "fingerprint", "location", "severity"],
        "properties": {
            "description": {"type": "string", "minLength": 1},
            "check_name": {"type": "string", "minLength": 1},
            "fingerprint": {"type": "string", "minLength": 1},
            "severity": {"enum": ["info", "minor", "major", "critical", "blocker"]},
            "location": {
                "type": "object",
                "required": ["path", "lines"],
                "properties": {
                    "path": {"type": "string", "pattern": "^(?![./\\\\])"},  # relative, and no ./ before it
                    "lines": {"type": "object", "required": ["begin"],
                              "properties": {"begin": {"type": "integer", "minimum": 1}}},
                },
            },
        },
    },
}  # fmt: skip


def issues(*sessions: Session) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gitlab.render_several(sessions))
    Draft202012Validator(DOCUMENTED).validate(found)
    assert len({each["fingerprint"] for each in found}) == len(found)
    return found


@pytest.mark.parametrize("name", REAL)
def test_real_sessions_have_what_gitlab_asks_for(name: str) -> None:
    real = REAL[name]()
    assert sorted((each["location"]["path"], each["location"]["lines"]["begin"]) for each in issues(real)) == sorted(
        (each.path, each.line) for each in real.findings
    )


def test_the_same_place_in_two_sessions_is_told_twice() -> None:
    assert len(issues(scanned(), traced())) == len(scanned().findings) + len(traced().findings)


def test_like_findings_are_told_apart_and_expected_ones_left_out() -> None:
    like = [Finding(f"F{n}", "GS201", "detach", "error", "said", "./m.py", n, source="x.detach()") for n in (3, 5)]
    expected = Finding("F9", "GS201", "detach", "error", "said", "m.py", 9, state="expected")
    found = issues(Session("scan", "blocked", findings=[*like, expected]))
    assert [each["location"] for each in found] == [{"path": "m.py", "lines": {"begin": n}} for n in (3, 5)]
    # Stable from run to run: GitLab compares the fingerprints of two branches.
    moved = [Finding("F1", "GS201", "detach", "error", "said", "./m.py", 8, source="x.detach()")]
    assert issues(Session("scan", "blocked", findings=moved))[0]["fingerprint"] == found[0]["fingerprint"]


def test_the_file_that_gitlab_names_is_written_by_saying_the_format() -> None:
    name = "gl-code-quality-report.json"
    assert parse_output(f"gitlab={name}", SCAN_FORMATS) == ("gitlab", Path(name))
    assert parse_output("x.gitlab.json", SCAN_FORMATS)[0] == "gitlab"
