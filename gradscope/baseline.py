"""The baseline: findings that were there before, kept in a file, so that only new ones count.

The file (schema ``gradscope.baseline/1``) is JSON with one finding per line, sorted by where it is, so that it reads,
diffs and merges like source. A finding is known again by its fingerprint: rule, qualified name of the function, and the
line of source without its blanks and its comment. So it stays the same where lines move, files are renamed, code is
indented and a comment is added; in a function of another name it is a new one. No line numbers are kept: they would
change with every edit.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradscope.errors import UsageError
from gradscope.findings import Finding, State, bare
from gradscope.paths import write_whole
from gradscope.session import Comparison, Session

SCHEMA = "gradscope.baseline/1"
START_ANEW = "Restore it from version control, or delete it and write a new one with --update-baseline."


@dataclass(frozen=True, slots=True, order=True)
class Known:
    """A line of the file: ``count`` findings of one fingerprint in one file, as seen by one target."""

    path: str
    function: str
    rule: str
    source: str
    target: str
    fingerprint: str
    count: int = 1

    @classmethod
    def of(cls, data: dict[str, Any]) -> Known:
        """Read a line back; raise ``TypeError`` or ``ValueError`` where it is none."""
        known = cls(**data)
        if type(known.count) is not int or known.count < 1:
            raise ValueError(f"count is {known.count!r}")
        wrong = [name for name in cls.__dataclass_fields__ if name != "count" and type(getattr(known, name)) is not str]
        if wrong:
            raise ValueError(f"{wrong[0]} is no text")
        return known


@dataclass(frozen=True, slots=True)
class Baseline:
    """A baseline in memory and the path it lives at."""

    path: Path
    lines: tuple[Known, ...] = ()

    @classmethod
    def load(cls, path: Path, *, may_be_missing: bool = False) -> Baseline:
        """Read a baseline.

        Raises:
            UsageError: there is none, or the file is damaged or something else.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            if may_be_missing:
                return cls(path)
            raise UsageError(
                f"There is no baseline {path}.", hint="Write it by adding --update-baseline to this command."
            ) from error
        except OSError as error:
            raise UsageError(f"Cannot read the baseline {path}: {error.strerror or error}.") from error
        except ValueError as error:
            raise UsageError(f"{path} is no baseline: it is not JSON ({error}).", hint=START_ANEW) from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise UsageError(
                f"{path} is no baseline: its schema is {schema!r}, not {SCHEMA!r}.", hint="Name another file."
            )
        try:
            return cls(path, tuple(Known.of(line) for line in data["findings"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"The baseline {path} is damaged: {error}.", hint=START_ANEW) from error

    def compared(self, session: Session) -> Session:
        """Return the session with every finding new or unchanged, and how many known ones are gone.

        Two findings of one fingerprint are told apart by their files; which of them is new where a file is
        renamed as well nobody can know. Gone are only those that this very target had: other targets are other
        places. What a configuration expects stays ``expected``.
        """
        left = self._allowed()
        states: dict[str, State] = {}
        counted = [finding for finding in session.findings if finding.state != "expected"]
        for same_file in (True, False):
            for finding in counted:
                if finding.id in states:
                    continue
                places = left.get(finding.fingerprint, Counter())
                path = _path(finding) if same_file else next(iter(+places), "")
                if places[path] > 0:
                    places[path] -= 1
                    states[finding.id] = "unchanged"
        findings = [
            finding
            if finding.state == "expected"
            else dataclasses.replace(finding, state=states.get(finding.id, "new"))
            for finding in session.findings
        ]
        return dataclasses.replace(
            session, findings=findings, baseline=Comparison(str(self.path), self.gone([session]))
        )

    def updated(self, session: Session) -> Baseline:
        """Return the baseline in which what this target had is replaced by what it has.

        Lines about files that could not be read this time stay, and so do those of other targets.
        """
        label, unread = label_of(session), _unread(session)
        kept = [line for line in self.lines if line.target != label or line.path in unread]
        found = Counter(
            Known(_path(each), each.function, each.rule, bare(each.source), label, each.fingerprint)
            for each in session.findings
            if each.state != "expected"
        )
        new = [dataclasses.replace(line, count=count) for line, count in found.items()]
        return Baseline(self.path, tuple(sorted([*kept, *new])))

    def save(self) -> None:
        """Write the file, whole or not at all."""
        lines = ",\n".join(json.dumps(dataclasses.asdict(line), ensure_ascii=False) for line in self.lines)
        text = f'{{\n"schema": "{SCHEMA}",\n"findings": [\n{lines}\n]\n}}\n'
        write_whole(self.path, text.encode())

    def _allowed(self) -> dict[str, Counter[str]]:
        """Return how often each fingerprint may occur in which file: as often as the target that saw most of it did."""
        allowed: dict[str, Counter[str]] = {}
        for line in self.lines:
            places = allowed.setdefault(line.fingerprint, Counter())
            places[line.path] = max(places[line.path], line.count)
        return allowed

    def gone(self, sessions: Iterable[Session]) -> int:
        """Return how many known findings are gone; one that several of the targets had is counted once."""
        gone = Counter[str]()
        for session in sessions:
            label, unread = label_of(session), _unread(session)
            had = Counter[str]()
            for line in self.lines:
                if line.target == label and line.path not in unread:
                    had[line.fingerprint] += line.count
            gone |= had - Counter(finding.fingerprint for finding in session.findings)
        return gone.total()

    def only_of(self, sessions: Iterable[Session]) -> Baseline:
        """Return the baseline without the lines of other targets."""
        labels = {label_of(session) for session in sessions}
        return Baseline(self.path, tuple(line for line in self.lines if line.target in labels))


def label_of(session: Session) -> str:
    """Return what was looked at, as a baseline names it: ``scan src``, ``trace pkg.model:build forward``."""
    parts = (session.kind, session.target.get("name"), session.target.get("entry"))
    return " ".join(str(part) for part in parts if part)


def _path(finding: Finding) -> str:
    return finding.path.replace("\\", "/")


def _unread(session: Session) -> set[str]:
    skipped: Iterable[dict[str, str]] = session.stats.get("skipped", ())
    return {each["path"].replace("\\", "/") for each in skipped}
