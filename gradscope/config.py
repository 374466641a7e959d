"""``[tool.gradscope]`` of a pyproject.toml: found, read, checked against the schema that ships, and made into values.

Precedence is the command line's: default, file, environment (``GRADSCOPE_*``), option.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from gradscope.errors import UsageError
from gradscope.expectations import MET_BY, Expectation, Place, Run
from gradscope.findings import Excerpt
from gradscope.paths import short_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "pyproject.toml"
TABLE = "tool.gradscope"
TYPES: dict[str, tuple[type, str]] = {
    "string": (str, "a string"), "integer": (int, "a whole number"), "boolean": (bool, "true or false"),
    "array": (list, "a list"), "object": (dict, "a table"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Config:
    """What a project configures; ``options`` are those that commands also take, by the names of their parameters."""

    path: Path | None = None
    options: tuple[tuple[str, Any], ...] = ()
    targets: tuple[str, ...] = ()
    traces: tuple[Run, ...] = ()
    expectations: tuple[Expectation, ...] = ()

    @property
    def folder(self) -> Path:
        """Return the folder that everything in the file is relative to."""
        return self.path.parent if self.path is not None else Path()


def load_config(path: Path | None = None, *, start: Path | None = None) -> Config:
    """Read the file named, or the nearest pyproject.toml upward from ``start`` that has the table.

    Raises:
        UsageError: the file named has no such table, is no TOML, or says something that is not understood.
    """
    if path is not None:
        table = _table(path)
        if table is None:
            raise UsageError(f"{path} has no [{TABLE}] table.", hint="See docs/ci.md for what it may hold.")
        return _config(path, table)
    home = (start or Path()).resolve()
    for folder in (home, *home.parents):
        candidate = folder / FILE
        if candidate.is_file():
            shown = Path(os.path.relpath(candidate))
            table = _table(shown)
            if table is not None:
                return _config(shown, table)
    return Config()


@cache
def schema() -> dict[str, Any]:
    """Return the JSON Schema of the table, as SchemaStore and validate-pyproject take it."""
    text = resources.files("gradscope.schema").joinpath("partial-gradscope.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def _table(path: Path) -> dict[str, Any] | None:
    try:
        text = path.read_text(encoding="utf-8")
        if "gradscope" not in text:  # another project's file, whatever state it is in
            return None
        tools = tomllib.loads(text).get("tool", {})
        table: dict[str, Any] | None = tools.get("gradscope") if isinstance(tools, dict) else None
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise UsageError(f"{path} is no valid TOML: {error}.") from error
    if table is not None:
        _check(table, schema(), str(path), f"[{TABLE}]")
    return table


def _config(path: Path, table: dict[str, Any]) -> Config:
    lines = path.read_text(encoding="utf-8").splitlines()
    shown = short_path(str(path))
    per_file = [f"{pattern}:{','.join(rules)}" for pattern, rules in table.get("per-file-ignores", {}).items()]
    options: dict[str, Any] = {key: table[key] for key in ("select", "ignore") if key in table}
    if "fail-on" in table:
        options["fail_on"] = table["fail-on"]
    if per_file:
        options["per_file"] = per_file
    if "baseline" in table:
        options["baseline"] = str(path.parent / table["baseline"])
    expected = table.get("expect", [])
    starts = _starts(lines, len(expected))
    return Config(
        path,
        tuple(options.items()),
        tuple(table.get("targets", ())),
        tuple(_run(each, f"{shown}: [[{TABLE}.trace]]") for each in table.get("trace", [])),
        tuple(_expectation(each, lines, line, shown) for each, line in zip(expected, starts, strict=True)),
    )


def _run(table: dict[str, Any], where: str) -> Run:
    if ("target" in table) == ("model" in table):
        raise UsageError(f"{where} has to name one thing to trace.", hint="Give it either target or model.")
    known = {each.name for each in fields(Run)}
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key in known
    }
    return Run(**values)


def _expectation(table: dict[str, Any], lines: list[str], start: int, path: str) -> Expectation:
    where = f"{path}:{start}: [[{TABLE}.expect]]"
    patterns = {key: tuple(table[key]) for key in MET_BY if key in table}
    if not patterns:
        raise UsageError(f"{where} expects nothing.", hint=f"Give it one of {', '.join(MET_BY)}.")
    end = next((at for at in range(start, len(lines)) if lines[at].lstrip().startswith("[")), len(lines))
    places = {
        key: _place(path, lines, at + 1)
        for key in patterns
        for at in range(start, end)
        if re.match(rf"\s*[\"']?{key}[\"']?\s*=", lines[at])
    }
    return Expectation(_run(table, where), patterns, _place(path, lines, start), table.get("reason", ""), places)


def _place(path: str, lines: list[str], line: int) -> Place:
    return Place(path, line, Excerpt.around(lines, line))


def _starts(lines: list[str], wanted: int) -> list[int]:
    """Return the line at which each expectation begins; TOML parsers do not tell.

    Where the headers are not as many (an inline list, say), it is the line of the table for all.
    """
    header = re.compile(r"\s*\[\[\s*tool\s*\.\s*gradscope\s*\.\s*expect\s*\]\]")
    found = [number for number, line in enumerate(lines, start=1) if header.match(line)]
    if len(found) == wanted:
        return found
    first = next((number for number, line in enumerate(lines, start=1) if TABLE in line), 1)
    return [first] * wanted


# --- the schema --------------------------------------------------------------------------------------
# Only as much of JSON Schema as the file that ships uses: the message should name the key as its writer knows it.


def _check(value: Any, rule: dict[str, Any], path: str, where: str) -> None:
    """Raise UsageError where a value is not what the schema says."""
    if "$ref" in rule:
        rule = schema()["definitions"][rule["$ref"].rpartition("/")[2]]
    kind, words = TYPES[rule["type"]]
    if type(value) is not kind:
        raise UsageError(f"{path}: {where} has to be {words}, not {value!r}.")
    if "enum" in rule and value not in rule["enum"]:
        raise UsageError(f"{path}: {where} is {value!r}.", hint=f"Use one of {', '.join(rule['enum'])}.")
    if len(value) < rule.get("minItems", 0) if isinstance(value, list) else False:
        raise UsageError(f"{path}: {where} is empty.")
    if isinstance(value, list):
        for number, item in enumerate(value, start=1):
            _check(item, rule["items"], path, f"{where}, item {number}" if len(value) > 1 else where)
    elif isinstance(value, dict):
        _check_keys(value, rule, path, where)


def _check_keys(table: dict[str, Any], rule: dict[str, Any], path: str, where: str) -> None:
    known = rule.get("properties", {})
    for key, value in table.items():
        if key in known:
            _check(value, known[key], path, f"{key} in {where}")
        elif rule.get("additionalProperties"):
            _check(value, rule["additionalProperties"], path, f"{key!r} in {where}")
        else:
            near = difflib.get_close_matches(key.replace("_", "-"), known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"It may have: {', '.join(known)}."
            raise UsageError(f"{path}: {where} has no key {key!r}.", hint=hint)
