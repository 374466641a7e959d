"""What a project expects of its models: which sources the gradient reaches, and which it is meant not to reach.

An intended cut, such as a teacher's detach, is declared in the configuration and not silenced: the findings that it
explains are marked as expected, and where it is not so any more, that is a finding itself (GS801).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from gradscope.findings import Excerpt, Finding, Source, listed, matches
from gradscope.rules import rule_name
from gradscope.session import Session

RULE = "GS801"
# What a status has to be for each key. No gradient arrives where there is no useful derivative either.
MET_BY = {
    "flows": {"flows"},
    "blocked": {"blocked", "nondifferentiable"},
    "partial": {"partial"},
    "unused": {"unused"},
}


@dataclass(frozen=True, slots=True)
class Run:
    """A trace that the configuration asks for; a field is named as the option of `gradscope trace` is."""

    target: str = ""
    model: str = ""
    entry: str | None = None
    input: tuple[str, ...] = ()
    wrt: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    loss: str | None = None
    mode: str = "auto"
    device: str = "auto"
    dtype: str | None = None
    weights: str | None = None
    head: bool = False
    fixed: bool = False
    numeric: bool = False
    verify: bool = True
    seed: int = 0

    @property
    def name(self) -> str:
        """Return what the session of this run is named after."""
        return self.target or self.model


@dataclass(frozen=True, slots=True)
class Place:
    """A line of the configuration file."""

    path: str
    line: int
    excerpt: Excerpt | None = None

    @property
    def source(self) -> str:
        """Return the text of the line; empty where it could not be found."""
        return self.excerpt.lines[self.line - self.excerpt.first].strip() if self.excerpt else ""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What is declared of the sources of one run: patterns by key of ``MET_BY``, and the line of each key."""

    run: Run
    patterns: dict[str, tuple[str, ...]]
    place: Place
    reason: str = ""
    places: dict[str, Place] = field(default_factory=dict)

    def is_about(self, session: Session) -> bool:
        """Tell whether a session is a trace of this target, through this entry where one is named."""
        target = session.target
        entry = self.run.entry
        return session.kind == "trace" and target.get("name") == self.run.name and entry in (None, target.get("entry"))

    def stops(self, source: str) -> bool:
        """Tell whether the gradient is declared not to reach a source, or not as a whole."""
        return any(matches(source, patterns) for key, patterns in self.patterns.items() if key != "flows")

    def names(self, source: str) -> bool:
        """Tell whether anything is declared of a source."""
        return any(matches(source, patterns) for patterns in self.patterns.values())


def judge(session: Session, expectations: Iterable[Expectation]) -> Session:
    """Return the session in which what is expected is marked, and what does not hold is a finding."""
    mine = [each for each in expectations if each.is_about(session)]
    if not mine:
        return session
    findings = [_marked(finding, session, mine) for finding in session.findings if finding.rule != RULE]
    unmet = [finding for each in mine for finding in _unmet(each, session, mine)]
    taken = max((int(finding.id.removeprefix("F")) for finding in findings), default=0)
    findings += [dataclasses.replace(each, id=f"F{taken + number}") for number, each in enumerate(unmet, start=1)]
    return dataclasses.replace(session, findings=findings)


def _marked(finding: Finding, session: Session, expectations: Sequence[Expectation]) -> Finding:
    """Mark a finding where every source that it costs the gradient is declared to go without.

    An input that nobody asked about and no pattern names goes along: it feeds the teacher, say, and loses that path
    by the very cut that is declared.
    """
    if session.verdict == "crashes":
        return finding
    named = [name for name in finding.cuts if not _incidental(name, session, expectations)]
    by = next((each for each in expectations if named and each.stops(named[0])), None)
    if by is None or not all(any(each.stops(name) for each in expectations) for name in named):
        return finding
    why = f": {by.reason.rstrip('.')}." if by.reason else "."
    return dataclasses.replace(finding, state="expected", fix=f"Declared in {by.place.path}:{by.place.line}{why}")


def _incidental(name: str, session: Session, expectations: Sequence[Expectation]) -> bool:
    source = session.sources.get(name)
    is_input = source is not None and source.kind == "input"
    return is_input and not session.target.get("wrt") and not any(each.names(name) for each in expectations)


def _unmet(expectation: Expectation, session: Session, all_of_them: Sequence[Expectation]) -> Iterator[Finding]:
    asked = session.target.get("wrt")
    for key, patterns in expectation.patterns.items():
        for pattern in patterns:
            meant = [source for source in session.sources.values() if matches(source.name, (pattern,))]
            if not meant:
                if not asked or asked == list(expectation.run.wrt):
                    yield _finding(expectation, key, f"{pattern!r} matches no source.", _known(session))
                continue
            if key == "flows":  # flows = ["*"] may have its exceptions
                meant = [each for each in meant if not any(other.stops(each.name) for other in all_of_them)]
            wrong = [source for source in meant if source.status not in MET_BY[key]]
            if wrong:
                said = f"{_sources(wrong)} declared as {key} ({pattern!r}) and {_statuses(wrong)}."
                fix = "Mend the model, or declare what is meant."
                yield _finding(expectation, key, said, fix, tuple(source.name for source in wrong))


def _finding(expectation: Expectation, key: str, message: str, fix: str, cuts: tuple[str, ...] = ()) -> Finding:
    place = expectation.places.get(key, expectation.place)
    return Finding(
        id="", rule=RULE, name=rule_name(RULE), severity="error", message=message, path=place.path, line=place.line,
        function=f"{expectation.run.name} {key}", mechanism=message, how="expectation", cuts=cuts, fix=fix,
        source=place.source, excerpt=place.excerpt,
    )  # fmt: skip


def _sources(sources: Sequence[Source]) -> str:
    return f"{listed([source.name for source in sources])} {'is' if len(sources) == 1 else 'are'}"


def _statuses(sources: Sequence[Source]) -> str:
    statuses = list(dict.fromkeys(source.status for source in sources))
    if statuses == ["flows"]:
        return "the gradient flows"
    counts = [f"{sum(source.status == status for source in sources)} {status}" for status in statuses]
    return f"found {statuses[0]}" if len(statuses) == 1 else f"found {', '.join(counts)}"


def _known(session: Session) -> str:
    """Name the beginnings of the source names there are."""
    beginnings = list(dict.fromkeys(name.split(".")[0] for name in session.sources))
    return f"There are: {', '.join(f'{each}.*' for each in beginnings[:8])}."
