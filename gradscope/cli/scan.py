"""``gradscope scan``: read source, import nothing, and say what stops gradients where."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from gradscope.cli.options import gate_options, report_options
from gradscope.cli.output import SCAN_FORMATS, check_outputs, write
from gradscope.gate import Gate
from gradscope.scanning.scanner import scan
from gradscope.session import Session


@click.command("scan", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option(
    "--entry",
    multiple=True,
    metavar="CLASS.METHOD",
    help="Ask only whether a gradient gets through this function. Repeatable.",
)
@gate_options()
@click.option(
    "--jobs", "-j", type=click.IntRange(1), metavar="N", help="Processes to parse with.  [default: processors]"
)
@click.option("--cache/--no-cache", default=True, show_default=True, help="Keep what was read, keyed by content.")
@report_options(SCAN_FORMATS)
@click.option("-v", "--verbose", is_flag=True, help="Show every warning and note.")
def command(
    targets: tuple[str, ...], entry: tuple[str, ...], select: tuple[str, ...], ignore: tuple[str, ...],
    per_file: tuple[str, ...], fail_on: str, jobs: int | None, cache: bool, fmt: str, outputs: tuple[Path, ...],
    force: bool, color: str, quiet: bool, verbose: bool,
) -> int:  # fmt: skip
    """Find every place in the source of TARGET that stops gradients, and what reaches it.

    A TARGET is a dotted module or package, a file, a folder, or an installed distribution. Nothing of it
    is imported or run, and torch is not needed.

    \b
    Examples:
      gradscope scan deepseek_ocr_encoder
      gradscope scan src/ --fail-on warning --format github
      gradscope scan sentence_transformers --entry SentenceTransformer.encode
    """
    gate = Gate.of(select, ignore, per_file, fail_on)
    check_outputs(outputs, SCAN_FORMATS, force=force)
    session = gate.filtered(_scan(targets, entry, jobs, cache, quiet=quiet))
    write(session, fmt, outputs, color=color, full=verbose)
    return int(gate.exit_code(session))


def _scan(targets: tuple[str, ...], entry: tuple[str, ...], jobs: int | None, cache: bool, *, quiet: bool) -> Session:
    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=quiet or not sys.stderr.isatty()) as progress:
        task = progress.add_task("Reading", total=None)
        return scan(
            *targets, entry=entry, jobs=jobs, cache=cache,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
