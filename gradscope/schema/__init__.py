"""The JSON Schema of ``gradscope.session/1``, and what is wrong with a file that does not follow it.

Any validator can judge a session by the schema. Reading one asks for none: the few keywords that the schema uses are
looked at here, so that a damaged file is told by the name of the field.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),),
    "integer": (int,), "number": (int, float),
}  # fmt: skip
ARTICLES = {"object": "an object", "array": "a list", "integer": "an integer", "null": "null"}


def text() -> str:
    """Return the schema as it is shipped: JSON Schema, draft 2020-12."""
    return resources.files(__name__).joinpath("session-1.json").read_text(encoding="utf-8")


def complaint(data: object) -> str:
    """Return the first thing that is wrong with a session, by the name of its field; empty where nothing is."""
    return next(_complaints(data, _schema(), ""), "")


# --- the parts -------------------------------------------------------------------------------------


@cache
def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(text())
    return schema


def _complaints(value: object, schema: dict[str, Any], name: str) -> Iterator[str]:
    where = name or "the session"
    if "$ref" in schema:
        yield from _complaints(value, _schema()["$defs"][schema["$ref"].rpartition("/")[2]], name)
    if "anyOf" in schema:
        either = [list(_complaints(value, each, name)) for each in schema["anyOf"]]
        if all(either):
            yield either[-1][0]  # null is the first choice; what is there is meant to be the other
    allowed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if allowed is not None and value not in allowed:
        yield f"{where} must be {' or '.join(map(json.dumps, allowed))}, and is {_short(value)}"
    if "type" in schema and not _is(value, schema["type"]):
        wanted = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        words = " or ".join(ARTICLES.get(each, f"a {each}") for each in wanted)
        yield f"{where} must be {words}, and is {_short(value)}"
    else:
        yield from _inside(value, schema, name)


def _inside(value: object, schema: dict[str, Any], name: str) -> Iterator[str]:
    if isinstance(value, dict):
        yield from _in_object(value, schema, name)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _complaints(item, schema.get("items", {}), f"{name}[{number}]")
    elif "minimum" in schema and isinstance(value, (int, float)) and value < schema["minimum"]:
        yield f"{name} must be {schema['minimum']} or more, and is {value}"


def _in_object(value: dict[str, Any], schema: dict[str, Any], name: str) -> Iterator[str]:
    fields, rest = schema.get("properties", {}), schema.get("additionalProperties", {})
    for key in schema.get("required", ()):
        if key not in value:
            yield f"{name or 'the session'} lacks {key!r}"
    for key, item in value.items():
        if key in fields or rest is not False:
            yield from _complaints(item, fields.get(key, rest), f"{name}.{key}".lstrip("."))
        else:
            yield f"{name or 'the session'} has {key!r}, which this version of gradscope does not know"


def _is(value: object, wanted: str | list[str]) -> bool:
    if not isinstance(wanted, str):
        return any(_is(value, each) for each in wanted)
    if isinstance(value, bool):
        return wanted == "boolean"  # which Python counts among the integers
    return isinstance(value, TYPES[wanted]) or (wanted == "integer" and isinstance(value, float) and value.is_integer())


def _short(value: object) -> str:
    shown = json.dumps(value, default=str)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"
