"""The reference of the command line, from the commands themselves."""

from __future__ import annotations

import html
import inspect
import re

import click

from gradscope.cli.main import group

# What click puts behind the names of an option that takes one of a few words.
CHOICES = re.compile(r" \[([^\]=]+\|[^\]]+)\]$")
DEFAULT = re.compile(r"\s*\[default: (.+?)\]")


def pages() -> dict[str, str]:
    """Return the page by its path in the site's folder."""
    root = click.Context(group, info_name="gradscope", **group.context_settings)
    parts = ["# Command line", *_sections(group), *_options(group, root)]
    for name in group.list_commands(root):
        command = group.get_command(root, name)
        assert command is not None
        parts += _command(command, click.Context(command, root, name, **command.context_settings))
    return {"cli.md": "\n\n".join(parts) + "\n"}


def _command(command: click.Command, context: click.Context) -> list[str]:
    usage = command.collect_usage_pieces(context)
    return [
        f"## {context.info_name}",
        f"```text\n{context.command_path} {' '.join(usage)}\n```",
        *_sections(command),
        *_options(command, context),
    ]


def _sections(command: click.Command) -> list[str]:
    """Return the paragraphs of a help text; one that keeps its lines (after ``\\b``) is a block of examples."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    return [_examples(text) if text.startswith("\b") else " ".join(text.split()) for text in paragraphs]


def _examples(text: str) -> str:
    title, *lines = text.removeprefix("\b").strip().splitlines()
    return f"{title}\n\n```sh\n" + "\n".join(line.strip() for line in lines) + "\n```"


def _options(command: click.Command, context: click.Context) -> list[str]:
    """Return a table of the options; the help text of one ends with its default in brackets."""
    records = [each.get_help_record(context) for each in command.get_params(context) if isinstance(each, click.Option)]
    rows = []
    for names, text in filter(None, records):
        choices, default = CHOICES.search(names), DEFAULT.search(text)
        said = html.escape(DEFAULT.sub("", text).strip(), quote=False).replace("*", "\\*").replace("|", "&#124;")
        if choices:
            said += f" One of {', '.join(f'`{each}`' for each in choices[1].split('|'))}."
        rows.append(f"| `{CHOICES.sub('', names)}` | {said.strip()} | {f'`{default[1]}`' if default else ''} |")
    return ["\n".join(["| option | what it does | default |", "|---|---|---|", *rows])]
