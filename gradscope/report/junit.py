"""A session as JUnit XML, for the test tab of a CI server: a case for each source, entry, or run of a check.

A case fails where the gate would: an error that no baseline knows and no configuration expects. What is merely
warned about passes, and is told in the case's output.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from junitparser import Attr, Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from gradscope.findings import Finding, Source
from gradscope.report.places import gravest_first
from gradscope.session import Session

# A list that is longer is no list to read: sources are then told by the module they lie in.
MOST_CASES = 200
MOST_GROUPS = 100
MOST_NAMES = 20
LOST = ("blocked", "nondifferentiable", "wrong")
NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class _Case(TestCase):  # type: ignore[misc]  # junitparser's way to add attributes
    """A test case with its file, which GitLab links to."""

    file = Attr()
    line = Attr()


def render(session: Session, *, full: bool = False) -> str:
    """Return the session as JUnit XML with one suite."""
    return render_several([session], full=full)


def render_several(sessions: Sequence[Session], *, full: bool = False) -> str:
    """Return the sessions as one JUnit XML, a suite for each; ``full`` gives each source a case of its own."""
    xml = JUnitXml("gradscope")
    names: Counter[str] = Counter()
    for session in sessions:
        suite = _Suite(session)
        names[suite.name] += 1
        number = names[suite.name]
        xml.append(suite.build(f"{suite.name} ({number})" if number > 1 else suite.name, full))
    xml.update_statistics()
    text: bytes = xml.tostring()
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text.decode("utf-8")}\n'


# --- the parts -------------------------------------------------------------------------------------


class _Suite:
    def __init__(self, session: Session) -> None:
        self.session = session
        target = ".".join(str(session.target[key]) for key in ("name", "entry") if session.target.get(key))
        self.name = f"gradscope {session.kind} {target}".strip()
        self.owner = f"gradscope.{target}"
        self.told: set[str] = set()
        self.findings = {finding.id: finding for finding in gravest_first(session.findings)}

    def build(self, name: str, full: bool) -> TestSuite:
        """Return the suite; every error of the session is in a case of it."""
        suite = TestSuite(_xml(name))
        facts = {"verdict": self.session.verdict, **self.session.tool, **self.session.environment}
        for key, value in facts.items():
            suite.add_property(key, _xml(str(value)))
        run = [self._run()] if self.session.kind != "check" else []
        made = {"scan": self._entries, "check": self._runs}
        cases = made[self.session.kind]() if self.session.kind in made else self._sources(full)
        cases += [self._case(self.owner, f"{each.rule} {each.name} {each.path}:{each.line}", [each])
                  for each in self.findings.values() if _counts(each) and each.id not in self.told]  # fmt: skip
        rest = [each for each in self.findings.values() if each.severity == "warning" and each.id not in self.told]
        if rest:
            cases.append(self._case(self.owner, "warnings", rest))
        suite.add_testcases([*run, *cases])
        return suite

    def _run(self) -> TestCase:
        """The case that is always there: the files could be read, the model runs."""
        scan, crash = self.session.kind == "scan", self.session.crash
        case = _Case("every file is read" if scan else "autograd accepts the run", _xml(self.owner))
        case.time = float(self.session.stats.get("seconds", 0))
        if scan and self.session.unseen:
            case.result = [Error(_xml(f"{len(self.session.unseen)} could not be read"), "not-analysed")]
            case.result[0].text = _xml("\n".join(self.session.unseen))
        elif crash is not None:
            guilty = [each for each in self.findings.values() if _counts(each)]
            self.told |= {each.id for each in guilty}
            case.result = [Failure(_xml(f"{crash['exception']}: {crash['message']}"), _xml(crash["exception"]))]
            case.result[0].text = _xml("\n\n".join(map(in_full, guilty)))
        notes = [*self.session.remarks, *([] if scan else self.session.unseen)]
        if notes:
            case.system_out = _xml("\n".join(notes))
        return case

    def _sources(self, full: bool) -> list[TestCase]:
        sources = list(self.session.sources.values())
        groups: dict[str, list[Source]] = {each.name: [each] for each in sources}
        if len(sources) > MOST_CASES and not full:
            groups = _grouped(sources)
        return [self._source_case(name, group) for name, group in groups.items()]

    def _source_case(self, name: str, group: list[Source]) -> TestCase:
        ids = dict.fromkeys(finding_id for source in group for finding_id in source.findings)
        findings = [self.findings[each] for each in ids if each in self.findings]
        lost = any(source.status in LOST for source in group)
        case = self._case(self.owner, name, findings, lost=lost, about=_about(group))
        if all(source.status == "unused" for source in group):
            case.result = [Skipped("unused: the result does not depend on it")]
        return case

    def _entries(self) -> list[TestCase]:
        cases = []
        for entry in self.session.entries:
            findings = [self.findings[each] for each in entry["findings"] if each in self.findings]
            name = entry["function"].removeprefix(f"{entry['class']}.")
            chain = " -> ".join(step["function"] for step in entry["chain"])
            about = f"{entry['status']}: {chain}" if chain else entry["status"]
            if entry["clean"]:
                about += f"\nclean inside it, call these to keep the gradient: {', '.join(entry['clean'])}"
            cases.append(self._case(f"{entry['module']}.{entry['class']}", name, findings, about=about))
        return cases

    def _runs(self) -> list[TestCase]:
        """The runs of a check: each fails by what it found, and is an error where it could not be analysed."""
        cases = []
        for run in self.session.runs:
            findings = [self.findings[each] for each in run["findings"] if each in self.findings]
            case = self._case(f"gradscope.{run['kind']}", run["name"], findings, about=run["verdict"] or "")
            case.time = float(run.get("seconds", 0))
            if run["failure"]:
                case.result = [Error(_xml(run["failure"]), "not-analysed")]
            cases.append(case)
        return cases

    def _case(
        self, owner: str, name: str, findings: Sequence[Finding], *, lost: bool = True, about: str = ""
    ) -> TestCase:
        """Return a case that fails if one of its findings counts and a gradient is lost."""
        case = _Case(_xml(name), _xml(owner))
        if findings:
            case.file, case.line = _xml(findings[0].path), str(findings[0].line)
        guilty = [each for each in findings if _counts(each)] if lost else []
        said = "\n\n".join([about, *map(in_full, guilty or findings)]).strip()
        if guilty:
            case.result = [Failure(_xml(f"{_head(guilty[0])}: {guilty[0].message}"), guilty[0].rule)]
            case.result[0].text = _xml(said)
            self.told |= {each.id for each in guilty}
        elif said:
            case.system_out = _xml(said)
            self.told |= {each.id for each in findings if not _counts(each)}
        return case


def _counts(finding: Finding) -> bool:
    return finding.severity == "error" and finding.counts


def _about(group: list[Source]) -> str:
    """Return what became of some sources: the status of one, or how many have which and the names of the lost."""
    if len(group) == 1:
        return group[0].status + (" (frozen, which blocks nothing)" if group[0].frozen else "")
    counts = Counter(source.status for source in group)
    said = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    lost = [source.name for source in group if source.status in LOST]
    more = [f"... {len(lost) - MOST_NAMES} more"] if len(lost) > MOST_NAMES else []
    return "\n".join([f"{len(group)} sources: {said}", *lost[:MOST_NAMES], *more])


def _grouped(sources: Iterable[Source]) -> dict[str, list[Source]]:
    """Return the sources by module, as deep as stays readable: by name alone, so that cases keep their names."""
    groups: dict[str, list[Source]] = {}
    for depth in range(1, 12):
        finer: dict[str, list[Source]] = {}
        for source in sources:
            parts = source.name.split(".")
            whole = source.kind == "input" or len(parts) <= depth
            finer.setdefault(source.name if whole else f"{'.'.join(parts[:depth])}.*", []).append(source)
        if depth > 1 and len(finer) > MOST_GROUPS:
            break
        groups = finer
    return groups


def _head(finding: Finding) -> str:
    return f"{finding.rule} {finding.name} at {finding.path}:{finding.line}"


def in_full(finding: Finding) -> str:
    """Return a finding as plain text: where, the lines around, why, and what to do."""
    lines = [f"{finding.id} {_head(finding)}" + (f", behind {finding.behind}" if finding.behind else "")]
    if finding.state in ("unchanged", "expected"):
        lines.append({"unchanged": "(known to the baseline)", "expected": "(expected)"}[finding.state])
    if finding.excerpt is not None:
        for number, text in enumerate(finding.excerpt.lines, finding.excerpt.first):
            lines.append(f"{'>' if number == finding.line else ' '} {number:5} {text}")
    elif finding.source:
        lines.append(f"> {finding.line:5} {finding.source}")
    return "\n".join([*lines, finding.message, *([f"Fix: {finding.fix}"] if finding.fix else [])])


def _xml(text: str) -> str:
    """Replace what no XML may hold, such as the form feeds of old source files."""
    return NOT_IN_XML.sub("?", text)
