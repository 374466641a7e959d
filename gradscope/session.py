"""The session: one finished analysis, saved as JSON (schema ``gradscope.session/1``) and read back."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from gradscope.errors import UsageError
from gradscope.findings import SEVERITIES, Finding, Severity, Source, State
from gradscope.flow import FlowGraph
from gradscope.paths import write_whole
from gradscope.schema import complaint

SCHEMA = "gradscope.session/1"
# The gravest first: several sessions are as good as the worst of them.
VERDICTS = ("crashes", "blocked", "partial", "flows")
# Reports know sessions and not the other way round; what shows one is found by name when it is asked for.
SHOWN_BY = "gradscope.report.showing"


@dataclass(frozen=True, slots=True)
class Remedy:
    """The shortest way out that is known: what was, what is, and the lines of code between."""

    before: str
    after: str
    code: str

    def to_dict(self) -> dict[str, str]:
        """Return the remedy as in ``gradscope.session/1``."""
        return {"before": self.before, "after": self.after, "code": self.code}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a baseline says of a session: where it lies, and how many of its findings are gone.

    How many are new and how many unchanged the states of the findings tell.
    """

    path: str
    fixed: int


@dataclass(slots=True, repr=False)
class Session:
    """What one run of gradscope found; immutable by convention once returned.

    ``verdict`` is ``flows``, ``partial``, ``blocked`` or ``crashes``. ``remarks`` tell what was
    assumed or done for the run (random weights, parameters unfrozen), ``unseen`` what could not
    be looked into. ``healed`` is the graph of the run in which the fix set was taken away and the gradient
    arrived, where there was one. A scan has no sources and no graph; its ``entries`` say for public methods
    whether a gradient gets through (``function``, ``status``, ``chain``, ``findings``). ``baseline`` is there
    where the findings were held beside one. A check has the findings of its ``runs``, each with its name, kind,
    verdict, the ids of its findings, how many sources have which status, and why it could not be analysed.
    """

    kind: str
    verdict: str
    tool: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    fix_set: list[str] = field(default_factory=list)
    fix_verified: bool = False
    graph: FlowGraph = field(default_factory=FlowGraph)
    healed: FlowGraph | None = None
    crash: dict[str, Any] | None = None
    remedy: Remedy | None = None
    remarks: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    baseline: Comparison | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        """Return the session in a line."""
        what = f"{len(self.sources)} sources" if self.sources else f"{len(self.entries)} entries"
        counts = f"{what}, {len(self.findings)} findings"
        return f"<Session {self.kind} {self.target.get('name', '')}: {self.verdict}, {counts}>"

    def __rich__(self) -> Any:
        """Return what rich prints: the report of the command line."""
        return import_module(SHOWN_BY).as_text(self)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the report of the command line, in colour."""
        html: str = import_module(SHOWN_BY).as_html(self)
        return html

    def finding(self, finding_id: str) -> Finding:
        """Return the finding with this id; raise ``KeyError`` where there is none."""
        for finding in self.findings:
            if finding.id == finding_id:
                return finding
        raise KeyError(finding_id)

    @property
    def in_doubt(self) -> bool:
        """Tell whether the answer hangs on what could not be seen: files unread, or a result with no known origin."""
        if self.kind == "check":
            return any(run["in_doubt"] for run in self.runs)
        return bool(self.unseen) and (self.kind == "scan" or self.is_idle)

    @property
    def is_idle(self) -> bool:
        """Tell whether the result depends on nothing that was asked about: no gradient is lost, and none arrives."""
        return bool(self.sources) and self.count("unused") == len(self.sources)

    def count(self, status: str) -> int:
        """Return how many sources have this status."""
        return sum(source.status == status for source in self.sources.values())

    def count_state(self, state: State) -> int:
        """Return how many findings have this state."""
        return sum(finding.state == state for finding in self.findings)

    def worst(self) -> Severity | None:
        """Return the gravest severity among the findings."""
        present = {finding.severity for finding in self.findings}
        return next((severity for severity in SEVERITIES if severity in present), None)

    def without_source(self) -> Session:
        """Return the session without a line of anybody's source: for reports that leave the house."""
        findings = [dataclasses.replace(each, source="", excerpt=None) for each in self.findings]
        healed = self.healed.without_source() if self.healed is not None else None
        return dataclasses.replace(self, findings=findings, graph=self.graph.without_source(), healed=healed)

    def to_dict(self) -> dict[str, Any]:
        """Return the session as JSON-ready data."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "tool": dict(self.tool),
            "environment": dict(self.environment),
            "target": dict(self.target),
            "verdict": self.verdict,
            "sources": [source.to_dict() for source in self.sources.values()],
            "findings": [finding.to_dict() for finding in self.findings],
            "fix_set": list(self.fix_set),
            "fix_verified": self.fix_verified,
            "graph": self.graph.to_dict(),
            "healed": self.healed.to_dict() if self.healed is not None else None,
            "crash": self.crash,
            "remedy": self.remedy.to_dict() if self.remedy else None,
            "remarks": list(self.remarks),
            "unseen": list(self.unseen),
            "entries": [dict(entry) for entry in self.entries],
            "stats": dict(self.stats),
            "baseline": self._beside_baseline(),
            "runs": [dict(run) for run in self.runs],
        }

    def _beside_baseline(self) -> dict[str, Any] | None:
        if self.baseline is None:
            return None
        counts = {"new": self.count_state("new"), "unchanged": self.count_state("unchanged")}
        return {"path": self.baseline.path, **counts, "fixed": self.baseline.fixed}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Session:
        """Read a session back, whoever wrote it.

        Raises:
            UsageError: it has another schema, or it is damaged; the message names the field.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = f"its schema is {data.get('schema')!r}" if isinstance(data, dict) else "it is not a JSON object"
            raise UsageError(
                f"This is not a {SCHEMA} session: {found}.",
                hint="Save one with `gradscope trace ... -o session.json`.",
            )
        wrong = complaint(data) or _dangling(data)
        if wrong:
            raise UsageError(
                f"The session is damaged: {wrong}.",
                hint="Make it anew, or read it with the version of gradscope that wrote it.",
            )
        return cls.restored(data)

    @classmethod
    def restored(cls, data: dict[str, Any]) -> Session:
        """Read back what :meth:`to_dict` of this very version gave, unseen (looking at it takes ten times as long)."""
        sources = {entry["name"]: Source.from_dict(entry) for entry in data["sources"]}
        return cls(
            kind=data["kind"],
            verdict=data["verdict"],
            tool=data["tool"],
            environment=data["environment"],
            target=data["target"],
            sources=sources,
            findings=[Finding.from_dict(entry) for entry in data["findings"]],
            fix_set=data["fix_set"],
            fix_verified=data["fix_verified"],
            graph=FlowGraph.from_dict(data["graph"]),
            healed=FlowGraph.from_dict(data["healed"]) if data.get("healed") else None,
            crash=data.get("crash"),
            remedy=Remedy(**data["remedy"]) if data.get("remedy") else None,
            remarks=data.get("remarks", []),
            unseen=data.get("unseen", []),
            entries=data.get("entries", []),
            stats=data.get("stats", {}),
            baseline=Comparison(data["baseline"]["path"], data["baseline"]["fixed"]) if data.get("baseline") else None,
            runs=data.get("runs", []),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session as JSON, whole or not at all."""
        write_whole(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Session:
        """Read a saved session; raise :class:`UsageError` where the file is not one."""
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise UsageError(f"Cannot read a session from {path}: {error.strerror or error}.") from error
        return cls.loads(text, os.fspath(path))

    @classmethod
    def loads(cls, text: bytes, name: str) -> Session:
        """Read a session from JSON text; raise :class:`UsageError`, with the name, where it is none."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"Cannot read a session from {name}: it is no JSON ({error}).") from error
        try:
            return cls.from_dict(data)
        except UsageError as error:
            raise UsageError(f"Cannot read a session from {name}: {error.message}", hint=error.hint) from error


def _dangling(data: dict[str, Any]) -> str:
    """Return the first name in a session that names nothing; empty where there is none."""
    ids = {finding["id"] for finding in data["findings"]}
    named = [("fix_set", each) for each in data["fix_set"]]
    named += [(f"findings[{n}].behind", each.get("behind")) for n, each in enumerate(data["findings"])]
    for graph in ("graph", "healed"):
        drawn = {"nodes": [], "edges": [], **(data.get(graph) or {})}
        nodes: set[str] = set()
        for number, node in enumerate(drawn["nodes"]):
            if node.get("parent") is not None and node["parent"] not in nodes:
                return f"{graph}.nodes[{number}].parent is {node['parent']!r}, and no node before it has this id"
            nodes.add(node["id"])
            named.append((f"{graph}.nodes[{number}].finding", node.get("finding")))
        for number, edge in enumerate(drawn["edges"]):
            lost = next((each for each in (edge["from"], edge["to"]) if each not in nodes), None)
            if lost is not None:
                return f"{graph}.edges[{number}] names the node {lost!r}, which is not there"
    return next((f"{where} is {name!r}, and no finding has this id" for where, name in named
                 if name is not None and name not in ids), "")  # fmt: skip
