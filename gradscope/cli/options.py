"""Options that several commands share: each is named, explained and checked in one place.

A command receives them bundled: what counts as one :class:`Gate`, where reports go as one :class:`Reporting`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from gradscope.cli.output import Reporting, check_outputs
from gradscope.gate import Gate

Command = TypeVar("Command", bound=Callable[..., Any])


def report_options(formats: Sequence[str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add ``--format``, ``-o`` and what goes with them; the command receives them as ``reporting``."""
    options = _all(
        click.option("--format", "fmt", type=click.Choice(list(formats)), default="text", show_default=True,
                     help="What stdout carries."),
        click.option("-o", "--output", "outputs", multiple=True, metavar="[FORMAT=]PATH",
                     help="Also write here; the suffix picks the format, or FORMAT= says it. Repeatable."),
        click.option("--no-source", is_flag=True, help="Leave every line of source text out of the reports."),
        click.option("--force", is_flag=True, help="Overwrite files named by -o."),
        click.option("-v", "--full", "--verbose", "full", is_flag=True,
                     help="Show everything: all notes, the whole tree (repeats stay folded)."),
        click.option("--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True),
        click.option("-q", "--quiet", is_flag=True, help="No progress on stderr."),
    )  # fmt: skip

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def bundled(
            *args: Any, fmt: str, outputs: tuple[str, ...], no_source: bool, force: bool, full: bool, color: str,
            quiet: bool, **rest: Any,
        ) -> Any:  # fmt: skip
            files = check_outputs(outputs, formats, force=force)
            reporting = Reporting(fmt, tuple(files), color=color, full=full, source=not no_source, quiet=quiet)
            return command(*args, reporting=reporting, **rest)

        return options(bundled)

    return add


def gate_options() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add ``--select``, ``--ignore``, ``--fail-on``, ``--baseline`` and their like; the command receives a ``gate``."""
    options = _all(
        click.option("--select", multiple=True, metavar="RULES",
                     help="Only these rules: codes, names, or families such as GS1. Repeatable, or with commas."),
        click.option("--ignore", multiple=True, metavar="RULES", help="All but these rules."),
        click.option("--per-file-ignores", "per_file", multiple=True, metavar="PATTERN:RULES",
                     help="Leave rules out in some files, as in 'tests/*:GS1'."),
        click.option("--fail-on", type=click.Choice(["error", "warning", "note", "never"]), default="error",
                     show_default=True, help="The least severity that makes exit code 1."),
        click.option("--baseline", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                     help="Findings that are in this file do not count."),
        click.option("--update-baseline", "update", is_flag=True, help="Write what is found now into the baseline."),
    )  # fmt: skip

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def bundled(
            *args: Any, select: tuple[str, ...], ignore: tuple[str, ...], per_file: tuple[str, ...], fail_on: str,
            baseline: Path | None, update: bool, **rest: Any,
        ) -> Any:  # fmt: skip
            return command(*args, gate=Gate.of(select, ignore, per_file, fail_on, baseline, update), **rest)

        return options(bundled)

    return add


def _all(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add
