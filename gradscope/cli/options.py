"""Options that several commands share: each is named, explained and checked in one place.

A command receives them bundled: what counts as one :class:`Gate`, where reports go as one :class:`Reporting`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from gradscope.cli.output import Reporting, check_outputs
from gradscope.config import Config, load_config
from gradscope.gate import Gate

# Where the context of a command keeps its configuration.
CONFIG = "gradscope.config"
Command = TypeVar("Command", bound=Callable[..., Any])


def report_options(formats: Sequence[str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add ``--format``, ``-o`` and what goes with them; the command receives them as ``reporting``."""
    options = _all(
        click.option("--format", "fmt", type=click.Choice(list(formats)), default="text", show_default=True,
                     envvar="GRADSCOPE_FORMAT", metavar="FORMAT", help=f"What stdout carries: {', '.join(formats)}."),
        click.option("-o", "--output", "outputs", multiple=True, metavar="[FORMAT=]PATH",
                     envvar="GRADSCOPE_OUTPUT",
                     help="Also write here; the suffix picks the format, or FORMAT= says it. Repeatable."),
        click.option("--no-source", is_flag=True, help="Leave every line of source text out of the reports."),
        click.option("--force", is_flag=True, help="Overwrite files named by -o."),
        click.option("-v", "--full", "--verbose", "full", is_flag=True,
                     help="Show everything: all notes, the whole tree (repeats stay folded)."),
        click.option("--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True,
                     help="auto: where a terminal shows the report."),
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
                     envvar="GRADSCOPE_PER_FILE_IGNORES",
                     help="Leave rules out in some files, as in 'tests/*:GS1'."),
        click.option("--fail-on", type=click.Choice(["error", "warning", "note", "never"]), default="error",
                     show_default=True, help="The least severity that makes exit code 1."),
        click.option("--baseline", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                     help="Findings that are in this file do not count."),
        click.option("--update-baseline", is_flag=True, help="Write what is found now into the baseline."),
        click.option("--config", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", is_eager=True,
                     expose_value=False, callback=_configured,
                     help="Take [tool.gradscope] from this file.  [default: the nearest pyproject.toml that has it]"),
        click.option("--no-config", is_flag=True, is_eager=True, expose_value=False, callback=_unconfigured,
                     help="Take it from nowhere."),
    )  # fmt: skip

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def bundled(
            *args: Any, select: tuple[str, ...], ignore: tuple[str, ...], per_file: tuple[str, ...], fail_on: str,
            baseline: Path | None, update_baseline: bool, **rest: Any,
        ) -> Any:  # fmt: skip
            gate = Gate.of(select, ignore, per_file, fail_on, baseline, update_baseline, configuration())
            return command(*args, gate=gate, **rest)

        return options(bundled)

    return add


def configuration() -> Config:
    """Return what the running command is configured with; empty where it takes no configuration."""
    config: Config = click.get_current_context().meta.get(CONFIG, Config())
    return config


def configured_targets() -> tuple[str, ...]:
    """Return the targets that the configuration names, as seen from the working folder.

    Raises:
        click.UsageError: it names none.
    """
    config = configuration()
    if not config.targets:
        raise click.UsageError(
            "Missing argument 'TARGET...'. Name one here, or list targets under [tool.gradscope] in pyproject.toml.",
            click.get_current_context(),
        )
    inside = [(target, config.folder / target) for target in config.targets]
    return tuple(os.path.normpath(path) if path.exists() else target for target, path in inside)


def _configured(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    """Read the configuration before any other option is looked at: it holds their defaults."""
    if context.meta.get(CONFIG) is None and not context.resilient_parsing:
        config = load_config(path)
        context.meta[CONFIG] = config
        context.default_map = {**(context.default_map or {}), **dict(config.options)}


def _unconfigured(context: click.Context, option: click.Parameter, given: bool) -> None:
    if given:
        context.meta[CONFIG] = Config()
        context.default_map = None


def _all(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add
