"""Expectations: an intended cut is expected and said to be; what is not so any more is a finding."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradscope.config import load_config
from gradscope.errors import ExitCode
from gradscope.findings import Finding, Source
from gradscope.gate import Gate
from gradscope.session import Session

STATUSES = {
    "student.w": "flows",
    "teacher.w": "blocked",
    "teacher.b": "blocked",
    "stem.w": "partial",
    "old.w": "unused",
}


def session(cuts: dict[str, tuple[str, ...]], verdict: str = "blocked", **target: object) -> Session:
    sources = {name: Source(name, "parameter", status) for name, status in STATUSES.items()}
    sources["input.0"] = Source("input.0", "input", "partial")
    findings = [Finding(number, "GS201", "detach", "error", "m", "a.py", 3, cuts=names, fix="Leave it out.")
                for number, names in cuts.items()]  # fmt: skip
    about = {"name": "m:build", "entry": "forward", **target}
    return Session("trace", verdict, target=about, sources=sources, findings=findings)


def judged(said: str, trace: Session, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.chdir(folder)
    text = f'[tool.gradscope]\n\n# a comment\n[[tool.gradscope.expect]]\ntarget = "m:build"\n{said}\n'
    (folder / "pyproject.toml").write_text(text)
    return Gate.of(config=load_config()).judged(trace)


TEACHER = ("teacher.w", "teacher.b")


@pytest.mark.parametrize(
    ("said", "cuts", "state"),
    [
        ('blocked = ["teacher.*"]', TEACHER, "expected"),
        ('blocked = ["teacher"]', TEACHER, "expected"),
        ('blocked = ["teacher.*"]', (*TEACHER, "input.0"), "expected"),  # the input that feeds the teacher
        ('blocked = ["teacher.*"]\npartial = ["stem"]', (*TEACHER, "stem.w"), "expected"),
        ('unused = ["old"]\nblocked = ["teacher"]', (*TEACHER, "old.w"), "expected"),
        ('flows = ["*"]\nblocked = ["teacher"]\npartial = ["stem", "input.0"]\nunused = ["old"]', TEACHER, "expected"),
        ('blocked = ["teacher.w"]', TEACHER, ""),
        ('blocked = ["teacher.*"]', (*TEACHER, "stem.w"), ""),  # a stem that both share loses half of its gradient
        ('blocked = ["teacher.*"]', ("input.0",), ""),
        ('blocked = ["teacher.*"]', (), ""),
        ('flows = ["student.*"]', TEACHER, ""),
    ],
)
def test_a_cut_is_expected_where_all_that_it_stops_is_declared(
    said: str, cuts: tuple[str, ...], state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = judged(f'{said}\nreason = "not trained"', session({"F1": cuts}), tmp_path, monkeypatch)
    assert [(each.id, each.state) for each in result.findings] == [("F1", state)]
    assert result.findings[0].fix == ("Declared in pyproject.toml:4: not trained." if state else "Leave it out.")
    assert Gate().exit_code(result) == (ExitCode.CLEAN if state else ExitCode.FINDINGS)
    assert result.verdict == "blocked"


@pytest.mark.parametrize(
    ("said", "line", "message"),
    [
        ('flows = ["teacher.w"]', 6, "teacher.w is declared as flows ('teacher.w') and found blocked."),
        ('flows = ["student", "stem"]', 6, "stem.w is declared as flows ('stem') and found partial."),
        ('blocked = ["student"]', 6, "student.w is declared as blocked ('student') and the gradient flows."),
        ('blocked = ["old"]', 6, "old.w is declared as blocked ('old') and found unused."),
        ('entry = "forward"\nblocked = [\n  "teacher",\n  "stem",\n]', 7, "stem.w is declared as blocked"),
        ('flows = ["*"]', 6, "teacher.w, teacher.b, stem.w and 2 more are declared as flows ('*') and found 2 blocked, "
                             "2 partial, 1 unused."),
        ('flows = ["*"]\nblocked = ["teacher"]\nunused = ["old", "input.0"]', 8, "input.0 is declared as unused"),
        ('blocked = ["techer.*"]', 6, "'techer.*' matches no source."),
    ],
)  # fmt: skip
def test_what_does_not_hold_is_a_finding_at_its_line(
    said: str, line: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = judged(said, session({}), tmp_path, monkeypatch)
    finding = next(each for each in result.findings if each.message.startswith(message))
    assert (finding.rule, finding.severity, finding.path, finding.line) == ("GS801", "error", "pyproject.toml", line)
    assert finding.source == Path("pyproject.toml").read_text().splitlines()[line - 1]
    assert Gate().exit_code(result) == ExitCode.FINDINGS


def test_an_expectation_is_about_its_own_target_and_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = 'entry = "forward"\nblocked = ["nothing"]'
    assert len(judged(said, session({}), tmp_path, monkeypatch).findings) == 1
    assert judged(said, session({}, entry="encode"), tmp_path, monkeypatch).findings == []
    assert judged(said, session({}, name="other:build"), tmp_path, monkeypatch).findings == []


def test_a_narrower_question_is_not_held_against_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = session({}, wrt=["student"])
    assert judged('blocked = ["elsewhere"]', narrow, tmp_path, monkeypatch).findings == []
    own = 'wrt = ["student"]\nblocked = ["elsewhere"]'
    assert len(judged(own, narrow, tmp_path, monkeypatch).findings) == 1


def test_a_crash_is_never_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashed = session({"F1": TEACHER}, verdict="crashes")
    assert judged('blocked = ["teacher"]', crashed, tmp_path, monkeypatch).findings[0].state == ""


def test_judging_again_says_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = judged('blocked = ["student"]', session({"F1": TEACHER}), tmp_path, monkeypatch)
    twice = judged('blocked = ["student"]', once, tmp_path, monkeypatch)
    assert twice.to_dict() == once.to_dict()
    assert len({finding.id for finding in once.findings}) == 2
