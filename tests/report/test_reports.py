"""The reports over a hand-made session: folding, length, plain terminals, pictures."""

from __future__ import annotations

import io
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import ImageFont
from rich.console import Console

from gradscope.errors import UsageError
from gradscope.findings import Finding, Gradient, Source
from gradscope.flow import FlowEdge, FlowGraph, FlowNode
from gradscope.report import dot, scan_terminal, terminal
from gradscope.report.formats import show
from gradscope.report.showing import as_html
from gradscope.report.views import fold
from gradscope.session import Remedy, Session


def node(name: str, kind: str, parent: str | None = None, **fields: object) -> FlowNode:
    return FlowNode(name, str(fields.pop("label", name)), kind, "blocked", parent, **fields)  # type: ignore[arg-type]


@pytest.fixture
def session() -> Session:
    blocks = [node(f"b{i}", "module", "sam", label=f"blocks.{i}", type="Block") for i in range(12)]
    nodes = [
        node("input.0", "input"),
        node("r", "region", label="encode  @inference_mode", finding="F1", path="pkg/encoder.py", line=12),
        node("sam", "module", "r", module="sam", type="Sam", frozen=True),
        *blocks,
        node("o", "operation", "r", label="tokens + x_tok", detail="1x256x1024 bfloat16"),
    ]
    edges = [FlowEdge("sam", "o", "blocked"), FlowEdge("b0", "b1", "blocked")]
    finding = Finding("F1", "GS101", "inference-mode-decorator", "error", "encode runs under inference_mode.",
                      "pkg/encoder.py", 12, cuts=("sam.w",), source="@torch.inference_mode()")  # fmt: skip
    return Session(
        kind="trace", verdict="blocked", target={"name": "m", "entry": "encode", "mode": "structural",
        "device": "cuda", "dtype": "bfloat16", "inputs": ["image 8x8"]},
        sources={"sam.w": Source("sam.w", "parameter", "blocked", True, ["F1"])}, findings=[finding],
        fix_set=["F1"], fix_verified=True, graph=FlowGraph(nodes, edges),
        remedy=Remedy("was", "is", "x = fix(x)"), remarks=["The weights are random."],
    )  # fmt: skip


EXPECTED = """\
✗ blocked  the gradient does not arrive
  m.encode(image 8x8)   structural on cuda, bfloat16, 1 run in 0 s
  1 parameter: 1 blocked (1 frozen, which blocks nothing)

F1 error GS101 inference-mode-decorator
   pkg/encoder.py:12
   > @torch.inference_mode()
   encode runs under inference_mode.
   cuts off sam.w

Forward pass
├── ✗ input.0
└── ✂ encode  @inference_mode  GS101  pkg/encoder.py:12
    ├── ✗ sam  Sam  ❄ frozen
    │   └── ✗ blocks.0-11  x12  Block
    └── ✗ tokens + x_tok  1x256x1024 bfloat16

Smallest fix: F1, verified by running it ✓
  before  was
  after   is

  x = fix(x)

What was assumed
  - The weights are random.
"""


def shown(session: Session, encoding: str = "utf-8", width: int = 80) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    terminal.render(session, Console(file=stream, width=width, no_color=True))
    stream.flush()
    return raw.getvalue().decode(encoding)


def test_the_terminal_report_reads_as_designed(session: Session) -> None:
    assert shown(session) == EXPECTED


def test_an_ascii_terminal_gets_ascii(session: Session) -> None:
    text = shown(session, "ascii")
    assert "pkg/encoder.py:12" in text
    assert text.isascii()


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_file_and_line_stay_one_word(session: Session, width: int) -> None:
    assert shown(session, width=width).count("pkg/encoder.py:12") == 2  # the finding and the tree


def test_a_thousand_nodes_fit_the_screen() -> None:
    nodes = [node(f"n{i}", "module", f"n{i // 3}" if i else None, type=f"T{i}") for i in range(1000)]
    views = fold(FlowGraph(nodes, []))
    assert sum(1 for top in views for _ in top.walk()) <= 60


def test_a_very_deep_graph_is_shown_and_drawn(session: Session) -> None:
    nodes = [node(f"n{i}", "region", f"n{i - 1}" if i else None, finding="F1") for i in range(1500)]
    session.graph = FlowGraph([*nodes, node("last", "operation", "n1499")], [])
    for most in (None, 40):
        views = fold(session.graph, most)
        assert sum(1 for top in views for _ in top.walk()) == (most or 1501)
    assert "last" in dot.build(session, full=True).source
    assert "n40" in shown(session)


def test_the_picture_clusters_regions(session: Session) -> None:
    source = dot.build(session).source
    assert "cluster_r" in source
    assert "blocks.0-11  x12" in source
    assert dot.draw(source, "png").startswith(b"\x89PNG")
    assert b"tokens + x_tok" in dot.draw(source, "svg")


def test_a_long_heading_fits_its_cluster(session: Session) -> None:
    name = "CLIPSegForImageSegmentation.get_conditional_embeddings"
    session.graph.nodes[1].label = name
    picture = dot.draw(dot.build(session).source, "svg").decode()
    outline = re.search(r"<title>cluster_r</title>\s*<path [^>]*d=\"([^\"]+)\"", picture)
    assert outline is not None
    across = [float(x) for x in re.findall(r"(-?[\d.]+),", outline[1])]
    heading = f"CUT  {name}  GS101"
    assert max(across) - min(across) > ImageFont.load_default(13).getlength(heading)


