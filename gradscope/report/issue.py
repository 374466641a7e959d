"""A finding as Markdown, ready to be pasted into an issue of the project that it concerns."""

from __future__ import annotations

import re

from gradscope.findings import Finding
from gradscope.report.markdown import code, fenced
from gradscope.session import Session

MOST_NAMES = 5


def text(finding: Finding, session: Session) -> str:
    """Return what the finding says, with its source, its chain, its fix and what it was seen with."""
    parts = [
        f"### {_words(finding.message)}",
        f"{_code(f'{finding.path}:{finding.line}')}{_inside(finding)}, rule {finding.rule} {finding.name}",
    ]
    if finding.excerpt is not None or finding.source:
        parts.append(_excerpt(finding))
    if finding.cuts:
        names = ", ".join(_code(name) for name in finding.cuts[:MOST_NAMES])
        more = len(finding.cuts) - MOST_NAMES
        parts.append(f"Loses its gradient here: {names}" + (f" and {more} more." if more > 0 else "."))
    if len(finding.chain) > 1:
        parts.append(f"Reached by {' → '.join(_code(step) for step in finding.chain)}.")
    if finding.behind:
        hiding = next((each for each in session.findings if each.id == finding.behind), None)
        where = f" ({_code(f'{hiding.path}:{hiding.line}')})" if hiding else ""
        parts.append(f"It lies behind another cut{where} and shows once that one is gone.")
    if finding.fix:
        proof = " This was verified by running it." if finding.verified and session.fix_verified else ""
        parts.append(f"**Fix:** {_words(finding.fix)}{proof}")
    parts.append(f"<sub>{_seen_with(session)}</sub>")
    return "\n\n".join(parts) + "\n"


def _inside(finding: Finding) -> str:
    return f" in {_code(finding.function)}" if finding.function else ""


def _excerpt(finding: Finding) -> str:
    if finding.excerpt is None:
        rows = [finding.source]
    else:
        numbers = range(finding.excerpt.first, finding.excerpt.first + len(finding.excerpt.lines))
        wide = len(str(numbers[-1]))
        rows = [
            f"{'>' if number == finding.line else ' '} {number:>{wide}}  {row}".rstrip()
            for number, row in zip(numbers, finding.excerpt.lines, strict=True)
        ]
    body = "\n".join(rows)
    return fenced(body, "python")


def _code(words: str) -> str:
    return code(words.replace("\n", " "))


def _words(said: str) -> str:
    """Return a sentence in which Markdown takes no name for a mark: ``__wrapped__`` stays what it is."""
    return re.sub(r"([\\`*_<>\[\]#|~@])", r"\\\1", " ".join(said.split()))


def _seen_with(session: Session) -> str:
    tool = f"{session.tool.get('name', 'gradscope')} {session.tool.get('version', '')}".strip()
    names = [f"{name} {version}" for name, version in session.environment.items()]
    return f"Seen with {_words(', '.join([tool, *names]))}"
