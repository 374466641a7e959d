"""The flow graph as a picture: DOT clustered by region and module, folded, and rendered."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import graphviz

from gradscope.errors import UsageError
from gradscope.findings import Finding
from gradscope.report.views import ViewNode, edges_between, fold
from gradscope.session import Session

MOST_BOXES = 40
FILL = {"flows": "#e3f4e6", "blocked": "#fde7e4", "none": "#f2f2f2"}
# A cut by the severity of its finding.
CUT = {"error": "#c62828", "warning": "#9a6700", "note": "#57606a"}
LINE = {"flows": "#1a7f37", "blocked": "#c62828", "none": "#8c8c8c"}
FONT = "Helvetica,Arial,sans-serif"
SECONDS_TO_RENDER = 120


def build(session: Session, *, full: bool = False) -> graphviz.Digraph:
    """Return the folded graph of a session as DOT, one cluster for each open region and module."""
    dot = graphviz.Digraph("gradscope")
    # Spaces around every label: renderers measure the letters of a font that they do not draw with.
    title = f"    {session.target.get('name', '')}.{session.target.get('entry', '')}: {session.verdict}    "
    dot.attr(rankdir="TB", fontname=FONT, label=title, labelloc="t", fontsize="18", nodesep="0.25",
             ranksep="0.32", compound="true", bgcolor="white")  # fmt: skip
    dot.attr("node", fontname=FONT, fontsize="11", shape="box", style="rounded,filled", margin="0.28,0.08")
    dot.attr("edge", fontname=FONT, arrowsize="0.7")
    views = fold(session.graph, None if full else MOST_BOXES)
    for view in views:
        _place(dot, view, session)
    _connect(dot, views, session)
    return dot


def render(session: Session, *, full: bool = False) -> str:
    """Return the DOT source of the folded graph."""
    source: str = build(session, full=full).source
    return source


def draw(source: str, fmt: str) -> bytes:
    """Return the picture (``svg`` or ``png``) of a DOT source.

    Tries the system's ``dot``, then pygraphviz, then the graphviz-pure executable, which lies in the
    environment's scripts folder and so is not always on PATH.

    Raises:
        UsageError: none of the three is there, or the renderer failed.
    """
    executable = shutil.which("dot")
    if executable is None:
        drawn = _by_pygraphviz(source, fmt)
        if drawn is not None:
            return drawn
        executable = _pure_executable()
    if executable is None:
        raise UsageError(
            "No Graphviz renderer is installed.",
            hint="pip install 'torch-gradscope[render]', or ask for --format dot.",
        )
    try:
        done = subprocess.run(
            [executable, f"-T{fmt}"],
            input=source.encode(),
            capture_output=True,
            check=False,
            timeout=SECONDS_TO_RENDER,
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"{executable} did not draw the graph within {SECONDS_TO_RENDER} seconds.",
            hint="Ask for the source instead (-o graph.dot), or leave out --full.",
        ) from None
    except OSError as error:
        raise UsageError(f"{executable} cannot be run: {error.strerror or error}.") from error
    if done.returncode or not done.stdout:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or ["no output"]
        raise UsageError(f"{executable} could not draw the graph: {reason[0]}")
    return done.stdout


# --- the parts -------------------------------------------------------------------------------------


def _by_pygraphviz(source: str, fmt: str) -> bytes | None:
    """Return the picture, or None where pygraphviz is not there or cannot do it (some versions call ``dot``)."""
    try:
        import pygraphviz

        drawn: bytes = pygraphviz.AGraph(string=source).draw(format=fmt, prog="dot")
    except Exception:  # a C library behind it: what it raises differs from version to version
        return None
    return drawn or None


def _pure_executable() -> str | None:
    scripts = Path(sysconfig.get_path("scripts"))
    for name in ("graphviz-pure", "graphviz-pure.exe"):
        if (scripts / name).is_file():
            return str(scripts / name)
    return shutil.which("graphviz-pure")


def _place(dot: graphviz.Digraph, view: ViewNode, session: Session) -> None:
    node = view.node
    finding = session.finding(node.finding) if node.finding else None
    lines = _cut_lines(view, finding) if finding else _text(view).split("\n")
    colour = CUT[finding.severity] if finding else LINE[node.status]
    marked = {"fontcolor": colour, "penwidth": "2.5"} if finding else {}
    if not view.children:
        style = "rounded,filled,dashed" if node.frozen else "rounded,filled"
        dot.node(view.ids[0], "\n".join(lines), fillcolor=FILL[node.status], color=colour, style=style, **marked)
        return
    with dot.subgraph(name=f"cluster_{node.id}") as cluster:
        size = {"fontsize": "13", "margin": "16"} if finding else {"fontsize": "11", "margin": "14", "penwidth": "1"}
        cluster.attr(label=_heading(lines), color=colour, style="rounded", labeljust="l", **size, **marked)
        for child in view.children:
            _place(cluster, child, session)


def _cut_lines(view: ViewNode, finding: Finding) -> list[str]:
    """Return what a place that stops the gradient is labelled with; a note stops none that was asked for."""
    word = "" if finding.severity == "note" else "CUT  "
    return [
        f"{word}{graphviz.escape(view.label)}  {finding.rule}",
        f"{graphviz.escape(view.node.path)}:{view.node.line}",
    ]


def _heading(lines: list[str]) -> str:
    """Return a cluster's label; renderers take a long one for up to a tenth narrower than browsers draw it."""
    return "".join(f"  {line}{' ' * (len(line) // 5)}  \\l" for line in lines)


def _text(view: ViewNode) -> str:
    node = view.node
    lines = [graphviz.escape(view.label)]
    if node.type and node.kind == "module" and node.type not in (view.label, "constructor"):
        lines[0] += f"  {node.type}"
    if node.frozen:
        lines[0] += "  (frozen)"
    if node.detail:
        lines.append(node.detail)
    return "\n".join(lines)


def _connect(dot: graphviz.Digraph, views: list[ViewNode], session: Session) -> None:
    """Draw the edges between what is visible; an open node stands for its first or last box."""
    drawn: set[tuple[str, str]] = set()
    for source, target, status in edges_between(views, session.graph):
        tail, head = _last(source), _first(target)
        if (tail, head) in drawn:
            continue
        drawn.add((tail, head))
        options = {"color": LINE[status]}
        if source.children:
            options["ltail"] = f"cluster_{source.node.id}"
        if target.children:
            options["lhead"] = f"cluster_{target.node.id}"
        dot.edge(tail, head, **options)


def _first(view: ViewNode) -> str:
    return _first(view.children[0]) if view.children else view.ids[0]


def _last(view: ViewNode) -> str:
    return _last(view.children[-1]) if view.children else view.ids[0]
