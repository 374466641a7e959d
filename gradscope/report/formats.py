"""Every format a session can be written in: its suffix, what it can show, and the module that renders it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import PurePath

from rich.console import Console

from gradscope.errors import UsageError
from gradscope.report import check_terminal, scan_terminal, terminal
from gradscope.session import Session

TEXT_FILE_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Format:
    """A format by name; ``suffixes`` of files that ask for it, ``needs_graph`` where a scan cannot be shown in it."""

    name: str
    suffixes: tuple[str, ...]
    renderer: str = ""
    needs_graph: bool = False


# A renderer is a module with ``render(session, *, full) -> str``; it is imported when it is asked for.
FORMATS = {
    each.name: each
    for each in (
        Format("text", (".txt",)),
        Format("json", (".json",), "gradscope.report.machine"),
        Format("sarif", (".sarif", ".sarif.json"), "gradscope.report.sarif"),
        Format("github", (), "gradscope.report.github"),
        Format("junit", (".xml",), "gradscope.report.junit"),
        Format("markdown", (".md",), "gradscope.report.markdown"),
        Format("gitlab", (".gitlab.json",), "gradscope.report.gitlab"),
        Format("html", (".html", ".htm"), "gradscope.report.html"),
        Format("dot", (".dot", ".gv"), "gradscope.report.dot", needs_graph=True),
        Format("svg", (".svg",), needs_graph=True),
        Format("png", (".png",), needs_graph=True),
        Format("mermaid", (".mmd", ".mermaid"), "gradscope.report.mermaid", needs_graph=True),
        Format("model-explorer", (".model-explorer.json",), "gradscope.report.model_explorer", needs_graph=True),
    )
}


def names(*, graph: bool) -> list[str]:
    """Return the names of the formats; those that draw the flow graph only where there is one."""
    return [each.name for each in FORMATS.values() if graph or not each.needs_graph]


def format_of(path: PurePath) -> str:
    """Return the format that the suffix of a file asks for: the longest that fits; empty where none does."""
    fitting = [
        (len(suffix), each.name)
        for each in FORMATS.values()
        for suffix in each.suffixes
        if path.name.lower().endswith(suffix)
    ]
    return max(fitting)[1] if fitting else ""


def render(session: Session, fmt: str, *, full: bool = False) -> bytes:
    """Return a session in one of ``FORMATS``; ``full`` leaves nothing out that is otherwise folded.

    Raises:
        UsageError: nothing here can draw the picture.
    """
    if fmt == "text":
        console = Console(file=io.StringIO(), width=TEXT_FILE_WIDTH, no_color=True)
        with console.capture() as captured:
            show(session, console, full=full)
        return captured.get().encode()
    if fmt in ("svg", "png"):
        from gradscope.report import dot

        return dot.draw(dot.render(session, full=full), fmt)
    renderer = FORMATS[fmt].renderer
    if not renderer:
        raise UsageError(f"There is no format {fmt!r}.", hint=f"Use one of {', '.join(FORMATS)}.")
    text: str = import_module(renderer).render(session, full=full)
    return text.encode()


def hold_several() -> list[str]:
    """Return the formats in which one report can show several sessions."""
    modules = {name: each.renderer for name, each in FORMATS.items() if each.renderer}
    return ["text", *(name for name, module in modules.items() if hasattr(import_module(module), "render_several"))]


def refuse_several(fmt: str, number: int) -> None:
    """Raise where one report in this format cannot show so many sessions.

    Raises:
        UsageError: it shows one.
    """
    if number > 1 and fmt not in hold_several():
        raise UsageError(
            f"A {fmt} report shows one session, and {number} were given.",
            hint=f"Write one for each, or use one of {', '.join(hold_several())}.",
        )


def render_several(sessions: Sequence[Session], fmt: str, *, full: bool = False) -> bytes:
    """Return several sessions in one of ``FORMATS``: runs of one SARIF log, suites of one JUnit file, and so on.

    Raises:
        UsageError: the format shows one session, or nothing here can draw the picture.
    """
    if len(sessions) == 1:
        return render(sessions[0], fmt, full=full)
    refuse_several(fmt, len(sessions))
    if fmt == "text":
        return b"\n".join(render(session, fmt, full=full) for session in sessions)
    text: str = import_module(FORMATS[fmt].renderer).render_several(sessions, full=full)
    return text.encode()


def show(session: Session, console: Console, *, full: bool = False) -> None:
    """Print the report of the command line on a console."""
    pages = {"scan": scan_terminal.render, "check": check_terminal.render}
    console.size = console.size  # asked for once, not for every line
    with console:  # one write, not one a line
        pages.get(session.kind, terminal.render)(session, console, full=full)
