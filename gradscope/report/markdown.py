"""A session as Markdown: for a comment on a pull request, an issue, or the summary of a CI job."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from gradscope.findings import Finding
from gradscope.report import mermaid
from gradscope.report.headline import headline
from gradscope.report.page import counted
from gradscope.report.places import gravest_first, uri_of
from gradscope.report.standing import is_meant, standing
from gradscope.session import Session

# GitHub refuses a comment of more than 65,536 characters.
MOST_LETTERS = 60_000
# (findings in the table, findings with their lines, sources of a status): as much as fits.
SMALLER = [(50, 10, 200), (50, 3, 20), (20, 1, 0), (5, 0, 0)]
MOST_WAYS = 50
MOST_BOXES = 24
ICONS = {"error": "❌", "warning": "⚠️", "note": "ℹ️"}
TONES = {"good": "✅", "warn": "⚠️", "bad": "❌"}
SCAN_VERDICTS = {
    "flows": "✅ **No place stops a gradient that somebody would miss**",
    "blocked": "❌ **Gradients are stopped where training would need them**",
    "partial": "⚠️ **No certain break, but look at the warnings**",
}


def render(session: Session, *, full: bool = False) -> str:
    """Return the report; it tells less, gravest first, until it fits into a comment unless ``full``."""
    if full:
        return _report(session, len(session.findings), len(session.findings), len(session.sources))
    shown = ""
    for findings, excerpts, sources in SMALLER:
        shown = _report(session, findings, excerpts, sources)
        if len(shown) <= MOST_LETTERS:
            break
    return shown


def render_several(sessions: Sequence[Session], *, full: bool = False) -> str:
    """Return the reports one after another."""
    return "\n---\n\n".join(render(session, full=full) for session in sessions)


# --- the parts -------------------------------------------------------------------------------------


def _report(session: Session, most_findings: int, most_excerpts: int, most_sources: int) -> str:
    findings = gravest_first(session.findings)
    counting = [each for each in findings if each.counts]
    notes = [each for each in counting if each.severity == "note"]
    grave = counting[: len(counting) - len(notes)]
    parts = [_verdict(session), _table(grave, most_findings)]
    parts += [_finding(each) for each in grave[:most_excerpts]]
    parts += [_remedy(session), _graph(session), _sources(session, most_sources), _entries(session)]
    known = [each for each in findings if each.state == "unchanged"]
    expected = [each for each in findings if each.state == "expected"]
    for title, group in (
        (counted(len(notes), "note"), notes),
        (f"{len(known)} known to the baseline", known),
        (f"{len(expected)} expected", expected),
    ):
        if group:
            parts.append(details(title, _table(group, most_findings)))
    parts.append(_runs(session))
    parts += [_list("What was assumed", session.remarks), _list("What could not be seen", session.unseen)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _verdict(session: Session) -> str:
    target = session.target
    name = ".".join(str(target[key]) for key in ("name", "entry") if target.get(key))
    how = ", ".join(str(target[key]) for key in ("mode", "device", "dtype") if target.get(key))
    if session.kind == "scan":
        outside = f"{session.stats['outside']} followed, " if session.stats.get("outside") else ""
        how = f"{counted(session.stats.get('files', 0), 'file')} read, {outside}nothing imported or run"
    words = _words(session)
    facts = "; ".join(filter(None, [how, _counted(session)]))
    said = [line for line in (facts, *map(text, standing(session))) if line]
    lines = [f"### gradscope: {code(name)}", "", "  \n".join([words, *said])]
    if session.crash is not None:
        lines += ["", f"> {text(session.crash['exception'])}: {text(session.crash['message'])}"]
    return "\n".join(lines).rstrip()


def _words(session: Session) -> str:
    """Return the verdict; what a baseline knows and what is expected is no reason to be alarmed."""
    grave = [each for each in session.findings if each.severity != "note"]
    if grave and not any(each.counts for each in grave) and not session.in_doubt:
        return "✅ **Nothing that is not known or expected**"
    if session.kind == "trace":
        said = headline(session)
        return f"{TONES[said.tone]} **{said.sentence.rstrip('.')}**"
    counting = {each.severity for each in grave if each.counts}
    verdict = "blocked" if "error" in counting else "partial" if counting else "flows"
    words = SCAN_VERDICTS[verdict]
    return words.replace("✅ **No place", "⚠️ **In what could be read, no place") if session.unseen else words


def _runs(session: Session) -> str:
    """Return what became of each run of a check."""
    rows = []
    for run in session.runs:
        found = [each for each in session.findings if each.id in run["findings"] and each.counts]
        counts = ", ".join(counted(number, severity) for severity in ICONS
                           if (number := sum(each.severity == severity for each in found)))  # fmt: skip
        said = text(run["failure"]) or counts or "nothing that counts"
        rows.append(f"| {_cell(code(run['name']))} | {run['verdict'] or 'not analysed'} | {said} |")
    return "\n".join(["| run | verdict | found |", "|---|---|---|", *rows]) if rows else ""


def _counted(session: Session) -> str:
    """Return how many sources have which status, where there are sources."""
    counts = {source.status: session.count(source.status) for source in session.sources.values()}
    said = ", ".join(f"{count} {status}" for status, count in sorted(counts.items(), key=lambda each: -each[1]))
    return f"{counted(len(session.sources), 'source')}: {said}" if said else ""


def _table(findings: list[Finding], most: int) -> str:
    if not findings:
        return ""
    rows = ["| | rule | where | what |", "|---|---|---|---|"]
    for each in findings[:most]:
        behind = f" (behind {each.behind})" if each.behind else ""
        state = " **new**" if each.state == "new" else ""
        rows.append(
            f"| {ICONS[each.severity]} {each.id}{state} | {each.rule} {each.name} | {_cell(link(each))} "
            f"| {text(each.message)}{behind} |"
        )
    if len(findings) > most:
        rows += ["", f"{len(findings) - most} more findings are not shown."]
    return "\n".join(rows)


def _cell(marked: str) -> str:
    return marked.replace("|", "\\|")


def _finding(finding: Finding) -> str:
    head = f"**{finding.id} {finding.rule} {finding.name}** {link(finding)}"
    lines = [head]
    excerpt = finding.excerpt.lines if finding.excerpt is not None else (finding.source,) if finding.source else ()
    if excerpt:
        first = finding.excerpt.first if finding.excerpt is not None else finding.line
        numbered = [
            f"{'>' if number == finding.line else ' '} {number:5}  {line}" for number, line in enumerate(excerpt, first)
        ]
        lines.append(fenced("\n".join(numbered), "python"))
    if finding.fix:
        lines.append(f"**Fix:** {text(finding.fix)}")
    return "\n\n".join(lines)


def _remedy(session: Session) -> str:
    if is_meant(session):
        return ""
    proof = ", proven by running it" if session.fix_verified else ""
    smallest = f"**Smallest fix:** {', '.join(session.fix_set)}{proof}." if session.fix_set else ""
    if session.remedy is None:
        return smallest
    return f"{smallest}\n\n{fenced(session.remedy.code, 'python')}".strip()


def _graph(session: Session) -> str:
    """Return the folded graph, where there is a cut to see in it."""
    if not session.graph.nodes or session.verdict == "flows":
        return ""
    return details("Where the gradient ends", fenced(mermaid.draw(session, MOST_BOXES)[0].rstrip(), "mermaid"))


def _sources(session: Session, most: int) -> str:
    """Return the sources by status, gravest first, each status folded away."""
    blocks = []
    for status in ("blocked", "nondifferentiable", "wrong", "partial", "zero", "unused", "flows"):
        names = [source.name for source in session.sources.values() if source.status == status]
        if names and most:
            shown = [f"- {code(name)}" for name in names[:most]]
            more = [f"- and {len(names) - len(shown)} more"] if len(shown) < len(names) else []
            blocks.append(details(f"{len(names)} {status}", "\n".join(shown + more)))
    return "\n\n".join(blocks)


def _entries(session: Session) -> str:
    """Return what a scan says of the public methods that an error is reached from."""
    wrong = {finding.id for finding in session.findings if finding.severity == "error"}
    rows = []
    for entry in session.entries:
        if wrong.intersection(entry["findings"]):
            chain = " → ".join(code(step["function"]) for step in entry["chain"])
            clean = ", ".join(code(name) for name in entry["clean"])
            rows.append(f"| {_cell(chain)} | {entry['status']} | {_cell(clean)} |")
    if not rows:
        return ""
    head = ["| reached by | status | call these to keep the gradient |", "|---|---|---|"]
    more = [f"\n{len(rows) - MOST_WAYS} more are not shown."] if len(rows) > MOST_WAYS else []
    return details(counted(len(rows), "way") + " in", "\n".join([*head, *rows[:MOST_WAYS], *more]))


def _list(title: str, lines: list[str]) -> str:
    return details(title, "\n".join(f"- {text(line)}" for line in lines)) if lines else ""


def details(title: str, body: str) -> str:
    """Return a body folded under its title; the blank lines make GitHub read the body as Markdown."""
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def link(finding: Finding) -> str:
    """Return ``path:line``, as a link where the file lies in the repository that is worked in."""
    if not finding.path or finding.path.startswith("<"):
        return text(finding.path)
    place = code(f"{finding.path}:{finding.line}")
    inside = not Path(finding.path).is_absolute() and Path(finding.path).is_file()
    return f"[{place}]({_repository()}{uri_of(finding.path)}#L{finding.line})" if inside else place


def _repository() -> str:
    """Return where the commit's files can be seen, by what CI servers say of themselves; empty elsewhere.

    A comment and a job's summary have an address of their own: from there a relative link leads nowhere.
    """
    said = os.environ.get
    if said("GITHUB_REPOSITORY"):
        server = said("GITHUB_SERVER_URL", "https://github.com")
        return f"{server}/{said('GITHUB_REPOSITORY')}/blob/{said('GITHUB_SHA', 'HEAD')}/"
    if said("CI_PROJECT_URL"):
        return f"{said('CI_PROJECT_URL')}/-/blob/{said('CI_COMMIT_SHA', 'HEAD')}/"
    return ""


def code(words: str) -> str:
    """Return words as inline code, also where they hold backticks."""
    marks = "`" * (max(map(len, re.findall("`+", words)), default=0) + 1)
    pad = " " if "`" in words else ""
    return f"{marks}{pad}{words}{pad}{marks}"


def text(words: str) -> str:
    """Return words in one line that Markdown takes as they are: no markup, no HTML, no mention of anybody."""
    escaped = re.sub(r"([\\`*\[\]|~#]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(words.split()))
    # A zero-width space keeps @torch from calling a user of that name.
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "@\u200b")


def fenced(body: str, language: str) -> str:
    """Return a code block whose fence is longer than any in it."""
    fence = "`" * max(3, max(map(len, re.findall("`+", body)), default=0) + 1)
    return f"{fence}{language}\n{body}\n{fence}"
