"""Findings as SARIF 2.1.0, for GitHub code scanning and everything else that reads it.

Format: https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/sarif-v2.1.0-errata01-os-complete.html
Limits: https://docs.github.com/en/code-security/reference/code-scanning/sarif-files/troubleshoot-sarif-uploads
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from gradscope.errors import UsageError
from gradscope.findings import Finding
from gradscope.report.places import gravest_first, numbered_fingerprints, place_of, uri_of
from gradscope.report.ways import Step, ways_to
from gradscope.rules import load_rule_page, rule_family, rule_name
from gradscope.session import Session

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
# What GitHub takes at most: it refuses a file with more (and shows the 5,000 gravest results).
MOST_RUNS = 20
MOST_RESULTS = 25_000
MOST_LOCATIONS = 1_000
# What GitHub shows at most.
MOST_RELATED = 100
MOST_STEPS = 1_000
LONGEST_TEXT = 1_024
# Rules of these families say what an error cannot be; all others are errors unless the finding says otherwise.
FAMILY_LEVELS = {"GS7": "warning", "GS9": "note"}

Json = dict[str, Any]


def render(session: Session, *, full: bool = False) -> str:
    """Return the session as a SARIF log with one run."""
    return render_several([session], full=full)


def render_several(sessions: Sequence[Session], *, full: bool = False) -> str:
    """Return the sessions as one SARIF log, a run for each.

    Raises:
        UsageError: there are more than GitHub takes in one file.
    """
    if len(sessions) > MOST_RUNS:
        raise UsageError(
            f"A SARIF file may hold {MOST_RUNS} runs, and {len(sessions)} sessions were given.",
            hint="Write several files.",
        )
    runs = [_run(session) for session in sessions]
    # GitHub tells runs apart by this name, and refuses two of one name in a file.
    names: dict[str, int] = {}
    for run in runs:
        name = run["automationDetails"]["id"]
        names[name] = count = names.get(name, 0) + 1
        if count > 1:
            run["automationDetails"]["id"] = f"{name.rstrip('/')}-{count}/"
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": runs}, indent=1) + "\n"


# --- the parts -------------------------------------------------------------------------------------


def _run(session: Session) -> Json:
    findings = gravest_first(session.findings)[:MOST_RESULTS]
    rules = sorted({finding.rule for finding in findings})
    target = "/".join(str(session.target[key]) for key in ("name", "entry") if session.target.get(key))
    return {
        "tool": {
            "driver": {
                "name": "gradscope",
                "semanticVersion": session.tool.get("version", "0.0.0"),
                "rules": [_rule(code) for code in rules],
            }
        },
        "automationDetails": {"id": f"gradscope/{session.kind}/{target}/"},
        "columnKind": "unicodeCodePoints",
        "originalUriBaseIds": {"%SRCROOT%": {"description": {"text": "The folder that gradscope was run in."}}},
        "invocations": [_invocation(session)],
        "results": _results(session, findings, rules),
        "properties": {"verdict": session.verdict, "target": session.target, "environment": session.environment},
    }


def _rule(code: str) -> Json:
    """Return a rule with its whole page; its link is the page's first reference."""
    page = load_rule_page(code)
    title, short, *_ = page.split("\n\n")
    why = page.partition("## Why the gradient stops\n\n")[2].partition("\n\n## ")[0]
    reference = re.search(r"## References.*?(https://[^)\s]+)", page, flags=re.DOTALL)
    level = FAMILY_LEVELS.get(code[:3], "error")
    rule = {
        "id": code,
        "name": rule_name(code),
        "shortDescription": {"text": _one_line(short)},
        "fullDescription": {"text": _clipped(f"{_one_line(short)} {_one_line(why)}".strip())},
        "help": {"text": page, "markdown": page.removeprefix(title).lstrip()},
        "defaultConfiguration": {"level": level},
        "properties": {
            "tags": ["pytorch", "autograd", rule_family(code).lower().replace(",", "").replace(" ", "-")],
            "problem.severity": "recommendation" if level == "note" else level,
        },
    }
    return rule | ({"helpUri": reference.group(1)} if reference else {})


def _invocation(session: Session) -> Json:
    """Say whether everything was read, and what was not; a scan that skipped files is no success."""
    incomplete = bool(session.unseen) if session.kind == "scan" else any(run["failure"] for run in session.runs)
    notes = [_notification(text, "warning" if incomplete else "note") for text in session.unseen]
    notes += [_notification(text, "note") for text in session.remarks]
    if session.crash is not None:
        crash = session.crash
        notes.append(_notification(f"{crash['exception']}: {crash['message']}", "error"))
    over = len(session.findings) - MOST_RESULTS
    if over > 0:
        notes.append(_notification(f"{over} more findings are left out: a file may hold {MOST_RESULTS}.", "warning"))
    return {"executionSuccessful": not incomplete, "toolExecutionNotifications": notes}


def _notification(text: str, level: str) -> Json:
    return {"level": level, "message": {"text": _clipped(_plain(text))}}


