"""What `gradscope check` hands on: each run, and what counts of the findings, in the formats that a CI reads."""

from __future__ import annotations

import json

from junitparser import JUnitXml

from gradscope.errors import NotAnalysedError
from gradscope.findings import Finding, State
from gradscope.gathering import gathered
from gradscope.merging import Part, merged
from gradscope.report import html, junit, markdown, sarif
from gradscope.report.formats import render
from gradscope.session import Session


def check(state: State = "", *, failing: bool = False) -> Session:
    cut = Finding("F1", "GS104", "no-grad-block", "error", "runs under no_grad", "m.py", 3, state=state)
    parts = [
        Part("scan src", "scan", Session("scan", "blocked", target={"name": "src"}, findings=[cut])),
        Part("trace m:build", "trace", Session("trace", "flows", target={"name": "m:build"})),
    ]
    if failing:
        parts.append(Part("trace n:build", "trace", failure=NotAnalysedError("There is no n.")))
    return merged(parts, "pyproject.toml")


def cases(session: Session) -> dict[str, list[str]]:
    (suite,) = JUnitXml.fromstring(junit.render(session).encode())
    return {case.name: [type(each).__name__ for each in case.result] for case in suite}


def test_each_run_is_a_case_that_fails_by_what_counts() -> None:
    assert cases(check(failing=True)) == {"scan src": ["Failure"], "trace m:build": [], "trace n:build": ["Error"]}
    assert cases(check("unchanged")) == {"scan src": [], "trace m:build": []}


def test_sarif_is_no_success_where_a_run_gave_no_answer() -> None:
    def invocation(session: Session) -> bool:
        found: bool = json.loads(sarif.render(session))["runs"][0]["invocations"][0]["executionSuccessful"]
        return found

    assert invocation(check()) and not invocation(check(failing=True))


def test_markdown_is_alarmed_by_what_counts_only() -> None:
    new, known, failing = (markdown.render(each) for each in (check("new"), check("unchanged"), check(failing=True)))
    assert "❌ **Gradients are stopped" in new and "| `scan src` | blocked | 1 error |" in new
    assert "✅ **Nothing that is not known or expected**" in known and "1 known to the baseline" in known
    assert "| `trace n:build` | not analysed | There is no n. |" in failing


def test_a_page_has_a_row_for_each_run_and_proposes_nothing_of_its_own() -> None:
    failing, known = html.render(check(failing=True)), html.render(check("unchanged"))
    for name in ("scan src", "trace m:build", "trace n:build"):
        assert f"<bdi>{name}</bdi>" in failing
    assert "There is no n." in failing and "runs <b>3</b>" in failing
    for page in (failing, known):
        assert "What to change" not in page and "On the way back" not in page and "pyproject.toml." not in page


def test_one_note_is_one() -> None:
    note = Finding("F1", "GS701", "parameter-not-in-optimizer", "note", "said", "m.py", 3)
    parts = [Part("trace m:build", "trace", Session("trace", "flows", target={"name": "m:build"}, findings=[note]))]
    assert "1 note is not shown" in render(merged(parts, "pyproject.toml"), "text").decode()


def test_the_page_of_many_traces_names_no_call() -> None:
    traces = [(name, Session("trace", "flows", target={"name": "m", "entry": "forward"})) for name in ("a", "b")]
    page = html.render(gathered(traces))
    assert "<bdi>2 traces</bdi>" in page and "traces." not in page
