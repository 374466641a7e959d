"""The verdict of a session in a sentence, for pages that begin with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from gradscope.findings import SEVERITIES
from gradscope.report import scan_terminal, terminal
from gradscope.report.page import counted
from gradscope.session import Session


@dataclass(frozen=True, slots=True)
class Headline:
    """``tone`` is ``good``, ``bad`` or ``warn``; ``said`` the verdict in a word or two, ``sentence`` what it means."""

    tone: str
    sign: str
    said: str
    sentence: str


TONES = {"flows": "good", "partial": "warn", "blocked": "bad", "crashes": "bad"}
SIGNS = {"good": "✓", "warn": "!", "bad": "✗"}


def headline(session: Session) -> Headline:
    """Return the verdict of a trace, a scan or a check, in the words of the command line."""
    if session.kind == "check":
        return _of_check(session)
    tone = TONES[session.verdict]
    if session.kind != "scan":
        words = terminal.words_for(session) or terminal.VERDICTS[session.verdict][1]
        if "zero in places" in words or (tone == "good" and session.is_idle):
            tone = "warn"
        return Headline(tone, SIGNS[tone], session.verdict, f"{words[0].upper()}{words[1:]}.")
    counts = Counter(finding.severity for finding in session.findings)
    said = ", ".join(counted(counts[severity], severity) for severity in SEVERITIES if counts[severity])
    words = scan_terminal.VERDICTS[session.verdict][2]
    if session.unseen:
        # What could not be read is never clean.
        tone = "bad" if counts["error"] else "warn"
        words = f"{counted(len(session.unseen), 'file')} could not be read" + (f"; {words}" if session.findings else "")
    return Headline(tone, SIGNS[tone], said or "nothing found", f"{words[0].upper()}{words[1:]}.")


def _of_check(session: Session) -> Headline:
    """Say what counts, and what could not be analysed: that is never clean."""
    counting = Counter(finding.severity for finding in session.findings if finding.counts)
    failed = sum(bool(run["failure"]) for run in session.runs)
    tone = "bad" if counting["error"] else "warn" if counting["warning"] or failed or session.in_doubt else "good"
    said = ", ".join(counted(counting[severity], severity) for severity in SEVERITIES if counting[severity])
    rest = f"{failed} of {counted(len(session.runs), 'target')} could not be analysed" if failed else ""
    sentence = rest or ("look at what counts" if counting else "all is known, expected or sound")
    return Headline(tone, SIGNS[tone], said or "nothing new", f"{sentence[0].upper()}{sentence[1:]}.")
