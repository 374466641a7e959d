"""Which format a file is written in, and reports that carry no source text."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradscope.cli.output import SCAN_FORMATS, TRACE_FORMATS, check_outputs, parse_output
from gradscope.errors import UsageError
from gradscope.findings import Excerpt, Finding, Source
from gradscope.flow import FlowGraph, FlowNode
from gradscope.gate import Gate
from gradscope.report.formats import FORMATS, render
from gradscope.session import Session


def test_the_suffix_picks_the_format_and_a_name_overrules_it() -> None:
    assert parse_output("a/graph.SVG", TRACE_FORMATS) == ("svg", Path("a/graph.SVG"))
    assert parse_output("report.htm", SCAN_FORMATS) == ("html", Path("report.htm"))
    assert parse_output("text=report.json", TRACE_FORMATS) == ("text", Path("report.json"))
    assert parse_output("run=3.json", TRACE_FORMATS) == ("json", Path("run=3.json"))


@pytest.mark.parametrize(("text", "known"), [("x.bmp", TRACE_FORMATS), ("x.svg", SCAN_FORMATS), ("x", TRACE_FORMATS)])
def test_a_file_of_no_known_format_is_refused(text: str, known: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names no format"):
        check_outputs([str(tmp_path / text)], known, force=False)


def finding(**fields: object) -> Finding:
    return Finding("F1", "GS201", "detach", "error", "said", "m.py", 12, function="f", **fields)  # type: ignore[arg-type]


def test_a_fingerprint_outlives_moves_of_the_line_and_the_file() -> None:
    first = Finding("F1", "GS201", "detach", "error", "said", "m.py", 12, function="M.f", source="y = x.detach()")
    moved = Finding(
        "F7", "GS201", "detach", "error", "other words", "n.py", 90, function="M.f", source="y  = x.detach()"
    )
    other = Finding("F1", "GS201", "detach", "error", "said", "m.py", 12, function="M.g", source="y = x.detach()")
    assert first.fingerprint == moved.fingerprint != other.fingerprint


def test_an_excerpt_ends_where_the_file_does() -> None:
    lines = [f"line {number}" for number in range(1, 6)]
    assert Excerpt.around(lines, 2) == Excerpt(1, tuple(lines))
    assert Excerpt.around(lines, 5) == Excerpt(2, tuple(lines[1:]))
    assert Excerpt.around(lines, 6) is None


def test_no_format_carries_source_text_where_it_is_not_wanted() -> None:
    secret = "proprietary_name"
    node = FlowNode("n1", secret, "operation", path="m.py", line=12)
    what = finding(source=secret, excerpt=Excerpt(12, (secret,)), cuts=("w",))
    session = Session("trace", "blocked", target={"name": "m", "entry": "forward", "inputs": [], "mode": "real",
                      "device": "cpu", "dtype": "float32"}, findings=[what], graph=FlowGraph([node]),
                      healed=FlowGraph([node]), stats={"seconds": 1, "runs": 1})  # fmt: skip
    shown = [name for name in FORMATS if secret.encode() in render(session, name)]
    assert {"json", "text", "dot", "svg"} <= set(shown)
    bare = session.without_source()
    assert bare.findings[0].fingerprint == what.fingerprint
    for name in FORMATS:
        assert secret.encode() not in render(bare, name), name


def test_a_session_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    session = Session("trace", "blocked", findings=[finding(source="x", excerpt=Excerpt(3, ("a", "b")))],
                      healed=FlowGraph([FlowNode("n1", "n", "input")]))  # fmt: skip
    session.save(tmp_path / "s.json")
    assert Session.load(tmp_path / "s.json").to_dict() == session.to_dict()


def test_an_answer_that_hangs_on_what_could_not_be_seen_is_no_clean_one() -> None:
    unused, flows = Source("a", "parameter", "unused"), Source("b", "parameter", "flows")
    doubts = ["The result uses a tensor of no known origin."]
    for sources, unseen, code in (([unused], doubts, 3), ([unused], [], 0), ([unused, flows], doubts, 0)):
        session = Session("trace", "flows", sources={each.name: each for each in sources}, unseen=unseen)
        assert Gate().exit_code(session) == code
