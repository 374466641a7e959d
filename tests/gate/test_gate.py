"""What a gate leaves out is not in the session any more, and no report stumbles over where it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradscope.config import Config
from gradscope.findings import Finding, Source
from gradscope.flow import FlowGraph, FlowNode
from gradscope.gate import Gate
from gradscope.report.formats import FORMATS, render
from gradscope.session import Session


@pytest.fixture
def session() -> Session:
    outer = Finding("F1", "GS101", "inference-mode-decorator", "error", "m", "a.py", 1, cuts=("w",), verified=True)
    inner = Finding("F2", "GS104", "no-grad-block", "error", "m", "a.py", 9, cuts=("w",), behind="F1", verified=True)
    graph = FlowGraph([
        FlowNode("n1", "encode", "region", "blocked", finding="F1", path="a.py", line=1),
        FlowNode("n2", "w", "module", "blocked", parent="n1"),
    ])  # fmt: skip
    return Session(
        "trace", "blocked", target={"name": "m", "entry": "f", "inputs": [], "mode": "real", "device": "cpu",
                                    "dtype": "float32"},
        sources={"w": Source("w", "parameter", "blocked", findings=["F1", "F2"])}, findings=[outer, inner],
        fix_set=["F1", "F2"], fix_verified=True, graph=graph, healed=graph,
    )  # fmt: skip


def test_what_is_ignored_leaves_nothing_behind(session: Session) -> None:
    judged = Gate.of(ignore=["GS101"]).judged(session)
    assert [each.id for each in judged.findings] == ["F2"] and judged.findings[0].behind is None
    assert judged.sources["w"].status == "blocked"
    assert (judged.fix_set, judged.fix_verified, judged.verdict) == ([], False, "blocked")
    assert [each.finding for each in (*judged.graph.nodes, *judged.healed.nodes)] == [None] * 4  # type: ignore[union-attr]
    for name, fmt in FORMATS.items():
        if name not in ("svg", "png"):
            assert render(judged, name) or not fmt.needs_graph
    assert [each.finding for each in session.graph.nodes] == ["F1", None]  # the session itself is as it was


def test_a_gate_without_wishes_leaves_all_as_it_was(session: Session) -> None:
    assert Gate().judged(session).to_dict() == session.to_dict()


@pytest.mark.parametrize(("cwd", "path"), [(".", "tests/a.py"), ("tests", "a.py"), ("tests/deep", "../a.py")])
def test_the_patterns_of_a_file_are_relative_to_its_folder(
    cwd: str, path: str, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / cwd)
    gate = Gate.of(per_file=["tests/a.py:GS101"], config=Config(tmp_path / "pyproject.toml"))
    here = Finding("F1", "GS101", "n", "error", "m", path, 1)
    assert gate.lets_through(here)
    assert not gate.lets_through(Finding("F1", "GS101", "n", "error", "m", "b.py", 1))
