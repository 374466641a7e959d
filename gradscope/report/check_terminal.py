"""A check in a terminal: the verdict, every finding once, and at the end a table of what was run."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradscope.findings import SEVERITIES
from gradscope.report.page import Page, counted
from gradscope.report.standing import counts_of
from gradscope.session import Session

COLOURS = {"flows": "green", "partial": "yellow", "blocked": "red", "crashes": "red"}


def render(session: Session, console: Console, *, full: bool = False) -> None:
    """Print the session of a check; ``full`` shows notes and what a baseline knows as well."""
    _CheckPage(session, console).show(full)


class _CheckPage(Page):
    def show(self, full: bool) -> None:
        self._verdict()
        for finding in self.unfolded(full):
            if full or finding.severity != "note":
                self.finding(finding)
        self.folded(full)
        notes = sum(finding.severity == "note" for finding in self.unfolded(full))
        if notes and not full:
            self.console.print()
            self.print(f"{counted(notes, 'note')} {'is' if notes == 1 else 'are'} not shown: -v.")
        self.bullets("Remarks", self.session.remarks if full else ())
        self.bullets("What could not be analysed", self.session.unseen)
        self.console.print()
        self.console.print(self._table())

    def _verdict(self) -> None:
        session = self.session
        found = Counter(finding.severity for finding in session.findings if finding.counts)
        said = ", ".join(counted(found[each], each) for each in SEVERITIES)
        failed = sum(bool(run["failure"]) for run in session.runs)
        tail = f"; {failed} of {len(session.runs)} targets could not be analysed" if failed else ""
        colour, sign = ("red", "blocked") if found["error"] else ("yellow", "maybe")
        if not found["error"] and not found["warning"] and not session.unseen:
            colour, sign = "green", "yes"
        self.console.print(Text(f"{self.sign(sign)} {said}", style=f"bold {colour}").append(tail), highlight=False)
        what = counted(len(session.runs), "target")
        self.print(f"  {session.target['name']}: {what} in {session.stats.get('seconds', 0)} s")
        self.standing()

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold bright_black")
        table.add_column("")
        table.add_column("target", overflow="fold")
        table.add_column("verdict")
        for title in ("errors", "warnings", "expected", "known", "seconds"):
            table.add_column(title, justify="right")
        for run in self.session.runs:
            table.add_row(*self._row(run))
        return table

    def _row(self, run: dict[str, Any]) -> list[str | Text]:
        counts = counts_of(self.session, run)
        failed = bool(run["failure"])
        sign = "blocked" if counts["error"] else "maybe" if failed or counts["warning"] else "yes"
        colour = {"blocked": "red", "maybe": "yellow", "yes": "green"}[sign]
        verdict = run["verdict"] or "not analysed"
        return [
            Text(self.sign(sign), style=colour),
            self.plain(run["name"]),
            Text(verdict, style=COLOURS.get(verdict, "yellow")),
            *(["-"] * 4 if failed else (str(counts[each]) for each in ("error", "warning", "expected", "unchanged"))),
            f"{run['seconds']:.1f}",
        ]
