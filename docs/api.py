"""The reference of the Python API, from the signatures and docstrings of what ``gradscope`` exports."""

from __future__ import annotations

import dataclasses
import html
import inspect
import re
from typing import Any

import gradscope

INTRODUCTION = """\
# Python

All that `import gradscope` offers. The names are loaded on first use, so that the import costs no torch.
What the options mean is told under [Trace](trace.md) and [Scan](scan.md), what the fields of a session and of a finding
hold under [The session](session.md)."""
HEADINGS = {"Args:": "Arguments", "Raises:": "Raises"}
ITEM = re.compile(r"^(\S.*?): (.*)")


def pages() -> dict[str, str]:
    """Return the page by its path in the site's folder."""
    exported = {name: getattr(gradscope, name) for name in gradscope.__all__}
    functions = {name: each for name, each in exported.items() if not inspect.isclass(each)}
    classes = {name: each for name, each in exported.items() if inspect.isclass(each)}
    parts = [INTRODUCTION]
    for name, function in functions.items():
        parts += [f"## gradscope.{name}", signature(name, function), *docstring(function)]
    for name, each in classes.items():
        shown = [fields(each)] if dataclasses.is_dataclass(each) else []
        parts += [f"## gradscope.{name}", *docstring(each), *shown, *methods(name, each)]
    return {"api.md": "\n\n".join(parts) + "\n"}


def signature(name: str, function: Any) -> str:
    """Return a signature as a block of code, one parameter a line where it is long."""
    shown = inspect.signature(function)
    written = _parameters(shown)
    text = f"{name}({', '.join(written)}) -> {shown.return_annotation}"
    if len(text) > 90:
        text = f"{name}(\n" + "".join(f"    {each},\n" for each in written) + f") -> {shown.return_annotation}"
    return f"```text\n{text}\n```"


def _parameters(shown: inspect.Signature) -> list[str]:
    """Return the parameters as they are written, with the star that makes the rest keywords."""
    written, starred = [], False
    for each in shown.parameters.values():
        if each.kind is each.KEYWORD_ONLY and not starred:
            written.append("*")
        starred |= each.kind in (each.VAR_POSITIONAL, each.KEYWORD_ONLY)
        stars = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        annotation = "" if each.annotation is each.empty else f": {each.annotation}"
        default = "" if each.default is each.empty else f" = {each.default!r}"
        written.append(f"{stars}{each.name}{annotation}{default}")
    return written


def docstring(documented: Any) -> list[str]:
    """Return a docstring as Markdown: its paragraphs, and its sections as lists."""
    parts = []
    for paragraph in inspect.cleandoc(documented.__doc__ or "").split("\n\n"):
        first, _, rest = paragraph.partition("\n")
        text = _items(rest) if first in HEADINGS else " ".join(paragraph.split())
        parts.append(_markup(f"**{HEADINGS[first]}**\n\n{text}" if first in HEADINGS else text))
    return parts


def _items(section: str) -> str:
    """Return the items of a section; lines that are set further in belong to the item above."""
    items: list[str] = []
    for line in inspect.cleandoc(section).splitlines():
        item = ITEM.match(line)
        if item and not line.startswith(" "):
            items.append(f"- `{item[1]}`: {item[2]}")
        else:
            items[-1] += " " + line.strip()
    return "\n".join(items)


def _markup(text: str) -> str:
    """Turn what Sphinx understands into Markdown."""
    return re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", text).replace("``", "`")


def fields(described: Any) -> str:
    """Return the fields of a dataclass as a table; a bar in a code span of a table would end the cell."""
    types = [html.escape(str(each.type)).replace("|", "&#124;") for each in dataclasses.fields(described)]
    names = [each.name for each in dataclasses.fields(described)]
    rows = [f"| `{name}` | <code>{written}</code> |" for name, written in zip(names, types, strict=True)]
    return "\n".join(["| field | type |", "|---|---|", *rows])


def methods(name: str, described: Any) -> list[str]:
    """Return the public methods of a class."""
    parts = []
    for method, raw in vars(described).items():
        if not method.startswith("_") and (inspect.isfunction(raw) or isinstance(raw, classmethod)):
            function = getattr(described, method)
            parts += [f"### {name}.{method}", signature(method, function), *docstring(function)]
    return parts
