"""The gate: which findings count, and which exit code they make. The same for every command."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from gradscope.assertion import asked_in_vain
from gradscope.baseline import Baseline
from gradscope.config import Config
from gradscope.errors import ExitCode, UsageError
from gradscope.expectations import Expectation, judge
from gradscope.findings import SEVERITIES, Finding
from gradscope.rules import RULES
from gradscope.session import Session


@dataclass(frozen=True, slots=True)
class Gate:
    """What counts: rule codes chosen and left out (a prefix such as ``GS2`` is its family), and from where on.

    ``per_file`` holds ``(path pattern, code)`` pairs to leave out; ``fail_on`` is a severity or ``never``.
    What ``baseline`` knows does not count; ``update`` asks to write it anew. What ``expected`` declares of a traced
    target does not count either, and counts where it does not hold. ``root`` is what the patterns are relative to.
    """

    select: frozenset[str] = frozenset(RULES)
    ignore: frozenset[str] = frozenset()
    per_file: tuple[tuple[str, str], ...] = ()
    fail_on: str = "error"
    baseline: Baseline | None = None
    update: bool = False
    expected: tuple[Expectation, ...] = ()
    root: Path = Path()

    @classmethod
    def of(
        cls,
        select: Iterable[str] = (),
        ignore: Iterable[str] = (),
        per_file: Iterable[str] = (),
        fail_on: str = "error",
        baseline: Path | None = None,
        update: bool = False,
        config: Config | None = None,
    ) -> Gate:
        """Return the gate that options ask for; each may hold several values divided by commas.

        Raises:
            UsageError: a rule that does not exist, a per-file ignore that is no ``PATTERN:RULE``, or a baseline
                that cannot be read.
        """
        chosen = codes(select) or frozenset(RULES)
        pairs: list[tuple[str, str]] = []
        for item in per_file:
            pattern, colon, rules = item.rpartition(":")
            if not (colon and pattern):
                raise UsageError(f"{item!r} is no per-file ignore.", hint="Write PATTERN:RULE, as in 'tests/*:GS104'.")
            pairs += [(pattern, code) for code in sorted(codes([rules]))]
        if update and baseline is None:
            raise UsageError("--update-baseline needs a file to write.", hint="Name it with --baseline FILE.")
        known = Baseline.load(baseline, may_be_missing=update) if baseline is not None else None
        config = config or Config()
        return cls(chosen, codes(ignore), tuple(pairs), fail_on, known, update, config.expectations, config.folder)

    def judged(self, session: Session) -> Session:
        """Return the session as the reports show it: what is left out is gone, what is known is said to be."""
        return self.filtered(self._compared(session))

    def to_write_down(self, session: Session) -> Session:
        """Return the session as a new baseline takes it: what options leave out stays known where it was known."""
        session = self._compared(session)
        kept = [each for each in session.findings if each.state not in ("", "new") or not self.lets_through(each)]
        return dataclasses.replace(session, findings=kept)

    def lets_through(self, finding: Finding) -> bool:
        """Tell whether a finding is to be left out of the report."""
        if finding.rule not in self.select or finding.rule in self.ignore:
            return True
        if not self.per_file:
            return False
        paths = {finding.path, os.path.relpath(finding.path, self.root)}
        return any(
            code == finding.rule and (fnmatch(path, pattern) or fnmatch(path, f"*/{pattern}"))
            for pattern, code in self.per_file
            for path in (each.replace("\\", "/") for each in paths)
        )

    def filtered(self, session: Session) -> Session:
        """Return the session with the findings that count; nothing that is drawn or proposed points at others.

        The verdict follows them where it is a scan's; a trace's is what the run showed, and its sources go on naming
        what they lost their gradient to. A fix set that lacks some of its parts would be no fix: then there is none.
        """
        findings = [finding for finding in session.findings if not self.lets_through(finding)]
        if len(findings) == len(session.findings):
            return session
        kept = {finding.id for finding in findings}
        whole = kept.issuperset(session.fix_set)
        return dataclasses.replace(
            session,
            findings=[each if each.behind in kept else dataclasses.replace(each, behind=None) for each in findings],
            entries=[{**each, "findings": [x for x in each["findings"] if x in kept]} for each in session.entries],
            graph=session.graph.pointing_at(kept),
            healed=session.healed.pointing_at(kept) if session.healed is not None else None,
            fix_set=session.fix_set if whole else [],
            fix_verified=session.fix_verified and whole,
            verdict=scan_verdict(findings) if session.kind == "scan" else session.verdict,
        )

    def _compared(self, session: Session) -> Session:
        session = judge(session, self.expected)
        # What options leave out is not gone from the code: the baseline sees it all.
        return self.baseline.compared(session) if self.baseline is not None else session

    def exit_code(self, session: Session) -> ExitCode:
        """Return 1 for a finding at or above the gate, 3 where what was asked could not be seen, else 0.

        It is 1, too, where the result depends on nothing that was asked about by name: no gradient arrives there.

        What the baseline knows and what the configuration expects does not count. A check has the gravest code of
        its runs: 2 before all others, because then it did not check what it was to check.
        """
        failures = {run["failure_code"] for run in session.runs}
        if ExitCode.USAGE in failures:
            return ExitCode.USAGE
        never = self.fail_on == "never"
        grave = () if never else SEVERITIES[: SEVERITIES.index(self.fail_on) + 1]
        if any(finding.severity in grave for finding in session.findings if finding.counts):
            return ExitCode.FINDINGS
        if (session.in_doubt and not never) or ExitCode.NOT_ANALYSED in failures:
            return ExitCode.NOT_ANALYSED
        return ExitCode.FINDINGS if asked_in_vain(session) and not never else ExitCode.CLEAN


def scan_verdict(findings: Iterable[Finding]) -> str:
    """Return a scan's verdict: ``blocked`` for an error, ``partial`` for a warning, else ``flows``."""
    present = {finding.severity for finding in findings}
    return "blocked" if "error" in present else "partial" if "warning" in present else "flows"


def codes(given: Iterable[str]) -> frozenset[str]:
    """Return the rule codes that options name by code, name or family; raise UsageError for an unknown one."""
    found: set[str] = set()
    for text in given:
        for part in filter(None, (item.strip() for item in text.split(","))):
            matching = {code for code, name in RULES.items() if code.startswith(part.upper()) or name == part.lower()}
            if not matching:
                raise UsageError(f"There is no rule {part!r}.", hint="`gradscope explain` lists them all.")
            found |= matching
    return frozenset(found)
