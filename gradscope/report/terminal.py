"""A trace in a terminal: verdict, findings, the tree with its breaks, the way out."""

from __future__ import annotations

import math
from collections import Counter

from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text
from rich.tree import Tree

from gradscope.findings import Finding, Source
from gradscope.report.page import PROSE_WIDTH, SEVERITY_COLOURS, Page
from gradscope.report.standing import is_meant, to_mend
from gradscope.report.views import MOST_LINES, ViewNode, fold
from gradscope.session import Session

VERDICTS = {
    "flows": ("green", "the gradient arrives"),
    "blocked": ("red", "the gradient does not arrive"),
    "partial": ("yellow", "the gradient arrives on one path and is cut on another"),
    "crashes": ("red", "autograd refuses the run"),
}
COLOURS = {"flows": "green", "blocked": "red", "none": "bright_black"}
# Wide enough for any line of the tree; a terminal that is narrower wraps it itself.
LONGEST_LINE = 240
MOST_NOTES = 5
SHORTEST_LABEL = 12


def render(session: Session, console: Console, *, full: bool = False) -> None:
    """Print the session; the tree is folded to about 45 lines unless ``full``."""
    _TracePage(session, console).show(full)


def words_for(session: Session) -> str:
    """Say it more exactly where no gradient is lost and it is no good all the same; empty elsewhere."""
    found = {source.status for source in session.sources.values()}
    bad = any(source.gradient is not None and source.gradient.nonfinite for source in session.sources.values())
    if session.verdict == "blocked" and not found & {"blocked", "partial"}:
        if "nondifferentiable" in found:
            return "there is no useful derivative on the way"
        return "the gradient arrives as NaN or infinite" if bad else "the gradient arrives and is wrong"
    if session.is_idle:
        return "nothing asked about is used for the result: there is no gradient to arrive"
    return "the gradient arrives, and is zero in places" if session.verdict == "flows" and "zero" in found else ""


