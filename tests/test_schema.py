"""The JSON Schema of sessions: real ones follow it, damaged ones do not, and reading one says what is wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from torch import nn

import gradscope
from gradscope import schema
from gradscope.errors import UsageError
from gradscope.session import Session

SCHEMA = json.loads(schema.text())
VALIDATOR = Draft202012Validator(SCHEMA)


class Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.first(x)
        return self.second(features)


class Refused(nn.Module):
    """Autograd refuses to save what inference mode made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            features = self.first(x)
        return self.second(features)


def sessions() -> dict[str, Session]:
    given = torch.randn(3, 4)
    return {
        "structural": gradscope.trace(Cut(), given, mode="structural"),
        "real": gradscope.trace(Cut(), given, mode="real"),
        "numeric": gradscope.trace(Cut(), given, mode="real", numeric=True),
        "crash": gradscope.trace(Refused(), given, mode="real"),
        "scan": gradscope.scan("deepseek_ocr_encoder", cache=False),
    }


@pytest.fixture(scope="module")
def examples() -> dict[str, dict[str, Any]]:
    made = {name: json.loads(json.dumps(session.to_dict())) for name, session in sessions().items()}
    assert made["crash"]["crash"] and made["real"]["healed"]
    assert any("gradient" in source for source in made["real"]["sources"])
    return made


def test_the_schema_is_one_and_says_what_each_part_is() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    objects = [SCHEMA, *SCHEMA["$defs"].values()]
    assert all(each["additionalProperties"] is False and each["description"] for each in objects)


def test_real_sessions_follow_it(examples: dict[str, dict[str, Any]]) -> None:
    for data in examples.values():
        assert [error.message for error in VALIDATOR.iter_errors(data)] == []


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container in some data with each key in it."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield data, key
        if isinstance(value, (dict, list)):
            yield from places(value)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_is_found_where_the_official_validator_finds_it(
    examples: dict[str, dict[str, Any]], data: st.DataObject
) -> None:
    damaged = copy.deepcopy(examples[data.draw(st.sampled_from(sorted(examples)))])
    spots = list(places(damaged))
    for _ in range(data.draw(st.integers(1, 2))):
        container, key = spots[data.draw(st.integers(0, len(spots) - 1))]
        new = data.draw(st.sampled_from([None, True, -1, 0, 1.0, 1.5, "", "x", "flows", [], {}, ["x"], {"x": 1}]))
        how = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "add" and isinstance(container, dict):
            container["unheard_of"] = new
        elif how == "remove" and isinstance(container, dict):
            container.pop(key, None)
        elif how == "replace":
            container[key] = new
    assert bool(schema.complaint(damaged)) == (not VALIDATOR.is_valid(damaged))
    try:
        Session.from_dict(damaged)
    except UsageError as error:
        assert "\n" not in error.message  # anything else that is raised fails the test


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: d["findings"][0].pop("rule"), "findings[0] lacks 'rule'"),
        (lambda d: d["findings"][0].update(line="12"), 'findings[0].line must be an integer, and is "12"'),
        (lambda d: d["findings"][0].update(line=-1), "findings[0].line must be 0 or more, and is -1"),
        (lambda d: d.update(verdict="fine"), 'verdict must be "flows" or "partial" or "blocked" or'),
        (lambda d: d["graph"].update(colour="red"), "graph has 'colour', which this version of"),
        (lambda d: d["graph"]["edges"][0].update({"from": "n"}), "graph.edges[0] names the node 'n', which"),
        (lambda d: d["graph"]["nodes"][0].update(parent="n"), "graph.nodes[0].parent is 'n', and no node before"),
        (lambda d: d.update(fix_set=["F9"]), "fix_set is 'F9', and no finding has this id"),
        (lambda d: d["healed"]["nodes"].append(3), "must be an object, and is 3"),
        (lambda d: d.pop("graph"), "the session lacks 'graph'"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_told_by_its_field(
    examples: dict[str, dict[str, Any]], damage: Any, said: str, tmp_path: Path
) -> None:
    data = copy.deepcopy(examples["real"])
    damage(data)
    (tmp_path / "s.json").write_text(json.dumps(data))
    with pytest.raises(UsageError) as caught:
        Session.load(tmp_path / "s.json")
    assert said in caught.value.message and str(tmp_path / "s.json") in caught.value.message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is no JSON"), (b"\xff\xfe{", "it is no JSON"), (b"[" * 100_000, "it is no JSON"),
        (b"[]", "it is not a JSON object"), (b"{}", "its schema is None"),
        (b'{"schema": "x/2"}', "its schema is 'x/2'"),
    ],
)  # fmt: skip
def test_what_is_no_session_is_refused_in_a_sentence(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        Session.load(tmp_path / "s.json")
    assert "\n" not in caught.value.message
    with pytest.raises(UsageError, match="Cannot read a session"):
        Session.load(tmp_path)