def test_a_renderer_that_fails_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scripts = {"slow": "sleep 30", "broken": "echo no such font >&2; exit 1"}
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "unrunnable").write_bytes(b"\x00\x01")
    (tmp_path / "unrunnable").chmod(0o755)
    monkeypatch.setattr(dot, "SECONDS_TO_RENDER", 0.2)
    for name, words in (("slow", "within 0.2 seconds"), ("broken", "no such font"), ("unrunnable", "cannot be run")):
        monkeypatch.setattr(dot.shutil, "which", lambda program, path=str(tmp_path / name): path)
        with pytest.raises(UsageError, match=words):
            dot.draw("digraph {}", "svg")


def test_a_pygraphviz_that_fails_leaves_it_to_the_next_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    class AGraph:
        def __init__(self, string: str) -> None: ...

        def draw(self, **options: object) -> bytes:
            raise ValueError("Program dot not found in path.")

    monkeypatch.setitem(sys.modules, "pygraphviz", SimpleNamespace(AGraph=AGraph))
    monkeypatch.setattr(dot.shutil, "which", lambda program: None)
    assert dot.draw("digraph { a }", "svg").lstrip().startswith(b"<")
    monkeypatch.setattr(dot, "_pure_executable", lambda: None)
    with pytest.raises(UsageError, match="No Graphviz renderer"):
        dot.draw("digraph { a }", "svg")


def test_a_break_inside_one_of_many_blocks_is_not_folded_away() -> None:
    nodes = [node(f"b{i}", "module", label=f"blocks.{i}", type="Block") for i in range(6)]
    nodes.append(node("r", "region", "b3", label="attend", finding="F1", path="a.py", line=3))
    nodes += [node(f"o{i}", "operation", f"b{i}") for i in range(6) if i != 3]
    nodes.append(node("o3", "operation", "r"))
    views = fold(FlowGraph(nodes, []))
    assert [view.label for view in views] == ["blocks.0-2  x3", "blocks.3", "blocks.4-5  x2"]
    assert [child.node.kind for child in views[1].children] == ["region"]


def test_many_regions_stay_within_the_limit_and_say_what_is_left_out() -> None:
    nodes = []
    for region in range(10):
        nodes.append(node(f"r{region}", "region", finding="F1"))
        nodes += [node(f"o{region}.{i}", "operation", f"r{region}") for i in range(100)]
    views = fold(FlowGraph(nodes, []), 40)
    assert sum(1 for top in views for _ in top.walk()) == 40
    assert views[-1].label.startswith("... 971 more")


def test_foreign_letters_do_not_break_an_ascii_terminal(session: Session) -> None:
    session.remarks.append("naïve ≤ 3, view · permute")
    text = shown(session, "ascii")
    assert text.isascii() and "na?ve <= 3, view . permute" in text


def test_the_norms_of_gradients_are_shown_where_they_were_computed() -> None:
    session = Session("trace", "flows", target={"name": "m", "entry": "forward", "inputs": [], "mode": "real",
                      "device": "cpu", "dtype": "float32"})  # fmt: skip
    for name, norm in (("a", 0.5), ("b", 20.0), ("c", math.nan)):
        session.sources[name] = Source(name, "parameter", "flows", gradient=Gradient(norm))
    console = Console(file=io.StringIO(), width=100, no_color=True)
    terminal.render(session, console)
    assert "3 parameters: 3 flows; gradient norms 0.5 to 20" in console.file.getvalue()


def test_nothing_arrives_where_nothing_asked_about_is_used(session: Session) -> None:
    session.verdict, session.findings, session.fix_set = "flows", [], []
    session.graph = FlowGraph([node("input.0", "input")], [])
    session.sources = {"sam.w": Source("sam.w", "parameter", "unused")}
    text = shown(session, width=200)
    assert "nothing asked about is used for the result" in text
    assert "the gradient arrives" not in text


def test_inherited_methods_are_shown_with_the_class_that_inherits_them() -> None:
    def entry(function: str, module: str, owner: str, clean: tuple[str, ...] = ()) -> dict[str, object]:
        return {"function": function, "module": module, "class": owner, "clean": list(clean), "chain": [],
                "status": "blocked", "findings": [], "alternatives": []}  # fmt: skip

    entries = [
        entry("Base.forward", "pack.base", "Child"), entry("Child.encode", "pack.child", "Child"),
        entry("Net.forward", "pack.one", "Net"), entry("Net.forward", "pack.two", "Net"),
    ]  # fmt: skip
    session = Session(kind="scan", verdict="blocked", entries=entries, target={"entry": "all"})
    stream = io.StringIO()
    scan_terminal.render(session, Console(file=stream, width=80))
    heads = [line for line in stream.getvalue().split("\n") if re.match(r"\w+ pack\.", line)]
    assert heads == ["Child pack.child", "Net pack.one", "Net pack.two"]


@pytest.mark.parametrize("paper", [255, 17])
def test_a_notebook_can_be_read_whether_it_is_light_or_dark(session: Session, paper: int) -> None:
    def light(*rgb: int) -> float:
        linear = [c / 255 / 12.92 if c < 11 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    session.remedy = Remedy("a", "b", "from x import y\nf(1, 'text')  # why")
    page = as_html(session)
    assert "background" not in page
    found = {tuple(bytes.fromhex(each)) for each in re.findall(r"color: #([0-9a-f]{6})", page)}
    assert len(found) > 4
    for colour in found:
        assert max(light(*colour), light(paper, paper, paper)) / min(light(*colour), light(paper, paper, paper)) > 3.9


def test_a_terminal_chooses_the_colours_of_code_itself(session: Session) -> None:
    session.remedy = Remedy("a", "b", "from x import y\nf(1, 'text')  # why")
    out = io.StringIO()
    show(session, Console(file=out, force_terminal=True, color_system="truecolor", no_color=False, width=80))
    assert "import" in out.getvalue() and not re.search(r"\x1b\[[34]8;", out.getvalue())
