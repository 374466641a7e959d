"""Several traces as one session, so that every format can show a whole run: the traces of a test suite."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from gradscope.findings import SEVERITIES, Finding, Source
from gradscope.flow import FlowEdge, FlowGraph, FlowNode, FlowStatus
from gradscope.session import VERDICTS, Session


def gathered(traces: Iterable[tuple[str, Session]]) -> Session:
    """Return named traces as one session; a single one stays as it is.

    ``stats["traces"]`` says for each its name, its verdict and its findings. Where there are several, sources and
    findings are told apart by the name of their trace, and each graph hangs below a node of that name.

    Raises:
        ValueError: there is none.
    """
    named = _told_apart(traces)
    if len(named) == 1:
        ((name, session),) = named.items()
        return dataclasses.replace(session, stats={**session.stats, "traces": [_entry(name, session, {})]})
    if not named:
        raise ValueError("no trace to gather")
    parts = [_Part(name, session) for name, session in named.items()]
    return _union(parts, _number(parts))


class _Part:
    """One session among several: ``ids`` renames its findings."""

    def __init__(self, name: str, session: Session) -> None:
        self.name = name
        self.session = session
        self.ids: dict[str, str] = {}

    def source_name(self, source: str) -> str:
        return f"{self.name}: {source}"

    def sources(self) -> dict[str, Source]:
        found = {}
        for source in self.session.sources.values():
            name = self.source_name(source.name)
            found[name] = dataclasses.replace(source, name=name, findings=[self.ids[each] for each in source.findings])
        return found

    def finding(self, finding: Finding) -> Finding:
        return dataclasses.replace(
            finding,
            id=self.ids[finding.id],
            behind=self.ids[finding.behind] if finding.behind else None,
            cuts=tuple(map(self.source_name, finding.cuts)),
        )

    def graph(self, graph: FlowGraph, number: int, status: FlowStatus) -> FlowGraph:
        prefix = f"t{number}"
        top = FlowNode(prefix, self.name, "module", status, type=str(self.session.target.get("name", "")))
        below = [
            dataclasses.replace(
                node,
                id=f"{prefix}.{node.id}",
                parent=f"{prefix}.{node.parent}" if node.parent else prefix,
                finding=self.ids.get(node.finding, node.finding) if node.finding else None,
            )
            for node in graph.nodes
        ]
        edges = [FlowEdge(f"{prefix}.{e.source}", f"{prefix}.{e.target}", e.status) for e in graph.edges]
        return FlowGraph([top, *below], edges)


def _told_apart(traces: Iterable[tuple[str, Session]]) -> dict[str, Session]:
    """Return the sessions by name; a name that comes again gets a number."""
    named: dict[str, Session] = {}
    seen: Counter[str] = Counter()
    for name, session in traces:
        seen[name] += 1
        named[name if seen[name] == 1 else f"{name} #{seen[name]}"] = session
    return named


def _number(parts: list[_Part]) -> list[Finding]:
    """Number the findings anew, the grave ones first, and return them; the same place in several traces is one."""
    every = [(part, finding) for part in parts for finding in part.session.findings]
    every.sort(key=lambda each: SEVERITIES.index(each[1].severity))
    places: dict[tuple[object, ...], str] = {}
    for part, each in every:
        place = (each.severity, each.state, each.rule, each.path, each.line, each.function)
        part.ids[each.id] = places.setdefault(place, f"F{len(places) + 1}")
    union: dict[str, Finding] = {}
    for part, each in every:
        new = part.finding(each)
        seen = union.get(new.id)
        union[new.id] = _both(seen, new) if seen else new
    return list(union.values())


def _both(one: Finding, other: Finding) -> Finding:
    cuts = dict.fromkeys((*one.cuts, *other.cuts))
    return dataclasses.replace(one, cuts=tuple(cuts), verified=one.verified and other.verified)


def _union(parts: list[_Part], findings: list[Finding]) -> Session:
    sessions = [part.session for part in parts]
    fixed = [session for session in sessions if session.fix_set]
    return Session(
        kind="trace",
        verdict=min((session.verdict for session in sessions), key=VERDICTS.index),
        tool=sessions[0].tool,
        environment=sessions[0].environment,
        target=_target(sessions),
        sources={name: source for part in parts for name, source in part.sources().items()},
        findings=findings,
        fix_set=list(dict.fromkeys(part.ids[each] for part in parts for each in part.session.fix_set)),
        fix_verified=bool(fixed) and all(session.fix_verified for session in fixed),
        graph=_graphs((part, part.session.graph, _status(part.session)) for part in parts),
        healed=_graphs((part, part.session.healed or part.session.graph, "flows") for part in parts)
        if any(session.healed for session in sessions)
        else None,
        crash=next((session.crash for session in sessions if session.crash), None),
        remarks=list(dict.fromkeys(each for session in sessions for each in session.remarks)),
        unseen=list(dict.fromkeys(each for session in sessions for each in session.unseen)),
        stats={
            "seconds": round(sum(session.stats.get("seconds", 0) for session in sessions), 2),
            "runs": sum(session.stats.get("runs", 1) for session in sessions),
            "operations": sum(session.stats.get("operations", 0) for session in sessions),
            "traces": [_entry(part.name, part.session, part.ids) for part in parts],
        },
    )


def _entry(name: str, session: Session, ids: Mapping[str, str]) -> dict[str, Any]:
    findings = [ids.get(each.id, each.id) for each in session.findings]
    return {"name": name, "target": session.target.get("name", ""), "verdict": session.verdict, "findings": findings}


def _target(sessions: list[Session]) -> dict[str, Any]:
    """Say what was traced: the number of traces, and of each property what all of them share."""
    shared = {
        key: values[0] if len(set(values)) == 1 else "several"
        for key in ("mode", "device", "dtype")
        if (values := [str(session.target.get(key, "")) for session in sessions])
    }
    return {"name": f"{len(sessions)} traces", "entry": "", "inputs": [], **shared}


def _graphs(drawn: Iterable[tuple[_Part, FlowGraph, FlowStatus]]) -> FlowGraph:
    graphs = [part.graph(graph, number, status) for number, (part, graph, status) in enumerate(drawn, start=1)]
    return FlowGraph([n for graph in graphs for n in graph.nodes], [e for graph in graphs for e in graph.edges])


def _status(session: Session) -> FlowStatus:
    return "flows" if session.verdict in ("flows", "partial") else "blocked"
