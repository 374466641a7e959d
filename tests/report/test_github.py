"""Annotations as GitHub takes them, ten of a kind, and the rest in the summary of the job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gradscope.cli import output
from gradscope.cli.output import Reporting
from gradscope.findings import Finding
from gradscope.report import github
from gradscope.session import Session


def finding(number: int = 1, severity: str = "error", **fields: Any) -> Finding:
    given = {"message": "said", "path": "m.py", "line": number} | fields
    return Finding(f"F{number}", "GS201", "detach", severity, **given)  # type: ignore[arg-type]


def session(*findings: Finding) -> Session:
    return Session("scan", "blocked", findings=list(findings), target={"name": "m"})


def kinds(text: str) -> list[str]:
    return [line.split(" ")[0].strip(":") for line in text.splitlines()]


def test_ten_of_a_kind_are_shown_and_the_others_counted() -> None:
    many = [finding(n, severity) for severity in ("note", "warning", "error") for n in range(1, 13)]
    shown = kinds(github.render(session(*many)))
    assert shown == ["error"] * 10 + ["warning"] * 10 + ["notice"] * 10
    last = github.render(session(*many)).splitlines()[-1]
    assert last == "::notice title=gradscope::7 more findings are in the summary of the job."
    assert len(kinds(github.render(session(*many), full=True))) == 36


def test_ten_are_ten() -> None:
    assert kinds(github.render(session(*(finding(n) for n in range(10))))) == ["error"] * 10
    assert kinds(github.render(session(*(finding(n) for n in range(11))))) == ["error"] * 10 + ["notice"]


def test_what_is_known_or_expected_is_not_marked_again() -> None:
    given = session(finding(1, state="unchanged"), finding(2, state="expected"), finding(3, state="new"))
    assert "line=3" in github.render(given) and len(kinds(github.render(given))) == 1


def test_signs_that_mean_something_are_escaped_and_a_missing_file_is_left_out() -> None:
    text = github.render(session(finding(1, path="a,b:c.py", message="50 %\nof it")))
    assert text == "::error file=a%2Cb%3Ac.py,line=1,endLine=1,title=GS201 detach::50 %25%0Aof it\n"
    assert github.render(session(finding(1, path=""))) == "::error title=GS201 detach::said\n"


def test_the_summary_of_the_job_gets_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    Reporting("github").write(session(finding()))
    text = summary.read_text()
    assert text.startswith("before\n### gradscope: `m`") and "| GS201 detach |" in text
    Reporting("json").write(session(finding()))
    assert summary.read_text() == text


def test_the_summary_is_never_longer_than_github_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setattr(output, "MOST_SUMMARY", 600)
    for _ in range(5):
        Reporting("github").write(session(finding()))
    assert 0 < summary.stat().st_size <= 600
    assert "too long for this summary" in summary.read_text()


def test_a_summary_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    Reporting("github").write(session(finding()))
    assert "cannot write the summary" in capfd.readouterr().err
