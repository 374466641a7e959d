"""``gradscope check`` on the sample: one report, one exit code, and nobody's trouble is another's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradscope.errors import ExitCode, NotAnalysedError, UsageError
from gradscope.findings import Finding
from gradscope.gate import Gate
from gradscope.merging import Part, merged
from gradscope.report.headline import headline
from gradscope.session import Session

Run = Callable[..., tuple[int, str, str]]
BROKEN = '\n[[tool.gradscope.trace]]\ntarget = "distill.broken:build"\n'


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def checked(run: Run, *options: str) -> tuple[int, dict[str, Any]]:
    code, out, _ = run("check", "--format", "json", *options)
    return code, json.loads(out)


def test_the_sample_passes_and_says_why(sample: Path, gradscope: Run) -> None:
    code, out, err = gradscope("check")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "✓ 0 errors, 0 warnings, 0 notes"  # as in the table below: of those that count
    assert "1 finding is expected and does not count" in out
    assert "0 new, 1 unchanged, 0 fixed; nothing new, so the gate passes" in out
    assert "Declared in pyproject.toml:13: the teacher is not trained." in out
    rows = [line.split() for line in out.splitlines()[-3:]]
    assert [row[:-1] for row in rows] == [
        ["✓", "scan", "distill", "pixelcodec", "blocked", "0", "0", "1", "1"],
        ["✓", "trace", "distill.caption:build", "blocked", "0", "0", "0", "1"],
        ["✓", "trace", "distill.model:build", "blocked", "0", "0", "1", "0"],
    ]


def test_the_session_is_one_that_is_saved_and_read_back(sample: Path, gradscope: Run) -> None:
    assert gradscope("check", "-o", "s.json")[0] == 0
    session = Session.load("s.json")
    data = json.loads(Path("s.json").read_text())
    assert session.to_dict() == data
    assert (data["kind"], data["verdict"]) == ("check", "blocked")
    assert [(each["rule"], each["state"]) for each in data["findings"]] == [
        ("GS101", "unchanged"), ("GS201", "expected"),
    ]  # fmt: skip
    assert data["baseline"] == {"path": "gradscope-baseline.json", "new": 0, "unchanged": 1, "fixed": 0}
    assert [(each["name"], each["findings"]) for each in data["runs"]] == [
        ("scan distill pixelcodec", ["F1", "F2"]), ("trace distill.caption:build", ["F1"]),
        ("trace distill.model:build", ["F2"]),
    ]  # fmt: skip
    assert data["runs"][2]["sources"] == {"flows": 6, "blocked": 10, "partial": 1}


def test_a_teacher_that_is_no_longer_cut_off_fails(sample: Path, gradscope: Run) -> None:
    edit(sample / "distill" / "model.py", ".detach()", "")
    code, session = checked(gradscope)
    assert code == 1
    (finding,) = [each for each in session["findings"] if each["state"] == "new"]
    assert (finding["rule"], finding["path"], finding["line"]) == ("GS801", "pyproject.toml", 16)
    assert finding["source"] == 'blocked = ["teacher"]' and "the gradient flows" in finding["message"]
    assert session["baseline"]["fixed"] == 1


def test_a_new_cut_of_the_student_fails_by_both_ways_of_looking(sample: Path, gradscope: Run) -> None:
    edit(sample / "distill" / "model.py", "self.student(images)", "self.student(images).data")
    code, session = checked(gradscope)
    assert code == 1
    new = {each["rule"]: each for each in session["findings"] if each["state"] == "new"}
    assert set(new) == {"GS202", "GS801"} and new["GS202"]["severity"] == "error"
    assert [each["name"] for each in session["runs"] if new["GS202"]["id"] in each["findings"]] == [
        "scan distill pixelcodec", "trace distill.model:build",
    ]  # fmt: skip


def test_a_target_that_cannot_be_analysed_stops_no_other_and_writes_no_baseline(sample: Path, gradscope: Run) -> None:
    (sample / "distill" / "broken.py").write_text("import nothing_of_this_name\n")
    (sample / "pyproject.toml").write_text(
        (sample / "pyproject.toml").read_text().replace("[project]", BROKEN[1:] + "\n[project]")
    )
    kept = (sample / "gradscope-baseline.json").read_bytes()
    code, out, err = gradscope("check", "--update-baseline")
    assert code == 3
    assert err == "gradscope-baseline.json was not written: trace distill.broken:build could not be analysed.\n"
    assert (sample / "gradscope-baseline.json").read_bytes() == kept
    assert "; 1 of 4 targets could not be analysed" in out.splitlines()[0]
    assert "What could not be analysed" in out and "nothing_of_this_name" in out
    assert out.count("trace distill.caption:build") == 1 and "not analysed" in out
    # A finding is a finding, however little was seen.
    assert gradscope("check", "--no-config", "--config", "pyproject.toml")[0] == 2
    edit(sample / "pyproject.toml", "gradscope-baseline.json", "empty.json")
    (sample / "empty.json").write_text('{"schema": "gradscope.baseline/1", "findings": []}')
    assert gradscope("check")[0] == 1
    # And what is not there at all is a mistake in the configuration.
    edit(sample / "pyproject.toml", "distill.broken", "distill.missing")
    assert gradscope("check")[0] == 2


def test_the_baseline_of_a_check_is_that_of_the_project(sample: Path, gradscope: Run) -> None:
    known = json.loads((sample / "gradscope-baseline.json").read_text())
    stale = {**known["findings"][0], "target": "scan elsewhere"}
    known["findings"].append(stale)
    (sample / "gradscope-baseline.json").write_text(json.dumps(known))
    (sample / "distill" / "caption.py").rename(sample / "distill" / "captions.py")
    edit(sample / "pyproject.toml", "distill.caption:", "distill.captions:")
    assert gradscope("check", "--update-baseline")[0] == 0
    again = json.loads((sample / "gradscope-baseline.json").read_text())["findings"]
    assert [(each["target"], each["rule"]) for each in again] == [
        ("scan distill pixelcodec", "GS201"), ("scan distill pixelcodec", "GS101"),
        ("trace distill.captions:build forward", "GS101"),
    ]  # fmt: skip
    assert gradscope("scan")[0] == 0
    assert gradscope("trace", "distill.captions:build")[0] == 0


def test_what_options_leave_out_is_neither_fixed_nor_forgotten(sample: Path, gradscope: Run) -> None:
    before = (sample / "gradscope-baseline.json").read_text()
    assert "0 new, 0 unchanged, 0 fixed" in gradscope("check", "--ignore", "GS101")[1]
    assert gradscope("check", "--ignore", "GS101", "--update-baseline")[0] == 0
    assert (sample / "gradscope-baseline.json").read_text() == before


def test_it_works_from_the_folder_of_the_configuration(
    sample: Path, gradscope: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(sample / "distill" / "model.py", ".detach()", "")
    monkeypatch.chdir(sample / "distill")
    code, session = checked(gradscope, "-o", "here.json")
    assert code == 1 and (sample / "distill" / "here.json").exists()
    assert {each["path"] for each in session["findings"]} == {"pixelcodec/encoder.py", "pyproject.toml"}
    assert Path.cwd() == sample / "distill"


def test_nothing_to_check_is_one_sentence(tmp_path: Path, gradscope: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = gradscope("check", "--no-config")
    assert (code, out) == (2, "") and err.startswith("There is nothing to check") and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("parts", "tone", "said"),
    [
        ([("scan", None)], "good", "nothing new"),
        ([("scan", None), ("trace", NotAnalysedError("no"))], "warn", "1 of 2 targets could not be analysed"),
        ([("scan", "error")], "bad", "1 error"),
        ([("scan", "warning")], "warn", "1 warning"),
    ],
)
def test_a_page_never_calls_clean_what_was_not_analysed(parts: list[tuple[str, Any]], tone: str, said: str) -> None:
    made = [
        part(kind, failure=what) if isinstance(what, Exception) else part(kind, *([found(what)] if what else []))
        for kind, what in parts
    ]
    head = headline(merged(made, "pyproject.toml"))
    assert head.tone == tone and said in f"{head.said} {head.sentence}"


# --- merging -----------------------------------------------------------------------------------------


def part(kind: str, *findings: Finding, failure: Any = None) -> Part:
    session = None if failure else Session(kind, "blocked", target={"name": "t"}, findings=list(findings))
    return Part(f"{kind} t", kind, session, failure)


def found(severity: str = "error", **fields: Any) -> Finding:
    known = {"id": "F1", "rule": "GS201", "name": "detach", "message": "m", "path": "a.py", "line": 3}
    return Finding(**{**known, "severity": severity, **fields})


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([part("scan", found("note")), part("trace", found("error", cuts=("w",)))], [("error", "", ("w",))]),
        ([part("scan", found("error")), part("trace", found("warning", cuts=("w",)))], [("error", "", ())]),
        ([part("scan", found("error")), part("trace", found("error", cuts=("w",)))], [("error", "", ("w",))]),
        ([part("scan", found("error")), part("trace", found(state="expected"))], [("error", "expected", ())]),
        (
            [part("trace", found(state="expected")), part("trace", found("warning", cuts=("w",)))],
            [("warning", "", ("w",))],
        ),
        ([part("scan", found("note")), part("scan", found("error", line=4))], [("error", "", ()), ("note", "", ())]),
    ],
)
def test_a_place_is_one_finding(parts: list[Part], expected: list[tuple[str, str, tuple[str, ...]]]) -> None:
    session = merged(parts, "pyproject.toml")
    assert [(each.severity, each.state, each.cuts) for each in session.findings] == expected
    assert [each.id for each in session.findings] == [f"F{n + 1}" for n in range(len(expected))]


def test_what_lies_behind_is_named_anew() -> None:
    outer, inner = found("note"), found(id="F2", line=9, behind="F1")
    session = merged([part("scan", found(line=7)), part("trace", outer, inner)], "p")
    assert [(each.id, each.line, each.behind) for each in session.findings] == [
        ("F1", 7, None), ("F2", 9, "F3"), ("F3", 3, None),
    ]  # fmt: skip


USAGE, UNREADABLE = UsageError("no"), NotAnalysedError("no")


@pytest.mark.parametrize(
    ("parts", "fail_on", "code"),
    [
        ([part("scan")], "error", ExitCode.CLEAN),
        ([part("scan"), part("trace", failure=UNREADABLE)], "error", ExitCode.NOT_ANALYSED),
        ([part("scan", found()), part("trace", failure=UNREADABLE)], "error", ExitCode.FINDINGS),
        ([part("scan", found()), part("trace", failure=UNREADABLE)], "never", ExitCode.NOT_ANALYSED),
        ([part("scan", found()), part("trace", failure=USAGE)], "error", ExitCode.USAGE),
        ([part("trace", failure=UNREADABLE), part("trace", failure=USAGE)], "error", ExitCode.USAGE),
        ([part("scan", found())], "never", ExitCode.CLEAN),
    ],
)
def test_the_gravest_code_counts(parts: list[Part], fail_on: str, code: ExitCode) -> None:
    assert Gate(fail_on=fail_on).exit_code(merged(parts, "p")) == code
