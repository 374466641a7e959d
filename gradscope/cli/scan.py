"""``gradscope scan``: read source, import nothing, and say what stops gradients where."""

from __future__ import annotations

import click

from gradscope.cli.options import configured_targets, gate_options, report_options
from gradscope.cli.output import SCAN_FORMATS, Reporting
from gradscope.cli.progress import counting
from gradscope.gate import Gate
from gradscope.scanning.scanner import scan


@click.command("scan", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("targets", nargs=-1, metavar="[TARGET...]")
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
@click.option(
    "--follow/--no-follow", default=True, show_default=True, help="Look into installed packages that TARGET calls."
)
@click.option("--cache/--no-cache", default=True, show_default=True, help="Keep what was read, keyed by content.")
@report_options(SCAN_FORMATS)
def command(
    targets: tuple[str, ...], entry: tuple[str, ...], jobs: int | None, follow: bool, cache: bool,
    gate: Gate, reporting: Reporting,
) -> int:  # fmt: skip
    """Find every place in the source of TARGET that stops gradients, and what reaches it.

    A TARGET is a dotted module or package, a file, a folder, or an installed distribution; without one,
    the targets of [tool.gradscope] are scanned. Nothing of it is imported or run, and torch is not needed.
    Where its own code calls installed packages, these are looked into as well: what a call loses is told at the call.

    \b
    Examples:
      gradscope scan deepseek_ocr_encoder
      gradscope scan src/ --fail-on warning --format github
      gradscope scan sentence_transformers --entry SentenceTransformer.encode
    """
    targets = targets or configured_targets()
    with counting(reporting.progress(), "Reading") as progress:
        session = scan(*targets, entry=entry, jobs=jobs, cache=cache, follow=follow, progress=progress)
    return reporting.finish(session, gate)