class _TracePage(Page):
    def show(self, full: bool) -> None:
        self._verdict()
        notes = [each for each in self.unfolded(full) if each.severity == "note"]
        self.findings([each for each in self.unfolded(full) if each not in notes], None, "finding")
        self.findings(notes, None if full else MOST_NOTES, "note")
        self.folded(full)
        self._tree(full)
        self._way_out()
        self.bullets("What was assumed", self.session.remarks)
        self.bullets("What could not be seen", self.session.unseen)

    # --- sections ---------------------------------------------------------------------------

    def _verdict(self) -> None:
        session = self.session
        colour, words = VERDICTS[session.verdict]
        sign = self.sign("yes" if session.verdict == "flows" else "blocked")
        if session.verdict == "flows" and session.is_idle:
            colour, sign = "yellow", self.sign("maybe")
        target = session.target
        words = words_for(session) or words
        self.console.print(f"[bold {colour}]{sign} {session.verdict}[/]  {words}", highlight=False)
        call = f".{target['entry']}({', '.join(target['inputs'])})" if target["entry"] else ""
        line = f"  {target['name']}{call}"
        how = f"{target['mode']} on {target['device']}, {target['dtype']}, {_runs(session.stats.get('runs', 1))}"
        how = f"{how} in {session.stats.get('seconds', 0)} s"
        room = min(self.console.width, PROSE_WIDTH)
        for text in [f"{line}   {how}"] if len(line) + len(how) + 3 <= room else [line, f"  {how}"]:
            self.print(text)
        for kind in ("input", "parameter"):
            group = [source for source in session.sources.values() if source.kind == kind]
            if not group:
                continue
            counts = Counter(source.status for source in group)
            words = ", ".join(f"{count} {status}" for status, count in counts.most_common())
            noun = kind if len(group) == 1 else f"{kind}s"
            frozen = sum(source.frozen for source in group)
            tail = f" ({frozen} frozen, which blocks nothing)" if frozen else ""
            names = f" [{group[0].name}]" if kind == "input" and len(group) == 1 else ""
            self.print(f"  {len(group)} {noun}{names}: {words}{tail}{_norms(group)}")
        self.standing()
        if session.crash is not None:
            crash = session.crash
            self.console.print()
            self.print(f"  {crash['exception']}: {crash['message']}", style="red")
            place = f"in {crash['module']}" if crash.get("module") else f"at {crash['path']}:{crash['line']}"
            where = "in the backward pass" if crash.get("phase") == "backward" else place
            self.print(f"  raised {where}, caused by:", no_wrap=True)

    def _tree(self, full: bool) -> None:
        views = fold(self.session.graph, None if full else MOST_LINES)
        if not views:
            return
        self.console.print()
        root = Tree(Text("Forward pass", style="bold"), guide_style="bright_black")
        for view in views:
            self._branch(root, view, self.console.width - 4)
        # A file:line stays one word: the terminal itself wraps what is too long.
        width = self.console.width
        self.console.width = max(width, LONGEST_LINE)
        try:
            self.console.print(root, highlight=False, soft_wrap=True)
        finally:
            self.console.width = width

    def _branch(self, tree: Tree, view: ViewNode, room: int) -> None:
        branch = tree.add(self._label(view, room))
        for child in view.children:
            self._branch(branch, child, room - 4)

    def _label(self, view: ViewNode, room: int) -> Text:
        """Return one line of the tree; what does not fit into ``room`` columns is left out."""
        node = view.node
        if node.finding:
            return self._cut_label(view, room, self.session.finding(node.finding))
        text = Text(f"{self.sign(node.status)} ", style=COLOURS[node.status])
        text.append(
            self.cropped(view.label, max(room - len(text), SHORTEST_LABEL)),
            style="bold" if node.kind in ("module", "input", "output") else "",
        )
        parts = [(self.sign("frozen"), "blue")] if node.frozen else []
        parts += [(node.detail, "bright_black")] if node.detail else []
        named = node.kind == "module" and node.type not in ("", view.label, "constructor")
        if named and len(text) + sum(len(part) + 2 for part, _ in parts) + len(node.type) + 2 <= room:
            parts.insert(0, (node.type, "cyan"))
        for part, style in parts:
            if len(text) + 2 + len(part) <= room:
                text.append(f"  {part}", style=style)
        return text

    def _cut_label(self, view: ViewNode, room: int, finding: Finding) -> Text:
        node = view.node
        where = f"  {self.plain(node.path)}:{node.line}"
        label = self.plain(view.label)
        spare = room - len(finding.rule) - len(where) - 4
        if node.kind == "operation":
            label = self.cropped(label, max(spare, SHORTEST_LABEL))
        elif len(label) > spare:
            label = label.partition("  ")[0]  # without the mechanism, which the rule names as well
        colour = SEVERITY_COLOURS[finding.severity]
        text = Text(f"{self.sign('cut')} {label}", style=f"bold {colour}")
        text.append(f"  {finding.rule}", style=colour)
        text.append(where, style="bold")
        return text

    def _way_out(self) -> None:
        session = self.session
        if is_meant(session):
            return
        errors = to_mend(session)
        stay = [finding.id for finding in errors if not finding.verified]
        if session.fix_set:
            self.console.print()
            proven = "verified by running it" if session.fix_verified else "not verified"
            sign = self.sign("yes") if session.fix_verified else "?"
            self.print(f"Smallest fix: {' + '.join(session.fix_set)}, {proven} {sign}", style="bold green")
        elif stay:
            self.console.print()
            what = "This cannot" if len(stay) == 1 else "These cannot"
            self.print(f"{what} be taken away for a run: change {', '.join(stay)} as said there.", style="bold yellow")
        if session.remedy is not None and errors:
            self.print(f"  before  {session.remedy.before}", style="red")
            self.print(f"  after   {session.remedy.after}", style="green")
            self.console.print()
            code = Syntax("", "python", theme="ansi_dark").highlight(session.remedy.code)
            for row in code.split("\n"):
                self.console.print(Text("  ").append_text(row), soft_wrap=True)


def _norms(group: list[Source]) -> str:
    """Say between which norms the gradients lie; empty where none was computed."""
    norms = [source.gradient.norm_l2 for source in group if source.gradient is not None]
    finite = [norm for norm in norms if math.isfinite(norm)]
    if not finite:
        return ""
    low, high = f"{min(finite):.2g}", f"{max(finite):.2g}"
    return f"; gradient norm {low}" if low == high else f"; gradient norms {low} to {high}"


def _runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"
