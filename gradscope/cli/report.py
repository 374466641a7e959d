"""``gradscope report``: saved sessions in any format, through the same gate; torch is not needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from gradscope import schema
from gradscope.cli.options import gate_options, report_options
from gradscope.cli.output import TRACE_FORMATS, Reporting
from gradscope.errors import ExitCode, UsageError
from gradscope.gate import Gate
from gradscope.report.formats import FORMATS, refuse_several
from gradscope.session import Session

# Of several sessions the gravest answer counts.
GRAVEST = (ExitCode.USAGE, ExitCode.FINDINGS, ExitCode.NOT_ANALYSED, ExitCode.CLEAN)


def _print_schema(context: click.Context, option: click.Parameter, given: bool) -> None:
    if given:
        click.echo(schema.text(), nl=False)
        context.exit()


@click.command("report", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("paths", nargs=-1, metavar="SESSION.json...", required=True)
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON Schema of sessions, and exit.",
)
@gate_options()
@report_options(TRACE_FORMATS)
def command(paths: tuple[str, ...], gate: Gate, reporting: Reporting) -> int:
    """Show saved sessions again, in any format; nothing is scanned or run.

    A SESSION.json is what `-o session.json` saved; - reads one from standard input. Exit codes and gate are those of
    the command that made it. Several sessions go into one report where its format can hold them: runs of a SARIF
    log, suites of a JUnit file, one after another as text, Markdown or annotations.

    \b
    Examples:
      gradscope report session.json --format markdown
      gradscope report session.json -o report.html -o results.sarif
      gradscope report scan.json trace.json -o results.xml --fail-on warning
      gradscope trace net.py:build --format json | gradscope report - -o graph.svg
    """
    sessions = [_load(path) for path in paths]
    wanted = dict.fromkeys([reporting.fmt, *(fmt for fmt, _ in reporting.files)])
    for fmt in wanted:
        _refuse_what_cannot_be_shown(fmt, paths, sessions)
    if len(sessions) == 1:
        return reporting.finish(sessions[0], gate)
    if gate.update:
        raise UsageError(
            "--update-baseline takes one session, and several were given.",
            hint="`gradscope check --update-baseline` writes one for all targets of a project.",
        )
    judged = [gate.judged(session) for session in sessions]
    reporting.write(*(each if reporting.source else each.without_source() for each in judged))
    codes = {gate.exit_code(session) for session in judged}
    return int(next(code for code in GRAVEST if code in codes))


def _load(path: str) -> Session:
    """Read one session, from standard input for ``-``."""
    if path != "-":
        if not Path(path).exists():
            raise UsageError(f"There is no file {path}.", hint="Save a session with -o session.json.")
        return Session.load(path)
    return Session.loads(sys.stdin.buffer.read(), "standard input")


def _refuse_what_cannot_be_shown(fmt: str, paths: Sequence[str], sessions: Sequence[Session]) -> None:
    """Refuse, before anything is written, a format that these sessions cannot be shown in.

    Raises:
        UsageError: it draws a graph and a session has none, or it holds one session and there are several.
    """
    refuse_several(fmt, len(sessions))
    for path, session in zip(paths, sessions, strict=True):
        if FORMATS[fmt].needs_graph and not session.graph.nodes:
            raise UsageError(
                f"{path} holds no graph that could be drawn as {fmt}: it is a {session.kind}.",
                hint="A trace has one.",
            )
