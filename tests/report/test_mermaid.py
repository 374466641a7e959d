"""The Mermaid chart: its structure, its limits, and, where mermaid-cli is there, drawn by Mermaid itself."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from real import detected, traced

from gradscope.findings import Finding
from gradscope.flow import FlowEdge, FlowGraph, FlowNode
from gradscope.report import mermaid
from gradscope.session import Session

NASTY = '1. a "b" <i> #35; [x]{y} | end; **b** _u_ `c` %% & - →'


def session(nodes: list[FlowNode], edges: list[FlowEdge] | None = None) -> Session:
    target = {"name": 'm "x": y', "entry": "forward"}
    finding = Finding("F1", "GS201", "detach", "error", "said", "m.py", 3)
    return Session("trace", "blocked", target=target, findings=[finding], graph=FlowGraph(nodes, edges or []))


def crowd(count: int, kind: str = "operation") -> Session:
    """Every node of ``count`` leads to every later one, and none is like another."""
    nodes = [FlowNode(f"o{i}", f"step number {i} with a long name", kind, path="m.py", line=i) for i in range(count)]  # type: ignore[arg-type]
    edges = [FlowEdge(f"o{a}", f"o{b}", "flows") for a in range(count) for b in range(a + 1, count)]
    return session(nodes, edges)


def drawn(text: str, folder: Path) -> list[str]:
    """Return the texts that Mermaid shows; fail where it cannot read the chart."""
    mmdc, chromium = shutil.which("mmdc"), shutil.which("chromium") or shutil.which("google-chrome")
    if mmdc is None or chromium is None:
        pytest.skip("mermaid-cli is not installed (npm install -g @mermaid-js/mermaid-cli)")
    (folder / "p.json").write_text(json.dumps({"executablePath": chromium, "args": ["--no-sandbox"]}))
    (folder / "x.mmd").write_text(text)
    command = [mmdc, "-p", str(folder / "p.json"), "-i", str(folder / "x.mmd"), "-o", str(folder / "x.svg")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (folder / "x.svg").exists(), done.stderr + done.stdout
    svg = (folder / "x.svg").read_text()
    assert "Syntax error" not in svg and "Unsupported markdown" not in svg
    found = re.findall(r"<p(?: [^>]*)?>(.*?)</p>", svg, flags=re.DOTALL)
    return [html.unescape(re.sub(r"<br\s*/?>", "\n", each)) for each in found]


def edge_count(text: str) -> int:
    return len(re.findall(r"^ *n\d+ -\.?-?> n\d+$", text, flags=re.MULTILINE))


def test_a_cut_is_a_frame_and_what_is_lost_is_dashed_and_red() -> None:
    text = mermaid.render(traced())
    for finding in traced().findings[:2]:
        assert re.search(rf'subgraph n\d+\["[^"]*{finding.rule}<br>[^"]*encoder.py:{finding.line}"\]', text)
    arrows = re.findall(r"^ *n\d+ (-\.->|-->) n\d+$", text, flags=re.MULTILINE)
    (red,) = re.findall(r"linkStyle ([\d,]+) stroke:#c62828.*stroke-dasharray", text)
    assert [int(number) for number in red.split(",")] == [i for i, arrow in enumerate(arrows) if arrow == "-.->"]
    assert text.count("subgraph ") == len(re.findall(r"^ *end$", text, flags=re.MULTILINE))


def test_every_edge_leads_to_a_box_that_is_there() -> None:
    for real in (traced(), detected()):
        text = mermaid.render(real)
        boxes = set(re.findall(r"^ *(?:subgraph )?(n\d+)[\[(]", text, flags=re.MULTILINE))
        ends = set(re.findall(r"\b(n\d+) -", text)) | set(re.findall(r"> (n\d+)$", text, flags=re.MULTILINE))
        assert ends <= boxes and ends


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("big", [crowd(400), crowd(400, "region")], ids=["wide", "regions"])
def test_what_mermaid_takes_is_not_exceeded(big: Session, full: bool) -> None:
    text = mermaid.render(big, full=full)
    assert 0 < edge_count(text) <= 500 and len(text) <= 50_000


def test_full_shows_more_where_there_is_room() -> None:
    assert mermaid.render(traced(), full=True).count("[") > mermaid.render(traced()).count("[")


def test_no_label_means_anything_to_mermaid() -> None:
    text = mermaid.render(session([FlowNode("a", NASTY, "operation"), FlowNode("end", "end", "output")]))
    labels = re.findall(r'\["?(.*?)"?\]', text)
    assert labels and not any(re.search(r'["<>\[\]{}|`*_%&]|#(?!\d+;)', each.replace("<br>", "")) for each in labels)


def test_mermaid_draws_real_sessions(tmp_path: Path) -> None:
    shown = drawn(mermaid.render(traced()), tmp_path)
    assert any(each.startswith("✂ encode") and "encoder.py:" in each for each in shown)
    assert any(each.startswith("layers.0-23  x24  CLIPEncoderLayer") for each in shown)


def test_mermaid_shows_labels_as_they_are(tmp_path: Path) -> None:
    region = FlowNode("r", NASTY, "region", finding="F1", path="a_b.py", line=3)
    nodes = [region, FlowNode("o", NASTY, "operation", parent="r"), FlowNode("p", "- [ ] end", "operation", parent="r")]
    shown = drawn(mermaid.render(session(nodes, [FlowEdge("o", "p", "blocked")])), tmp_path)
    assert NASTY in shown and "- [ ] end" in shown


def test_mermaid_takes_the_most_that_is_written(tmp_path: Path) -> None:
    assert len(drawn(mermaid.render(crowd(400), full=True), tmp_path)) > 10
