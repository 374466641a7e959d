"""Write the man pages, one a command, from the commands themselves.

Run: ``python docs/man.py``, with click-man installed, whenever an option changes. The pages are kept in ``man/`` and
go into the wheel as they are: made while building they would make click-man, and gradscope itself, a build
requirement of every installation from source (each pre-commit environment is one).
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import click
from click_man.man import ManPage

from gradscope.cli.main import COMMANDS, group

FOLDER = Path(__file__).parent.parent / "man"
AFTER = r""".SH EXIT STATUS
.TP
\fB0\fP
The gradient arrives: no finding counts.
.TP
\fB1\fP
Findings at or above \-\-fail\-on.
.TP
\fB2\fP
The request cannot be carried out.
.TP
\fB3\fP
The target could not be analysed; never to be mistaken for clean.
.SH ENVIRONMENT
Every option may be given as GRADSCOPE_OPTION, such as GRADSCOPE_FAIL_ON=warning; it beats the configuration and is
beaten by the option itself. GRADSCOPE_CACHE_DIR is where the scan keeps what it has read. NO_COLOR is honoured.
.SH FILES
pyproject.toml, the nearest one upward that has a table [tool.gradscope].
"""


def pages() -> dict[str, str]:
    """Return every page by the name of its file."""
    root = click.Context(group, info_name="gradscope", **group.context_settings)
    front = _page(group, root, "find what stops gradients in PyTorch code")
    front.commands = [(name, _escaped(text)) for name, (_, text) in COMMANDS.items()]
    written = {"gradscope.1": str(front) + AFTER}
    for name, (_, text) in COMMANDS.items():
        command = group.get_command(root, name)
        assert command is not None
        context = click.Context(command, root, name, **command.context_settings)
        page = _page(command, context, text[0].lower() + text[1:].rstrip("."))
        written[f"gradscope-{name}.1"] = f"{page}{AFTER}.SH SEE ALSO\n\\fBgradscope\\fP(1)\n"
    return written


def _page(command: click.Command, context: click.Context, summary: str) -> ManPage:
    page = ManPage(context.command_path)
    # No version and no date: the pages change when an option does, and not with every release.
    page.version, page.date = "gradscope", ""
    page.short_help = _escaped(summary)
    page.synopsis = " ".join(command.collect_usage_pieces(context))
    page.description = _described(command.help or "")
    options = [each.get_help_record(context) for each in command.get_params(context) if isinstance(each, click.Option)]
    page.options = [(names, _escaped(text)) for names, text in filter(None, options)]
    return page


def _described(text: str) -> str:
    r"""Return a help text as roff; what stands behind ``\b`` keeps its lines."""
    parts = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            title, *lines = _escaped(paragraph.removeprefix("\b").strip()).splitlines()
            parts.append("\n".join([title, ".nf", *lines, ".fi"]))
        else:
            parts.append(_escaped(" ".join(paragraph.split())))
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    """Return text in which nothing is roff's: backslashes, hyphens, and dots or quotes that begin a line."""
    return re.sub(r"^(?=[.'])", r"\\&", text.replace("\\", "\\e").replace("-", "\\-"), flags=re.MULTILINE)


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
