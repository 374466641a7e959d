"""How a session shows itself: as rich text in a terminal, as HTML in a notebook."""

from __future__ import annotations

import io
import shutil

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from gradscope.report.formats import show
from gradscope.session import Session

NOTEBOOK_WIDTH = 110
# A notebook is light or dark and does not say which: every colour has four times the contrast on either.
COLOURS = {"black": "#7a7d85", "red": "#dc3a33", "green": "#23863c", "yellow": "#a06a00", "blue": "#3f78d8",
           "magenta": "#b04fc0", "cyan": "#0a8296", "white": "#7a7d85"}  # fmt: skip
NOTEBOOK_PAGE = (
    '<pre style="font-family:ui-monospace,Menlo,Consolas,monospace;font-size:13px;line-height:1.35;overflow-x:auto">'
    "{code}</pre>"
)


def _theme() -> TerminalTheme:
    colours = [tuple(bytes.fromhex(each[1:])) for each in COLOURS.values()]
    return TerminalTheme((255, 255, 255), (0, 0, 0), colours, colours)  # type: ignore[arg-type]


def as_text(session: Session) -> Text:
    """Return the report as rich text, as wide as the terminal."""
    out = io.StringIO()
    show(session, Console(file=out, width=shutil.get_terminal_size().columns, force_terminal=True))
    return Text.from_ansi(out.getvalue().rstrip("\n"))


def as_html(session: Session) -> str:
    """Return the report as one ``<pre>`` with inline colours; no script, nothing loaded from anywhere."""
    console = Console(file=io.StringIO(), width=NOTEBOOK_WIDTH, record=True, force_terminal=True)
    show(session, console)
    return console.export_html(theme=_theme(), code_format=NOTEBOOK_PAGE, inline_styles=True)
