"""``gradscope explain``: the rule catalogue, one page or the list of all; needs no torch."""

from __future__ import annotations

import json
import re

import click
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from rich.theme import Theme

from gradscope.errors import ExitCode
from gradscope.rules import RULES, find_rule, load_rule_page, rule_family

# Longer lines of prose are hard to read, however wide the terminal is.
PAGE_WIDTH = 100
# rich sets inline code on black, which is a row of blots on a light terminal.
THEME = Theme({"markdown.code": "cyan", "markdown.h2": "bold"})


@click.command("explain", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("rule", required=False)
@click.option(
    "--format",
    "fmt",
    type=click.Choice(["text", "markdown", "json"]),
    default="text",
    show_default=True,
    help="What stdout carries.",
)
@click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="auto: where a terminal shows the page.",
)
def command(rule: str | None, fmt: str, color: str) -> int:
    """Explain a rule, given by its code or its name, or list them all.

    \b
    Examples:
      gradscope explain
      gradscope explain GS101
      gradscope explain inference-mode-decorator --format markdown
    """
    code = find_rule(rule) if rule is not None else None
    if fmt == "text":
        console = _console(color)
        if code is None:
            console.print(_table())
        else:
            _print_page(load_rule_page(code), console)
    elif fmt == "markdown":
        click.echo(_markdown_list() if code is None else load_rule_page(code), nl=False)
    else:
        records = [_record(each) for each in RULES] if code is None else _record(code)
        click.echo(json.dumps(records, indent=2, ensure_ascii=False))
    return int(ExitCode.CLEAN)


def _print_page(page: str, console: Console) -> None:
    title, _, rest = page.removeprefix("# ").partition("\n")
    body, heading, references = rest.partition("## References\n")
    if console.no_color or console.color_system is None:
        body = _keep_backticks(body)
    console.print(title, style="bold", highlight=False, end="\n\n")
    console.print(Markdown(body + heading, code_theme="ansi_dark"), width=min(console.width, PAGE_WIDTH))
    console.print()
    # A URL that is broken over two lines cannot be clicked: leave the wrapping to the terminal.
    plain = re.sub(r"\[(.+?)\]\((\S+)\)", r"\1: \2", references.replace("\n  ", " ").replace("`", ""))
    items = re.sub(r"^- ", " • ", plain.strip(), flags=re.MULTILINE)
    console.print(items, markup=False, highlight=False, soft_wrap=True)


def _keep_backticks(text: str) -> str:
    """Quote every code span once more: without colours only its backticks set it off."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else re.sub(r"`([^`]+)`", r"`` `\1` ``", part) for part in parts)


def _table() -> Table:
    table = Table(title="The rules", caption="gradscope explain CODE shows the page of one.")
    for column in ("Family", "Code", "Name"):
        table.add_column(column, overflow="fold")
    shown = ""
    for code, name in RULES.items():
        family = rule_family(code)
        if shown and family != shown:
            table.add_section()
        table.add_row("" if family == shown else family, code, name)
        shown = family
    return table


def _markdown_list() -> str:
    rows = [f"| {rule_family(code)} | {code} | {name} |\n" for code, name in RULES.items()]
    return "| Family | Code | Name |\n|---|---|---|\n" + "".join(rows)


def _record(code: str) -> dict[str, str]:
    return {"code": code, "name": RULES[code], "markdown": load_rule_page(code)}


def _console(color: str) -> Console:
    if color == "always":
        return Console(force_terminal=True, theme=THEME)
    return Console(color_system=None if color == "never" else "auto", theme=THEME)