def _results(session: Session, findings: list[Finding], rules: list[str]) -> list[Json]:
    """Return the results; what the standard wants for all results of a run or for none is given to all."""
    results = []
    suppressing = any(finding.state == "expected" for finding in findings)
    compared = any(finding.state in ("new", "unchanged") for finding in findings)
    near = _neighbours(session)
    for finding, fingerprint in zip(findings, numbered_fingerprints(findings), strict=True):
        result = _result(session, finding, fingerprint, near.get(finding.id, []))
        result["ruleIndex"] = rules.index(finding.rule)
        if suppressing:
            expected = {"kind": "external", "status": "accepted", "justification": "Declared as expected."}
            result["suppressions"] = [expected] if finding.state == "expected" else []
        if compared:
            result["baselineState"] = "new" if finding.state in ("new", "") else "unchanged"
        results.append(result)
    return results


def _result(session: Session, finding: Finding, fingerprint: str, near: list[tuple[str, Finding]]) -> Json:
    result: Json = {
        "ruleId": finding.rule,
        "level": finding.severity,
        "message": _message(finding),
        "locations": [_location(session, finding)],
        "partialFingerprints": {"gradscope/v1": fingerprint},
        "properties": {
            "id": finding.id,
            "confidence": finding.confidence,
            "mechanism": finding.mechanism,
            "verified": finding.verified,
            "sources": len(finding.cuts),
        },
    }
    if near:
        result["relatedLocations"] = [
            {**_location(session, other), "id": number, "message": {"text": text}}
            for number, (text, other) in enumerate(near[:MOST_RELATED], 1)
        ]
        result["message"]["text"] += f" [{_plain(near[0][0])}](1)"
    flows = [{"threadFlows": [{"locations": _flow(way)}]} for way in ways_to(session, finding)[: MOST_RELATED // 10]]
    if flows:
        result["codeFlows"] = flows
    return result


def _message(finding: Finding) -> Json:
    """Return what is wrong and what to do; GitHub shows the text, others the Markdown with the fix set apart."""
    said, fix = _plain(finding.message), _plain(finding.fix)
    room = LONGEST_TEXT - len(fix) - 200  # for the fix, and for the link that may follow
    text = f"{_clipped(said, max(room, 200))} {_clipped(fix, LONGEST_TEXT - 400)}".strip()
    return {"text": text, "markdown": said + (f"\n\n**Fix:** {fix}" if fix else "")}


def _location(session: Session, finding: Finding) -> Json:
    path, line = place_of(session, finding)
    region: Json = {"startLine": line}
    own = (path, line) == (finding.path, finding.line)
    if own:
        region["startColumn"] = max(1, finding.column)
        region["endLine"] = max(line, finding.end_line)
    if own and finding.source:
        region["snippet"] = {"text": finding.source}
    physical = _physical(path, region)
    if own and finding.excerpt is not None:
        lines = finding.excerpt.lines
        end = finding.excerpt.first + len(lines) - 1
        physical["contextRegion"] = {"startLine": finding.excerpt.first, "endLine": end,
                                     "snippet": {"text": "\n".join(lines)}}  # fmt: skip
    location: Json = {"physicalLocation": physical}
    logical = [("function", finding.function), ("member", finding.module)]
    names = [{"fullyQualifiedName": name, "name": name.rpartition(".")[2], "kind": kind} for kind, name in logical
             if name]  # fmt: skip
    return location | ({"logicalLocations": names} if names else {})


def _physical(path: str, region: Json) -> Json:
    uri = uri_of(path)
    relative = {} if uri.startswith("file:") else {"uriBaseId": "%SRCROOT%"}
    return {"artifactLocation": {"uri": uri, **relative}, "region": region}


def _neighbours(session: Session) -> dict[str, list[tuple[str, Finding]]]:
    """Return by id the finding that hides one, and those that it hides, each with words for the link."""
    by_id = {finding.id: finding for finding in session.findings}
    near: dict[str, list[tuple[str, Finding]]] = {}
    for finding in session.findings:
        hiding = by_id.get(finding.behind or "")
        if hiding is not None:
            near.setdefault(finding.id, []).append((f"Hidden by {hiding.id} {hiding.name}", hiding))
            near.setdefault(hiding.id, []).append((f"Behind it: {finding.id} {finding.name}", finding))
    return near


def _flow(way: list[Step]) -> list[Json]:
    """Return the steps of a way; of one that is too long the beginning and the end."""
    if len(way) > MOST_STEPS:
        way = way[: MOST_STEPS // 2] + way[-MOST_STEPS // 2 :]
    steps = []
    for number, step in enumerate(way, 1):
        location: Json = {"physicalLocation": _physical(step.path, {"startLine": step.line}),
                    "message": {"text": _plain(step.label)}}  # fmt: skip
        if step.name:
            location["logicalLocations"] = [{"fullyQualifiedName": step.name}]
        importance = "essential" if number in (1, len(way)) else "important"
        steps.append({"location": location, "nestingLevel": step.depth, "importance": importance})
    return steps


def _one_line(text: str) -> str:
    return _clipped(re.sub(r"[`*]", "", " ".join(text.split())))


def _plain(text: str) -> str:
    """Keep what looks like a link from being one: in messages, ``[text](number)`` points at a location."""
    return text.replace("](", "] (")


def _clipped(text: str, most: int = LONGEST_TEXT) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
