"""Where reports go: the format of a file by its suffix, stdout for one report, files for the rest."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from gradscope.errors import UsageError
from gradscope.report import dot, github, machine, scan_terminal, terminal
from gradscope.session import Session

FORMATS = ["text", "json", "github", "dot", "svg", "png"]
# A scan has no graph to draw.
SCAN_FORMATS = ["text", "json", "github"]
SUFFIXES = {".txt": "text", ".json": "json", ".dot": "dot", ".gv": "dot", ".svg": "svg", ".png": "png"}
TEXT_FILE_WIDTH = 100


def format_of(path: Path, formats: Sequence[str] = FORMATS) -> str:
    """Return the format that a file's suffix asks for; raise UsageError where it is none of ``formats``."""
    fmt = SUFFIXES.get(path.suffix.lower())
    if fmt is None or fmt not in formats:
        known = ", ".join(suffix for suffix, each in SUFFIXES.items() if each in formats)
        raise UsageError(f"The suffix of {path} names no format that can be written here.", hint=f"Use one of {known}.")
    return fmt


def check_outputs(outputs: Sequence[Path], formats: Sequence[str], *, force: bool) -> None:
    """Refuse, before any work is done, outputs of no known format and files that cannot or should not be written."""
    for path in outputs:
        format_of(path, formats)
        if not path.parent.is_dir():
            raise UsageError(f"There is no folder {path.parent} to write {path.name} into.", hint="Make it first.")
        if path.exists() and not force:
            raise UsageError(f"{path} exists already.", hint="Choose another name, or add --force.")


def write(session: Session, fmt: str, outputs: Sequence[Path], *, color: str, full: bool) -> None:
    """Write the report to stdout and to every file asked for; a file that fails takes nothing else with it.

    Raises:
        UsageError: when all else is written, what went wrong first.
    """
    failures: list[UsageError] = []
    for path in outputs:
        try:
            _write_file(session, path, full=full)
        except UsageError as error:
            failures.append(error)
    if fmt == "text":
        _print(session, _console(color), full=full)
    elif fmt == "png" and sys.stdout.isatty():
        raise UsageError("A PNG picture cannot go to a terminal.", hint="Use `-o picture.png`.")
    else:
        sys.stdout.buffer.write(_render(session, fmt, full=full))
    if failures:
        sys.stdout.flush()
        raise failures[0]


def _write_file(session: Session, path: Path, *, full: bool) -> None:
    """Write one report; where a picture cannot be drawn its source is written, and the error says so."""
    undrawn: UsageError | None = None
    try:
        content = _render(session, format_of(path), full=full)
    except UsageError as error:
        source = path.with_suffix(".dot")
        if source.exists():
            raise
        said = f"{error.message} {source} was written in place of {path.name}."
        undrawn = UsageError(said, hint=error.hint)
        path, content = source, _render(session, "dot", full=full)
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UsageError(f"Cannot write {path}: {error.strerror}.") from error
    click.echo(f"wrote {path}", err=True)
    if undrawn is not None:
        raise undrawn


def _render(session: Session, fmt: str, *, full: bool) -> bytes:
    if fmt == "json":
        return machine.render_json(session).encode()
    if fmt == "github":
        return github.render_github(session).encode()
    if fmt == "text":
        console = Console(width=TEXT_FILE_WIDTH, no_color=True)
        with console.capture() as captured:
            _print(session, console, full=full)
        text: str = captured.get()
        return text.encode()
    source: str = dot.build(session, full=full).source
    if fmt == "dot":
        return source.encode()
    return dot.render(source, fmt)


def _print(session: Session, console: Console, *, full: bool) -> None:
    page = scan_terminal if session.kind == "scan" else terminal
    page.render(session, console, full=full)


def _console(color: str) -> Console:
    if color == "always":
        return Console(force_terminal=True)
    return Console(no_color=True) if color == "never" else Console()
