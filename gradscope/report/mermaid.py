"""The folded flow graph as Mermaid, which GitHub, GitLab and many editors draw where it stands in Markdown.

Syntax: https://mermaid.js.org/syntax/flowchart.html
"""

from __future__ import annotations

import json

from gradscope.flow import FlowStatus
from gradscope.report.views import ViewNode, edges_between, fold
from gradscope.session import Session

# Mermaid refuses more (maxEdges, maxTextSize), and readers long before.
MOST_EDGES = 500
MOST_LETTERS = 50_000
MOST_BOXES = 30
LONGEST_LABEL = 60
# Room for titles of two lines, which else lie under what is inside.
CONFIG = "config: {flowchart: {subGraphTitleMargin: {top: 4, bottom: 22}}}"
# With colours of their own the boxes can be read on a dark page too.
CLASSES = {
    "flows": "fill:#e3f4e6,stroke:#1a7f37,color:#10321a",
    "blocked": "fill:#fde7e4,stroke:#c62828,color:#4a0f0f",
    "none": "fill:#f2f2f2,stroke:#8c8c8c,color:#333333",
}
# A cut by the severity of its finding.
CUT = {"error": "#d93636", "warning": "#bf8700", "note": "#8c8c8c"}
EDGES: dict[FlowStatus, str] = {
    "flows": "stroke:#1a7f37,stroke-width:2px",
    "blocked": "stroke:#c62828,stroke-width:2px,stroke-dasharray:6 4",
    "none": "stroke:#8c8c8c",
}


def render(session: Session, *, full: bool = False) -> str:
    """Return the folded graph as a Mermaid flowchart; it is folded further until Mermaid takes it."""
    text = ""
    for most in (None, 300, 100, MOST_BOXES, 20, 10, 5) if full else (MOST_BOXES, 20, 10, 5):
        text, edges = draw(session, most)
        if edges <= MOST_EDGES and len(text) <= MOST_LETTERS:
            break
    return text


def draw(session: Session, most: int | None) -> tuple[str, int]:
    """Return the graph with at most so many boxes, and how many edges it has."""
    views = fold(session.graph, most)
    names = {view.ids[0]: f"n{number}" for number, view in enumerate(v for top in views for v in top.walk())}
    title = f"{session.target.get('name', '')}.{session.target.get('entry', '')}: {session.verdict}"
    lines = ["---", f"title: {json.dumps(title)}", CONFIG, "---", "flowchart TB"]
    for view in views:
        lines += _box(view, names, session, "  ")
    edges = edges_between(views, session.graph)
    for source, target, status in edges:
        arrow = "-.->" if status == "blocked" else "-->"
        lines.append(f"  {names[source.ids[0]]} {arrow} {names[target.ids[0]]}")
    for name, style in EDGES.items():
        numbers = [str(number) for number, (_, _, status) in enumerate(edges) if status == name]
        if numbers:
            lines.append(f"  linkStyle {','.join(numbers)} {style}")
    lines += [f"  classDef {name} {style}" for name, style in CLASSES.items()]
    lines.append("  classDef frozen stroke-dasharray:4 3")
    return "\n".join(lines) + "\n", len(edges)


# --- the parts -------------------------------------------------------------------------------------


def _box(view: ViewNode, names: dict[str, str], session: Session, indent: str) -> list[str]:
    """Return the lines of a node: a box, or a frame around what lies inside it."""
    name, node = names[view.ids[0]], view.node
    colour = CUT[session.finding(node.finding).severity] if node.finding else ""
    if not view.children:
        shape = ('(["', '"])') if node.kind in ("input", "output") else ('["', '"]')
        lines = [f"{indent}{name}{shape[0]}{_label(view, session)}{shape[1]}:::{node.status}"]
        lines += [f"{indent}class {name} frozen"] if node.frozen else []
        lines += [f"{indent}style {name} stroke:{colour},stroke-width:3px"] if colour else []
        return lines
    lines = [f'{indent}subgraph {name}["{_label(view, session)}"]']
    for child in view.children:
        lines += _box(child, names, session, indent + "  ")
    style = (
        f"fill:{colour}0d,stroke:{colour},stroke-width:3px,color:{colour}"
        if colour
        else "fill:#8c8c8c0d,stroke:#8c8c8c"
    )
    return [*lines, f"{indent}end", f"{indent}style {name} {style}"]


def _label(view: ViewNode, session: Session) -> str:
    node = view.node
    first = view.label
    if node.type not in ("", "constructor", view.label) and node.kind == "module":
        first = f"{first}  {node.type}"
    parts = [first]
    if node.finding:
        parts = [f"✂ {first}  {session.finding(node.finding).rule}", f"{node.path}:{node.line}"]
    elif node.detail and not view.children:
        parts.append(node.detail)
    if node.frozen:
        parts[0] += "  ❄"
    return "<br>".join(_escaped(part) for part in parts)


def _escaped(text: str) -> str:
    """Return text that means nothing to Mermaid: letters and digits, all else by number."""
    if len(text) > LONGEST_LABEL:
        text = f"{text[: LONGEST_LABEL - 1]}…"
    return "".join(each if each.isalnum() or each in " .,:-/()" else f"#{ord(each)};" for each in text)
