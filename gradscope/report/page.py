"""What every terminal report is made of: findings, lists, and text that any terminal can show."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from gradscope.findings import Finding
from gradscope.report.letters import IN_PLAIN_LETTERS
from gradscope.report.standing import standing
from gradscope.session import Session

# Longer lines of prose are hard to read, however wide the terminal is.
PROSE_WIDTH = 100
MOST_GROUPS = 4
SEVERITY_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}
SIGNS = {
    "cut": ("✂", "X"), "flows": ("→", ">"), "blocked": ("✗", "x"), "none": ("·", "."),
    "frozen": ("❄ frozen", "frozen"), "yes": ("✓", "ok"), "maybe": ("!", "!"),
}  # fmt: skip


class Page:
    """A session on its way to a console; ASCII stands in where the terminal's encoding has no more."""

    def __init__(self, session: Session, console: Console) -> None:
        self.session = session
        self.console = console
        encoding = (console.encoding or "ascii").lower().replace("-", "")
        self.ascii = not encoding.startswith("utf")

    def finding(self, finding: Finding) -> None:
        """Print one finding: what, where, the line, why, and what to do."""
        colour = SEVERITY_COLOURS[finding.severity]
        self.console.print()
        head = Text(f"{finding.id} ", style="bold")
        head.append(f"{finding.severity} {finding.rule} {finding.name}", style=f"bold {colour}")
        if finding.state in ("new", "expected"):
            head.append(f"  {finding.state}", style="bold")
        if finding.behind:
            head.append(f"  behind {finding.behind}", style="bold")
        self.console.print(head, highlight=False)
        self.print(f"   {finding.path}:{finding.line}", style="bold", no_wrap=True)
        if finding.source:
            self.console.print(
                Text(self.cropped(f"   > {finding.source}", self.console.width), style=colour), soft_wrap=True
            )
        self.print(f"   {finding.message}")
        if finding.cuts and finding.severity != "note":
            self.print(f"   {self._effect(finding)} {self._summary(finding.cuts)}")
        if len(finding.chain) > 1:
            arrow = " -> " if self.ascii else " → "
            self.print(f"   reached by {arrow.join(finding.chain)}")
        if finding.fix:
            self.print(f"   {finding.fix}", style="green")

    def standing(self) -> None:
        """Print how the findings stand beside the baseline and the configuration; nothing where there is neither."""
        for line in standing(self.session):
            self.print(f"  {line}")

    def unfolded(self, full: bool) -> list[Finding]:
        """Return the findings to show: those that the baseline knows only where ``full`` asks for them."""
        return [finding for finding in self.session.findings if full or finding.state != "unchanged"]

    def folded(self, full: bool) -> None:
        """Print how many findings are not shown because the baseline knows them."""
        unchanged = self.session.count_state("unchanged")
        if unchanged and not full:
            self.console.print()
            what = "1 unchanged finding is" if unchanged == 1 else f"{unchanged} unchanged findings are"
            self.print(f"{what} not shown: -v.")

    def _effect(self, finding: Finding) -> str:
        lost = ("blocked", "partial", "nondifferentiable")
        sources = [self.session.sources[name] for name in finding.cuts if name in self.session.sources]
        return "cuts off" if not sources or any(source.status in lost for source in sources) else "concerns"

    def bullets(self, title: str, lines: Sequence[str]) -> None:
        """Print a titled list; nothing where it is empty."""
        if lines:
            self.console.print()
            self.print(title, style="bold bright_black")
            for line in lines:
                self.print(f"  - {line}", style="bright_black")

    def findings(self, findings: Sequence[Finding], most: int | None, what: str) -> None:
        """Print findings, no more than ``most`` of them where given, and say how many ``what`` are left out."""
        for each in findings[:most]:
            self.finding(each)
        left = len(findings) - most if most is not None else 0
        if left > 0:
            self.console.print()
            self.print(f"and {counted(left, f'more {what}')}: -v shows all")

    def _summary(self, names: tuple[str, ...]) -> str:
        if len(names) <= 3:
            return ", ".join(names)
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(name.split(".")[0], []).append(name)
        said = [f"{group}.* {len(each)}" if len(each) > 1 else each[0] for group, each in groups.items()]
        more = f" and {counted(len(said) - MOST_GROUPS, 'more group')}" if len(said) > MOST_GROUPS else ""
        return f"{len(names)} sources: {', '.join(said[:MOST_GROUPS])}{more}"

    def cropped(self, text: str, room: int) -> str:
        """Return one line of code, cut where the room ends: wrapped code reads like other code."""
        text, dots = self.plain(text), "..." if self.ascii else "…"
        return text if len(text) <= room else text[: max(room - len(dots), 0)].rstrip() + dots

    def plain(self, text: str) -> str:
        """Replace what the terminal's encoding cannot show."""
        return text.encode("ascii", IN_PLAIN_LETTERS).decode() if self.ascii else text

    def sign(self, name: str) -> str:
        """Return a sign that the terminal can show."""
        return SIGNS[name][1 if self.ascii else 0]

    def print(self, text: str, *, style: str = "", no_wrap: bool = False) -> None:
        """Print text wrapped to the console, its indent kept; ``no_wrap`` keeps a file:line whole."""
        text = self.plain(text)
        if no_wrap:
            # A file:line must stay one word, whatever the width.
            self.console.print(escape(text), style=style, highlight=False, soft_wrap=True)
            return
        bare = text.lstrip()
        indent = " " * (len(text) - len(bare) + (2 if bare.startswith("- ") else 0))
        width = min(self.console.width, PROSE_WIDTH)
        # A word that is too long is left whole: a path that is broken over two lines cannot be opened.
        for line in textwrap.wrap(
            text, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
        ):
            self.console.print(Text(line, style=style), soft_wrap=True)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which has an s where there are several."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
