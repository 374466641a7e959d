"""A scan in a terminal: the verdict, then class by class its entries, the lines that stop them, the way out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.text import Text

from gradscope.findings import SEVERITIES
from gradscope.report.page import Page, counted
from gradscope.report.places import classes_of
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
        for home, entries in self._groups(full):
            shown |= self._class(home, entries, full, shown)
        rest = [each for each in self.unfolded(full) if each.id not in shown]
        self.findings([each for each in rest if each.severity == "error"], None, "error")
        self.findings([each for each in rest if each.severity == "warning"], None if full else MOST_WARNINGS, "warning")
        notes = [each for each in rest if each.severity == "note"]
        if full:
            self.findings(notes, None, "note")
        elif notes:
            self.console.print()
            self.print(f"and {counted(len(notes), 'note')} on what stops a gradient on purpose or without harm: -v")
        self.folded(full)
        self.bullets("Remarks", self.session.remarks)
        self.bullets("What could not be read", self.session.unseen)

    # --- sections ---------------------------------------------------------------------------

    def _verdict(self) -> None:
        session = self.session
        colour, sign, words = VERDICTS[session.verdict]
        counts = Counter(finding.severity for finding in session.findings)
        said = ", ".join(counted(counts[severity], severity) for severity in SEVERITIES)
        unread = f"; {counted(len(session.unseen), 'file')} could not be read" if session.unseen else ""
        if not session.findings:
            unread = unread.removesuffix(" be read")
            said = "nothing found" + (" in what could be read" if unread else "")
            words = "" if unread else words
        if unread and not counts["error"]:
            colour, sign = "yellow", "maybe"
        head = Text(f"{self.sign(sign)} {said}", style=f"bold {colour}")
        head.append(unread, style="bold")
        if words and len(head) + len(words) + 2 <= self.console.width:
            head.append(f"  {words}", style="not bold default")
            words = ""
        self.console.print(head, highlight=False, soft_wrap=True)
        if words:
            self.print(f"  {words}")
        stats = session.stats
        name = session.target.get("name", "")
        entry = f", entry {session.target['entry']}" if session.target.get("entry") else ""
        files = counted(stats.get("files", 0), "file")
        if stats.get("outside"):
            files += f", {stats['outside']} followed,"
        self.print(f"  {name}{entry}: {files} in {stats.get('seconds', 0)} s, nothing imported or run")
        self.standing()

    def _groups(self, full: bool) -> list[tuple[str, list[dict[str, Any]]]]:
        asked = bool(self.session.target.get("entry"))
        errors = {finding.id for finding in self.unfolded(full) if finding.severity == "error"}
        return [(home, group) for home, group in classes_of(self.session) if asked or errors & _ids(group)]

    def _class(self, home: str, entries: list[dict[str, Any]], full: bool, shown: set[str]) -> set[str]:
        self.console.print()
        self.console.print(Text(entries[0]["class"], style="bold"), Text(home, style="bright_black"))
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
        self.findings(new, None, "finding")
        again = [finding.id for finding in own if finding.id in shown]
        if again:
            self.print(f"  stopped by {', '.join(again)}, shown above", style="bright_black")
        return {finding.id for finding in own}

    def _path(self, entries: list[dict[str, Any]]) -> str:
        return next((entry["chain"][0]["path"] for entry in entries if entry["chain"]), "")

    def _entry(self, entry: dict[str, Any]) -> None:
        """One line: the calls from the entry on, each with the line of the switch it runs under.

        Where that is too long for the terminal, every further call has a line of its own.
        """
        status = entry["status"]
        sign, colour = self.sign(STATUS_SIGNS[status]), STATUS_COLOURS[status]
        chain = entry["chain"] or [{"function": entry["function"], "sites": []}]
        steps = [
            self._step(step, entry["class"], home=chain[0].get("path", "") if number else None)
            for number, step in enumerate(chain)
        ]
        end = Text(f"  {status}", style=f"bold {colour}")
        # Appended and not added: what is added to a text takes on its style.
        arrow = Text().append(f"{self.sign('flows')} ", style="bright_black")
        line = Text().append(f"  {sign} ", style=colour).append_text(steps[0])
        room = self.console.width - len(end)
        if len(line) + sum(len(step) + len(arrow) + 1 for step in steps[1:]) <= room:
            line = Text(" ").join([line, *(arrow + step for step in steps[1:])])
            self.console.print(line + end, highlight=False, soft_wrap=True)
            return
        self.console.print(line + end, highlight=False, soft_wrap=True)
        for step in steps[1:]:
            self.console.print(Text("      ") + arrow + step, highlight=False, soft_wrap=True)

    def _step(self, step: dict[str, Any], owner: str, *, home: str | None) -> Text:
        """``home`` is the file of the first step, which itself has none: a line in another file is given with that."""
        text = Text(self.plain(step["function"].removeprefix(f"{owner}.")), style="bold" if home is None else "")
        lines: dict[str, list[str]] = {}
        for site in step["sites"]:
            lines.setdefault(site["mechanism"].rpartition(".")[2], []).append(str(site["line"]))
        for mechanism, numbers in lines.items():
            noun = "line" if len(numbers) == 1 else "lines"
            where = f"{noun} " if home in (None, step["path"]) else f"{step['path']}:"
            text.append(f" [{mechanism}, {where}{', '.join(numbers)}]", style="not bold red")
        return text


def _ids(entries: Iterable[dict[str, Any]]) -> set[str]:
    return {finding_id for entry in entries for finding_id in entry["findings"]}
