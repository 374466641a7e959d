"""A scan in a terminal: the verdict, then class by class its entries, the lines that stop them, the way out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.text import Text

from gradscope.findings import SEVERITIES, Finding
from gradscope.report.page import Page
from gradscope.session import Session

MOST_WARNINGS = 20
VERDICTS = {
    "blocked": ("red", "blocked", "gradients are stopped where training would need them"),
    "partial": ("yellow", "maybe", "no certain break, but look at the warnings"),
    "flows": ("green", "yes", "no place stops a gradient that somebody would miss"),
}
STATUS_COLOURS = {"blocked": "red", "inference-only": "yellow", "clean": "green"}
STATUS_SIGNS = {"blocked": "blocked", "inference-only": "maybe", "clean": "yes"}


def render(session: Session, console: Console, *, full: bool = False) -> None:
    """Print the session of a scan; ``full`` shows every warning and note as well."""
    _ScanPage(session, console).show(full)


class _ScanPage(Page):
    def show(self, full: bool) -> None:
        self._verdict()
        shown: set[str] = set()
        for entries in self._groups(full):
            shown |= self._class(entries, full, shown)
        rest = [each for each in self.unfolded(full) if each.id not in shown]
        self._findings([each for each in rest if each.severity == "error"], len(rest))
        self._findings([each for each in rest if each.severity == "warning"], len(rest) if full else MOST_WARNINGS)
        notes = [each for each in rest if each.severity == "note"]
        if full:
            self._findings(notes, len(notes))
        elif notes:
            self.console.print()
            self.print(
                f"{len(notes)} notes are not shown (places that stop a gradient on purpose or without harm): -v."
            )
        self.folded(full)
        self.bullets("Remarks", self.session.remarks)
        self.bullets("What could not be read", self.session.unseen)

    # --- sections ---------------------------------------------------------------------------

    def _verdict(self) -> None:
        session = self.session
        colour, sign, words = VERDICTS[session.verdict]
        counts = Counter(finding.severity for finding in session.findings)
        said = ", ".join(_count(counts[severity], severity) for severity in SEVERITIES)
        unread = f"; {_count(len(session.unseen), 'file')} could not" if session.unseen else ""
        if not session.findings:
            said = "nothing found" + (" in what could be read" if unread else "")
            words = "" if unread else words
        if unread and not counts["error"]:
            colour, sign = "yellow", "maybe"
        head = Text(f"{self.sign(sign)} {said}", style=f"bold {colour}")
        self.console.print(head.append(unread, style="bold"), Text(words and f" {words}"), highlight=False)
        stats = session.stats
        name = session.target.get("name", "")
        entry = f", entry {session.target['entry']}" if session.target.get("entry") else ""
        files = _count(stats.get("files", 0), "file")
        self.print(f"  {name}{entry}: {files} in {stats.get('seconds', 0)} s, nothing imported or run")
        self.beside_baseline()

    def _groups(self, full: bool) -> list[list[dict[str, Any]]]:
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for entry in self.session.entries:
            groups.setdefault((entry["module"], entry["class"]), []).append(entry)
        asked = bool(self.session.target.get("entry"))
        errors = {finding.id for finding in self.unfolded(full) if finding.severity == "error"}
        return [group for group in groups.values() if asked or errors & _ids(group)]

    def _class(self, entries: list[dict[str, Any]], full: bool, shown: set[str]) -> set[str]:
        self.console.print()
        self.console.print(Text(entries[0]["class"], style="bold"), Text(entries[0]["module"], style="bright_black"))
        for entry in entries:
            self._entry(entry)
        alternatives = [entry["function"].rpartition(".")[2] for entry in entries if entry["status"] == "clean"]
        if entries[0]["clean"]:
            clean = ", ".join(entries[0]["clean"])
            self.print(f"  {self.sign('yes')} clean inside it, call these to keep the gradient: {clean}", style="green")
        elif alternatives and any(entry["chain"] for entry in entries):
            self.print(f"  {self.sign('yes')} keeps the gradient: {', '.join(alternatives)}", style="green")
        owner = f"{entries[0]['class']}."
        ids = [finding_id for entry in entries for finding_id in entry["findings"]]
        own = [
            finding for finding in self.unfolded(full)
            if finding.id in ids or (finding.severity == "error" and finding.function.startswith(owner)
                                     and finding.path == self._path(entries))
        ]  # fmt: skip
        new = [finding for finding in own if finding.id not in shown and (full or finding.severity != "note")]
        self._findings(new, len(new))
        again = [finding.id for finding in own if finding.id in shown]
        if again:
            self.print(f"  stopped by {', '.join(again)}, shown above", style="bright_black")
        return {finding.id for finding in own}

    def _path(self, entries: list[dict[str, Any]]) -> str:
        return next((entry["chain"][0]["path"] for entry in entries if entry["chain"]), "")

    def _entry(self, entry: dict[str, Any]) -> None:
        """One line: the calls from the entry on, each with the line of the switch it runs under."""
        status = entry["status"]
        text = Text(f"  {self.sign(STATUS_SIGNS[status])} ", style=STATUS_COLOURS[status])
        steps = entry["chain"] or [{"function": entry["function"], "sites": []}]
        for number, step in enumerate(steps):
            if number:
                text.append(f" {self.sign('flows')} ", style="bright_black")
            name = step["function"].removeprefix(f"{entry['class']}.")
            text.append(name, style="bold" if not number else "")
            for site in step["sites"]:
                mechanism = site["mechanism"].rpartition(".")[2]
                text.append(f" [{mechanism}, line {site['line']}]", style="red")
        text.append(f"  {status}", style=f"bold {STATUS_COLOURS[status]}")
        self.console.print(text, highlight=False, soft_wrap=True)

    def _findings(self, findings: list[Finding], most: int) -> None:
        for finding in findings[:most]:
            self.finding(finding)
        if len(findings) > most:
            self.console.print()
            self.print(f"{len(findings) - most} more {findings[0].severity}s are not shown: -v, or -o report.json.")


def _ids(entries: Iterable[dict[str, Any]]) -> set[str]:
    return {finding_id for entry in entries for finding_id in entry["findings"]}


def _count(number: int, severity: str) -> str:
    return f"{number} {severity}" if number == 1 else f"{number} {severity}s"
