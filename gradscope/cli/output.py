"""Where reports go: the format of a file by its suffix, stdout for one report, files for the rest."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from gradscope.errors import UsageError
from gradscope.report import dot, machine, terminal
from gradscope.session import Session

FORMATS = ["text", "json", "dot", "svg", "png"]
SUFFIXES = {".txt": "text", ".json": "json", ".dot": "dot", ".gv": "dot", ".svg": "svg", ".png": "png"}


def format_of(path: Path) -> str:
    """Return the format that a file's suffix asks for."""
    try:
        return SUFFIXES[path.suffix.lower()]
    except KeyError:
        known = ", ".join(SUFFIXES)
        raise UsageError(f"The suffix of {path} names no format.", hint=f"Use one of {known}.") from None


def write(session: Session, fmt: str, outputs: Sequence[Path], *, color: str, full: bool) -> None:
    """Write the report to stdout and to every file asked for."""
    for path in outputs:
        content = _render(session, format_of(path), full=full)
        try:
            path.write_bytes(content)
        except OSError as error:
            raise UsageError(f"Cannot write {path}: {error.strerror}.") from error
        click.echo(f"wrote {path}", err=True)
    if fmt == "text":
        terminal.render(session, _console(color), full=full)
    elif fmt == "png" and sys.stdout.isatty():
        raise UsageError("A PNG picture cannot go to a terminal.", hint="Use `-o picture.png`.")
    else:
        sys.stdout.buffer.write(_render(session, fmt, full=full))


def _render(session: Session, fmt: str, *, full: bool) -> bytes:
    if fmt == "json":
        return machine.render_json(session).encode()
    if fmt == "text":
        console = Console(width=100, no_color=True, file=None, record=True, quiet=False)
        with console.capture() as captured:
            terminal.render(session, console, full=full)
        text: str = captured.get()
        return text.encode()
    source: str = dot.build(session, full=full).source
    if fmt == "dot":
        return source.encode()
    return dot.render(source, fmt)


def _console(color: str) -> Console:
    if color == "always":
        return Console(force_terminal=True)
    return Console(no_color=True) if color == "never" else Console()
