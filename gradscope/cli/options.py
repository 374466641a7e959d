"""Options that several commands share, so that each is named, explained and checked in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def report_options(formats: Sequence[str]) -> Callable[[Command], Command]:
    """Add ``--format``, ``-o``, ``--force``, ``--color`` and ``-q``."""
    return _all(
        click.option("--format", "fmt", type=click.Choice(list(formats)), default="text", show_default=True,
                     help="What stdout carries."),
        click.option("-o", "--output", "outputs", multiple=True, type=click.Path(dir_okay=False, path_type=Path),
                     help="Also write here; the suffix picks the format. Repeatable."),
        click.option("--force", is_flag=True, help="Overwrite files named by -o."),
        click.option("--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True),
        click.option("-q", "--quiet", is_flag=True, help="No progress on stderr."),
    )  # fmt: skip


def gate_options() -> Callable[[Command], Command]:
    """Add ``--select``, ``--ignore``, ``--per-file-ignores`` and ``--fail-on``."""
    return _all(
        click.option("--select", multiple=True, metavar="RULES",
                     help="Only these rules: codes, names, or families such as GS1. Repeatable, or with commas."),
        click.option("--ignore", multiple=True, metavar="RULES", help="All but these rules."),
        click.option("--per-file-ignores", "per_file", multiple=True, metavar="PATTERN:RULES",
                     help="Leave rules out in some files, as in 'tests/*:GS1'."),
        click.option("--fail-on", type=click.Choice(["error", "warning", "note", "never"]), default="error",
                     show_default=True, help="The least severity that makes exit code 1."),
    )  # fmt: skip


def _all(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add
