"""Sessions for the tests of the page: made by hand, large, and as bad as strings can be."""

from __future__ import annotations

from gradscope.findings import Excerpt, Finding, Gradient, Source
from gradscope.flow import FlowEdge, FlowGraph, FlowNode
from gradscope.session import Remedy, Session

STAGES, BLOCKS, STEPS = 10, 9, 10
TARGET = {"name": "m", "entry": "forward", "inputs": ["1x3"], "mode": "real", "device": "cpu", "dtype": "float32"}


def thousand(sources: int = 5000) -> Session:
    """Return a session of 1,001 nodes: stages of blocks of steps, each block with a residual, one cut in one block."""
    nodes, edges = [FlowNode("x", "input.0", "input", "flows")], []
    before = "x"
    for stage in range(STAGES):
        top = f"s{stage}"
        nodes.append(FlowNode(top, f"stage{stage}", "module", "flows", module=f"stage{stage}", type="Stage"))
        edges.append(FlowEdge(before, top, "flows"))
        before = top
        for block in range(BLOCKS):
            name = f"{top}.b{block}"
            nodes.append(
                FlowNode(name, f"blocks.{block}", "module", "flows", top, f"stage{stage}.blocks.{block}", "Block")
            )
            if block:
                edges.append(FlowEdge(f"{top}.b{block - 1}", name, "flows"))
            for step in range(STEPS):
                cut = (stage, block, step) == (7, 4, 5)
                node = FlowNode(f"{name}.o{step}", f"step {step}", "operation", "flows", name, detail="1x8", line=step)
                if cut:
                    node.label, node.status, node.finding = "x.detach()", "blocked", "F1"
                nodes.append(node)
                if step:
                    beside = cut or nodes[-2].status == "blocked"
                    edges.append(FlowEdge(nodes[-2].id, node.id, "blocked" if beside else "flows"))
            edges.append(FlowEdge(f"{name}.o0", f"{name}.o{STEPS - 1}", "flows"))
    known = {f"stage{i % STAGES}.w{i}": Source(f"stage{i % STAGES}.w{i}", "parameter", "flows", i % 3 == 0)
             for i in range(sources)}  # fmt: skip
    for number, source in enumerate(known.values()):
        source.gradient = Gradient(float((number * 7919) % 1000))
        if number % 10 == 7:
            source.status, source.findings = "blocked", ["F1"]
    finding = Finding(
        "F1", "GS201", "detach", "error", "A detach.", "m.py", 105, source="x.detach()", cuts=("stage7.w7",)
    )
    return Session("trace", "partial", target=TARGET, sources=known, findings=[finding], graph=FlowGraph(nodes, edges))


def lattice() -> Session:
    """Return a session whose boxes stand side by side, high ones among them, with lines that run past several rows."""
    names = ("x", "a", "b", "c", "d", "e", "f", "y")
    nodes = [FlowNode(name, name * 3, "module", "flows", module=name) for name in names]
    for name, inside in (("b", 5), ("d", 3)):
        nodes += [FlowNode(f"{name}{i}", f"part {i}", "operation", "flows", name) for i in range(inside)]
    joined = (
        "xa xb xc xd xy ad bd cd ae be ce de df ef ay by cy ey fy b0b1 b1b2 b2b3 b3b4 b0b4 d0d1 d1d2 d0d2"
    ).split()
    edges = [FlowEdge(pair[: len(pair) // 2], pair[len(pair) // 2 :], "flows") for pair in joined]
    return Session("trace", "flows", target=TARGET, graph=FlowGraph(nodes, edges))


HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "\"'><svg/onload=window.hacked=1>",
    "<!--<script>",
    "${window.hacked=1}{{ 7*7 }}{% raw %}",
    "javascript:window.hacked=1",
    "\u202e\u2066evil\u2069 \u200b\u2028 \x00\x07\x1b[31m",
    "ÄÖ 漢字 עברית 🙂",
)


def hostile() -> Session:
    """Return a session in which every string that a traced program can choose is one that breaks pages."""
    bad = " ".join(HOSTILE)
    path = f"{bad}/\udcff.py"  # how Python reads the name of a file that is no UTF-8
    finding = Finding("F1", "GS201", "detach", "error", bad, path, 3, function=bad, module=bad, fix=bad, source=bad,
                      cuts=(bad, "b", "c", "d.e"), chain=(bad, bad), excerpt=Excerpt(1, ("'''", bad, bad)))  # fmt: skip
    node = FlowNode("n", bad, "module", "blocked", module=bad, type=bad, detail=bad, path=path, line=3, finding="F1")
    inner = [FlowNode(f"i{i}", bad, "operation", "blocked", "n", path=bad, line=3) for i in range(3)]
    return Session(
        "trace", "crashes", tool={"name": bad, "version": bad}, environment={bad: bad},
        target={name: [bad] if name == "inputs" else bad for name in TARGET},
        sources={bad: Source(bad, "parameter", "blocked", True, ["F1"], Gradient(float("nan"), 3))},
        findings=[finding], fix_set=["F1"], graph=FlowGraph([node, *inner], [FlowEdge("i0", "i1", "blocked")]),
        healed=FlowGraph([node, *inner], []), crash={"exception": bad, "message": bad, "path": bad, "line": 1},
        remedy=Remedy(bad, bad, bad), remarks=[bad], unseen=[bad], stats={"runs": 1, "seconds": 0.1},
        entries=[{"module": bad, "class": bad, "function": bad, "status": "blocked", "findings": ["F1"], "clean": [bad],
                  "chain": [{"function": bad, "path": bad, "line": 1, "sites": [{"mechanism": bad, "line": 2}]}]}],
    )  # fmt: skip
