"""JUnit XML, read back by junitparser: what fails is what the gate would stop at."""

from __future__ import annotations

from typing import Any

import pytest
from junitparser import Error, Failure, JUnitXml, Skipped, TestCase
from real import REAL, detected, scanned, traced

from gradscope.errors import ExitCode
from gradscope.findings import Excerpt, Finding, Source
from gradscope.gate import Gate
from gradscope.report import junit
from gradscope.session import Session


def read(session: Session, **options: bool) -> dict[str, TestCase]:
    """Write a session, read it with junitparser, and return its cases by name."""
    (suite,) = JUnitXml.fromstring(junit.render(session, **options).encode())
    cases = list(suite)
    assert suite.tests == len(cases) > 0
    assert suite.failures == sum(isinstance(each, Failure) for case in cases for each in case.result)
    return {str(case.name): case for case in cases}


def failed(cases: dict[str, TestCase]) -> set[str]:
    return {name for name, case in cases.items() if any(isinstance(each, (Failure, Error)) for each in case.result)}


def finding(number: int = 1, severity: str = "error", **fields: Any) -> Finding:
    given = {"message": "said", "path": "m.py", "line": 12} | fields
    return Finding(f"F{number}", "GS201", "detach", severity, **given)  # type: ignore[arg-type]


def trace(*sources: Source, findings: tuple[Finding, ...] = (), **fields: Any) -> Session:
    named = {source.name: source for source in sources}
    target = {"name": "m", "entry": "forward"}
    return Session("trace", "blocked", target=target, sources=named, findings=list(findings), **fields)


@pytest.mark.parametrize("name", REAL)
def test_a_case_fails_where_the_gate_does_and_tells_each_error(name: str) -> None:
    real = REAL[name]()
    cases = read(real)
    assert bool(failed(cases)) == (Gate().exit_code(real) == ExitCode.FINDINGS)
    told = "".join(result.text for case in cases.values() for result in case.result)
    for error in (each for each in real.findings if each.severity == "error"):
        assert f"{error.path}:{error.line}" in told and error.message in told and error.fix in told


def test_each_source_of_a_small_model_is_a_case() -> None:
    cases = read(detected())
    assert set(detected().sources) < set(cases) and len(cases) == len(detected().sources) + 1
    # Cut on purpose, on one of two paths: a warning, which is told and fails nothing.
    assert "RegionProposalNetwork.forward" in cases["rpn.head.bbox_pred.weight"].system_out
    assert not failed(cases)


def test_a_large_model_is_told_by_module_under_names_that_stay() -> None:
    real = traced()
    cases = read(real)
    groups = [name for name in cases if name.endswith(".*")]
    assert len(real.sources) > 500 and len(cases) <= 201 and "sam.blocks.0.*" in groups
    for name in set(cases) - {"autograd accepts the run"}:
        inside = [
            each for each in real.sources.values() if f"{each.name}.".startswith(name.rstrip("*").rstrip(".") + ".")
        ]
        lost = any(each.status == "blocked" for each in inside)
        assert inside and lost == (name in failed(cases))
    healthy = trace(*(Source(each.name, each.kind, "flows") for each in real.sources.values()))
    assert set(read(healthy)) == set(cases) and not failed(read(healthy))
    assert len(read(real, full=True)) == len(real.sources) + 1


def test_each_entry_of_a_scan_is_a_case() -> None:
    real = scanned()
    cases = read(real)
    blocked = {each["function"].partition(".")[2] for each in real.entries if each["status"] == "blocked"}
    assert blocked <= failed(cases)
    (suite,) = JUnitXml.fromstring(junit.render(real).encode())
    assert "deepseek_ocr_encoder.encoder.DeepSeekOCREncoder" in {case.classname for case in suite}


def test_unused_is_skipped_and_the_rest_passes() -> None:
    cases = read(trace(Source("a", "parameter", "unused"), Source("b", "parameter", "flows"),
                       Source("c", "parameter", "zero"), Source("d", "parameter", "blocked", findings=["F1"]),
                       findings=(finding(),)))  # fmt: skip
    assert [type(each) for each in cases["a"].result] == [Skipped]
    assert failed(cases) == {"d"} and not cases["b"].result
    assert cases["c"].system_out == "zero"


@pytest.mark.parametrize(
    ("fields", "fails"),
    [({}, True), ({"state": "new"}, True), ({"state": "unchanged"}, False), ({"state": "expected"}, False),
     ({"severity": "warning"}, False)],
)  # fmt: skip
def test_what_does_not_count_fails_nothing_and_is_told(fields: dict[str, str], fails: bool) -> None:
    cases = read(trace(Source("a", "parameter", "blocked", findings=["F1"]), findings=(finding(**fields),)))
    assert failed(cases) == ({"a"} if fails else set())
    assert "said" in (cases["a"].result[0].text if fails else cases["a"].system_out)


def test_an_ignored_finding_fails_nothing() -> None:
    session = trace(Source("a", "parameter", "blocked", findings=["F1"]), findings=(finding(),))
    assert failed(read(Gate.of(ignore=["GS201"]).filtered(session))) == set()


def test_an_error_of_no_source_is_a_case_of_its_own() -> None:
    assert failed(read(trace(Source("a", "parameter", "flows"), findings=(finding(),)))) == {"GS201 detach m.py:12"}


def test_a_warning_that_no_entry_reaches_is_told_and_fails_nothing() -> None:
    cases = read(Session("scan", "partial", target={"name": "m"}, findings=[finding(severity="warning")]))
    assert not failed(cases) and "said" in cases["warnings"].system_out


def test_a_file_that_could_not_be_read_is_an_error() -> None:
    cases = read(Session("scan", "flows", target={"name": "m"}, unseen=["broken.py: no Python"]))
    assert failed(cases) == {"every file is read"}
    assert cases["every file is read"].result[0].text == "broken.py: no Python"


def test_what_xml_cannot_hold_is_replaced() -> None:
    odd = finding(excerpt=Excerpt(12, ("\x0cdef f():  # \x1b[0m <&>\ud800",)))
    text = read(trace(Source("a", "parameter", "blocked", findings=["F1"]), findings=(odd,)))["a"].result[0].text
    assert "?def f():  # ?[0m <&>?" in text


def test_several_sessions_are_several_suites() -> None:
    xml = JUnitXml.fromstring(junit.render_several([trace(), trace(), scanned()]).encode())
    assert [suite.name for suite in xml] == [
        "gradscope trace m.forward", "gradscope trace m.forward (2)", "gradscope scan deepseek_ocr_encoder",
    ]  # fmt: skip
    assert xml.tests == sum(suite.tests for suite in xml)
