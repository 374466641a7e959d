"""Where reports go: the format of a file by its suffix, stdout for one report, files for the rest."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from gradscope.baseline import Baseline
from gradscope.errors import UsageError
from gradscope.gate import Gate
from gradscope.paths import write_whole
from gradscope.report import formats
from gradscope.report.formats import FORMATS, render_several, show
from gradscope.session import Session

# What a scan cannot be written in has a graph to draw.
TRACE_FORMATS = formats.names(graph=True)
SCAN_FORMATS = formats.names(graph=False)
# GitHub takes that much for each step, and shows nothing at all where there is more.
MOST_SUMMARY = 1024 * 1024


def parse_output(text: str, known: Sequence[str]) -> tuple[str, Path]:
    """Return the format and the path that one ``-o`` asks for: by the suffix, or said as ``FORMAT=PATH``.

    Raises:
        UsageError: the suffix names no format, or none of those that ``known`` lists.
    """
    name, equals, rest = text.partition("=")
    if equals and name in FORMATS:
        fmt, path = name, Path(rest)
    else:
        path = Path(text)
        fmt = formats.format_of(path)
    if fmt not in known:
        suffixes = ", ".join(suffix for each in known for suffix in FORMATS[each].suffixes)
        raise UsageError(
            f"The suffix of {path} names no format that can be written here.",
            hint=f"Use one of {suffixes}, or say it: -o FORMAT={path}.",
        )
    return fmt, path


def check_outputs(outputs: Sequence[str], known: Sequence[str], *, force: bool) -> list[tuple[str, Path]]:
    """Return what ``-o`` asks for; refuse, before any work is done, what cannot or should not be written."""
    wanted = [parse_output(text, known) for text in outputs]
    for _, path in wanted:
        if not path.parent.is_dir():
            raise UsageError(f"There is no folder {path.parent} to write {path.name} into.", hint="Make it first.")
        if path.exists() and not force:
            raise UsageError(f"{path} exists already.", hint="Choose another name, or add --force.")
    return wanted


@dataclass(frozen=True, slots=True)
class Reporting:
    """What a command was asked to write: ``fmt`` to stdout, and to each of ``files`` its own format.

    ``full`` leaves nothing out that is otherwise folded; without ``source`` no line of source text is written.
    """

    fmt: str = "text"
    files: tuple[tuple[str, Path], ...] = ()
    color: str = "auto"
    full: bool = False
    source: bool = True
    quiet: bool = False

    def progress(self) -> Console:
        """Return a console on stderr for what is on its way; silent where nobody watches or nothing can be erased."""
        console = _console(self.color if self.color == "never" else "auto", stderr=True)
        console.quiet = self.quiet or not sys.stderr.isatty() or console.is_dumb_terminal
        return console

    def finish(self, session: Session, gate: Gate) -> int:
        """Write what counts to stdout, every file asked for and the baseline, and return the exit code.

        Raises:
            UsageError: when all else is written, what went wrong first.
        """
        if gate.update and gate.baseline is not None:
            gate = _renewed(gate, gate.baseline, session, source=self.source)
        return self.conclude(gate.judged(session), gate)

    def conclude(self, session: Session, gate: Gate) -> int:
        """Write a session that has been judged, and return the exit code.

        Raises:
            UsageError: when all else is written, what went wrong first.
        """
        self.write(session if self.source else session.without_source())
        return int(gate.exit_code(session))

    def write(self, *sessions: Session) -> None:
        """Write the reports; a file that fails takes nothing else with it.

        Raises:
            UsageError: when all else is written, what went wrong first.
        """
        failures: list[UsageError] = []
        for fmt, path in self.files:
            try:
                _write_file(sessions, fmt, path, full=self.full)
            except UsageError as error:
                failures.append(error)
        if self.fmt == "text":
            for session in sessions:
                show(session, _console(self.color), full=self.full)
        elif self.fmt == "png" and sys.stdout.isatty():
            raise UsageError("A PNG picture cannot go to a terminal.", hint="Use `-o picture.png`.")
        else:
            sys.stdout.buffer.write(render_several(sessions, self.fmt, full=self.full))
        if self.fmt == "github":
            _summarise(sessions)
        if failures:
            sys.stdout.flush()
            raise failures[0]


def _renewed(gate: Gate, baseline: Baseline, session: Session, *, source: bool) -> Gate:
    """Write the baseline anew and return the gate with it, for which nothing is new any more."""
    if session.kind == "trace" and session.in_doubt:
        click.echo(f"{baseline.path} was not written: too much of the run could not be seen.", err=True)
        return gate
    session = gate.to_write_down(session)
    renewed = baseline.updated(session if source else session.without_source())
    renewed.save()
    gone = session.baseline.fixed if session.baseline else 0
    click.echo(f"wrote {baseline.path}: {session.count_state('new')} added, {gone} removed", err=True)
    return dataclasses.replace(gate, baseline=renewed)


def _summarise(sessions: Sequence[Session]) -> None:
    """Append the report to the summary of the GitHub job, where there is one and as long as it takes more."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    try:
        room = MOST_SUMMARY - (os.path.getsize(path) if os.path.exists(path) else 0)
        content = render_several(sessions, "markdown") + b"\n"
        if len(content) > room:
            content = b"gradscope: the report is too long for this summary; write it with -o report.md.\n"
        if len(content) <= room:
            with open(path, "ab") as summary:
                summary.write(content)
    except OSError as error:
        click.echo(f"gradscope: cannot write the summary of the job to {path}: {error.strerror}.", err=True)


def _write_file(sessions: Sequence[Session], fmt: str, path: Path, *, full: bool) -> None:
    """Write one report; where a picture cannot be drawn its source is written, and the error says so."""
    undrawn: UsageError | None = None
    try:
        content = render_several(sessions, fmt, full=full)
    except UsageError as error:
        source = path.with_suffix(".dot")
        if fmt not in ("svg", "png") or len(sessions) > 1 or source.exists():
            raise
        said = f"{error.message} {source} was written in place of {path.name}."
        undrawn = UsageError(said, hint=error.hint)
        path, content = source, render_several(sessions, "dot", full=full)
    write_whole(path, content)
    click.echo(f"wrote {path}", err=True)
    if undrawn is not None:
        raise undrawn


def _console(color: str, *, stderr: bool = False) -> Console:
    """Return a console; ``never`` means no escape sequence at all, where NO_COLOR leaves bold type."""
    if color == "always":
        return Console(force_terminal=True, stderr=stderr)
    return Console(color_system=None if color == "never" else "auto", stderr=stderr)
