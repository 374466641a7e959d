"""SARIF: valid by the official schema, and what GitHub code scanning asks for beyond it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import validators
from real import REAL, detected, scanned, traced

from gradscope.errors import UsageError
from gradscope.findings import Finding
from gradscope.flow import FlowEdge, FlowGraph, FlowNode
from gradscope.report import sarif
from gradscope.report.places import uri_of
from gradscope.rules import RULES
from gradscope.session import Session

# As OASIS publishes it: https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "sarif-schema-2.1.0.json").read_text(encoding="utf-8"))
VALIDATOR = validators.validator_for(SCHEMA)(SCHEMA)


def log(*sessions: Session) -> dict[str, Any]:
    """Write the sessions as SARIF, and judge them by the schema."""
    data: dict[str, Any] = json.loads(sarif.render_several(sessions))
    assert [error.message for error in VALIDATOR.iter_errors(data)] == []
    return data


def results(session: Session) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = log(session)["runs"][0]["results"]
    return found


def place(location: dict[str, Any]) -> tuple[str, int]:
    physical = location["physicalLocation"]
    return physical["artifactLocation"]["uri"], physical["region"]["startLine"]


def finding(number: int = 1, severity: str = "error", **fields: Any) -> Finding:
    given = {"message": "said", "path": "m.py", "line": 12} | fields
    return Finding(f"F{number}", "GS201", "detach", severity, **given)  # type: ignore[arg-type]


def session(*findings: Finding, **fields: Any) -> Session:
    return Session("trace", "blocked", findings=list(findings), target={"name": "m", "entry": "forward"}, **fields)


@pytest.mark.parametrize("name", REAL)
def test_real_sessions_are_valid_and_say_what_the_session_says(name: str) -> None:
    real = REAL[name]()
    run = log(real)["runs"][0]
    assert [(r["ruleId"], r["level"], *place(r["locations"][0])) for r in run["results"]] == [
        (f.rule, f.severity, f.path, f.line) for f in sorted(real.findings, key=lambda f: f.severity)
    ]
    for result in run["results"]:
        rule = run["tool"]["driver"]["rules"][result["ruleIndex"]]
        assert rule["id"] == result["ruleId"]
        said = real.finding(result["properties"]["id"])
        assert result["message"]["text"].startswith(said.message) and said.fix in result["message"]["text"]


def test_the_schema_refuses_what_is_no_sarif() -> None:
    data = json.loads(sarif.render(scanned()))
    data["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["region"]["startLine"] = 0
    data["runs"][0]["results"][0]["suppression"] = []
    assert len(list(VALIDATOR.iter_errors(data))) == 2


def test_a_trace_shows_the_way_from_the_output_to_each_cut() -> None:
    real = traced()
    for result in results(real):
        steps = [step["location"] for step in result["codeFlows"][0]["threadFlows"][0]["locations"]]
        assert steps[0]["message"]["text"] == "output.0"
        assert place(steps[-1]) == place(result["locations"][0])
    hidden = next(f for f in real.findings if f.behind)
    outer = real.finding(hidden.behind or "")
    ways = [result["codeFlows"] for result in results(real) if result["properties"]["id"] == hidden.id]
    assert (outer.path, outer.line) in [place(s["location"]) for s in ways[0][0]["threadFlows"][0]["locations"]]


def test_the_way_leaves_the_cut_where_the_gradient_is_lost() -> None:
    (result,) = results(detected())
    steps = [s["location"]["message"]["text"] for s in result["codeFlows"][0]["threadFlows"][0]["locations"]]
    # The proposals go on to the heads; the losses of the proposal network itself keep their gradient.
    assert [step.partition(" ")[0] for step in steps] == ["output.0", "roi_heads", "rpn", "GS201"]


def test_a_scan_shows_the_calls_from_each_entry_to_the_cut() -> None:
    real = scanned()
    inner = next(f for f in real.findings if f.function.endswith("_forward_core"))
    (result,) = [each for each in results(real) if each["properties"]["id"] == inner.id]
    firsts = []
    for flow in result["codeFlows"]:
        steps = [step["location"] for step in flow["threadFlows"][0]["locations"]]
        firsts.append(steps[0]["message"]["text"])
        assert place(steps[-1]) == (inner.path, inner.line)
    assert firsts == [entry["function"] for entry in real.entries if inner.id in entry["findings"]]


def test_what_lies_behind_points_at_what_hides_it() -> None:
    outer, inner = results(traced())[:2]
    assert place(inner["relatedLocations"][0]) == place(outer["locations"][0])
    assert place(outer["relatedLocations"][0]) == place(inner["locations"][0])
    assert f"]({inner['relatedLocations'][0]['id']})" in inner["message"]["text"]


def test_every_rule_has_its_page_and_a_link() -> None:
    rules = [Finding("F1", code, name, "error", "said", "m.py", 1) for code, name in RULES.items()]
    shown = log(session(*rules))["runs"][0]["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in shown] == sorted(RULES)
    for rule in shown:
        assert rule["helpUri"].startswith("https://") and "## What to do" in rule["help"]["markdown"]
        assert len(rule["properties"]["tags"]) <= 10
        assert 20 < len(rule["shortDescription"]["text"]) < len(rule["fullDescription"]["text"]) <= 1024


def test_states_become_baseline_and_suppressions_for_all_results_or_none() -> None:
    plain = results(session(finding(1), finding(2)))
    assert not any("suppressions" in each or "baselineState" in each for each in plain)
    told = results(session(finding(1, state="new"), finding(2, state="unchanged"), finding(3, state="expected")))
    assert [each["baselineState"] for each in told] == ["new", "unchanged", "unchanged"]
    assert [len(each["suppressions"]) for each in told] == [0, 0, 1]


def test_like_findings_have_fingerprints_of_their_own() -> None:
    first, second = results(session(finding(1, source="y = x.detach()"), finding(2, source="y = x.detach()", line=20)))
    name = "gradscope/v1"
    assert second["partialFingerprints"][name] == f"{first['partialFingerprints'][name]}:2"


def test_a_finding_without_a_file_is_placed_where_its_module_is() -> None:
    nodes = [FlowNode("n1", "a", "module", module="a", path="x.py", line=3),
             FlowNode("n2", "b", "module", module="b", path="y.py", line=4)]  # fmt: skip
    nowhere = finding(1, path="", line=0, module="b")
    assert place(results(session(nowhere, graph=FlowGraph(nodes)))[0]["locations"][0]) == ("y.py", 4)
    assert place(results(session(nowhere))[0]["locations"][0]) == ("m", 1)
    assert place(results(session(nowhere, finding(2)))[0]["locations"][0]) == ("m.py", 12)
    assert place(results(session(dataclasses.replace(nowhere, path="<string>", line=7)))[0]["locations"][0]) == ("m", 1)


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("a b/ü#1.py", "a%20b/%C3%BC%231.py"),
        ("a\\b.py", "a/b.py"),
        ("odd:name.py", "odd%3Aname.py"),
        ("/abs/a b.py", "file:///abs/a%20b.py"),
        ("C:\\x\\a b.py", "file:///C:/x/a%20b.py"),
    ],
)
def test_paths_become_uris(path: str, uri: str) -> None:
    assert uri_of(path) == uri
    (result,) = results(session(finding(path=path)))
    base = result["locations"][0]["physicalLocation"]["artifactLocation"].get("uriBaseId")
    assert base == (None if uri.startswith("file:") else "%SRCROOT%")


def test_what_github_takes_is_not_exceeded_and_the_gravest_stay() -> None:
    most = [finding(n, "note", line=n + 1) for n in range(25_010)] + [finding(30_000, "error")]
    data = json.loads(sarif.render(session(*most)))
    shown = data["runs"][0]["results"]
    assert len(shown) == 25_000 and shown[0]["level"] == "error"
    notes = data["runs"][0]["invocations"][0]["toolExecutionNotifications"]
    assert any("11 more findings" in note["message"]["text"] for note in notes)


def test_long_texts_many_neighbours_and_long_ways_are_cut() -> None:
    chain = [FlowNode("output.0", "output.0", "output")]
    chain += [FlowNode(f"n{i}", f"n{i}", "operation", path="m.py", line=i + 1) for i in range(3000)]
    edges = [FlowEdge(later.id, earlier.id) for earlier, later in itertools.pairwise(chain)]
    cut = finding(1, line=3000, message="long. " * 1000, fix="Do this. " * 100)
    behind = [finding(n, behind="F1") for n in range(2, 150)]
    first = results(session(cut, *behind, graph=FlowGraph(chain, edges)))[0]
    steps = first["codeFlows"][0]["threadFlows"][0]["locations"]
    assert len(steps) == 1000
    assert place(steps[-1]["location"]) == ("m.py", 3000) and steps[0]["location"]["message"]["text"] == "output.0"
    assert len(first["message"]["text"]) <= 1024 and "Do this." in first["message"]["text"]
    assert len(first["relatedLocations"]) + 1 <= 1000


def test_brackets_in_a_message_are_no_link() -> None:
    (result,) = results(session(finding(message="self.heads[0](x) ends it")))
    assert "](" not in result["message"]["text"]


def test_what_was_not_seen_is_told_and_an_unread_file_is_no_success() -> None:
    trace = log(session(unseen=["2 operations were taken as one"]))["runs"][0]["invocations"][0]
    assert trace["executionSuccessful"]
    assert trace["toolExecutionNotifications"][0]["message"]["text"] == "2 operations were taken as one"
    scan = Session("scan", "flows", target={"name": "m"}, unseen=["broken.py: no Python"])
    assert not log(scan)["runs"][0]["invocations"][0]["executionSuccessful"]


def test_several_runs_have_names_of_their_own() -> None:
    data = log(session(), session(), scanned())
    names = [run["automationDetails"]["id"] for run in data["runs"]]
    assert len(set(names)) == 3 and all(name.endswith("/") for name in names)
    with pytest.raises(UsageError, match="20 runs"):
        sarif.render_several([session()] * 21)
