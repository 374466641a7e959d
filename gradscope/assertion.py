"""What an assertion about gradients says when it fails: the same text for the library and for pytest."""

from __future__ import annotations

from gradscope.findings import Finding, listed
from gradscope.session import Session

MOST_OTHERS = 4
# What is wrong with a source, by its status; the gravest comes first.
COMPLAINTS = {
    "blocked": "the gradient does not arrive at",
    "nondifferentiable": "there is no useful derivative for",
    "wrong": "the gradient is wrong at",
    "partial": "the gradient is incomplete at",
    "zero": "the gradient is zero at",
}


class GradientsDoNotFlow(AssertionError):
    """A gradient that is wanted does not arrive; ``session`` has all that was found."""

    # Tracebacks name a class with its module, and nobody needs to know this one.
    __module__ = "gradscope"

    def __init__(self, session: Session) -> None:
        super().__init__(failure_text(session))
        self.session = session

    def __reduce__(self) -> tuple[type[GradientsDoNotFlow], tuple[Session]]:
        """Pickle by the session: test runners send exceptions to other processes."""
        return type(self), (self.session,)


def unmet(session: Session) -> list[Finding]:
    """Return the findings that make the assertion fail: no note, and none that is expected."""
    return [each for each in session.findings if each.severity != "note" and each.state != "expected"]


def asked_in_vain(session: Session) -> tuple[str, ...]:
    """Return the sources that were asked about by name, where the result depends on none of them."""
    return tuple(session.sources) if session.target.get("wrt") and session.is_idle else ()


def require_flow(session: Session) -> Session:
    """Return the session if the gradient arrives wherever it is wanted and not allowed to stop.

    Raises:
        GradientsDoNotFlow: it does not.
    """
    __tracebackhide__ = True  # pytest leaves out frames that say so
    if unmet(session) or session.verdict == "crashes" or asked_in_vain(session):
        raise GradientsDoNotFlow(session)
    return session


def failure_text(session: Session) -> str:
    """Say what does not arrive, the first cut with its line, what else cuts, and the smallest fix."""
    findings = unmet(session)
    crash = session.crash
    lines = [f"autograd refuses the run: {crash['exception']}: {crash['message']}"] if crash else []
    if findings:
        first, others = findings[0], findings[1:]
        # The parameters first: an input may be there that nobody asked about.
        lost = sorted((n for n in first.cuts if n in session.sources), key=lambda n: session.sources[n].kind == "input")
        lines += [] if crash else [f"{_complaint(session, first)} {listed(tuple(lost) or first.cuts) or 'anything'}"]
        lines += [f"  {_place(first)}{f', in {first.function}' if first.function else ''}", f"  > {first.source}"]
        lines += [f"  {first.message}"]
        lines += [f"  {'behind it' if each.behind else 'and also'}: {_place(each)}" for each in others[:MOST_OTHERS]]
        lines += [f"  and {len(others) - MOST_OTHERS} more findings"] if len(others) > MOST_OTHERS else []
        lines += [f"  {_fix(session)}", f"  {first.fix}"]
    if not lines and asked_in_vain(session):
        lines = [f"the result does not depend on {listed(asked_in_vain(session))}: there is no gradient to arrive"]
    return "\n".join(line for line in lines if line.strip(" >"))


def _complaint(session: Session, finding: Finding) -> str:
    found = {session.sources[name].status for name in finding.cuts if name in session.sources}
    return next((words for status, words in COMPLAINTS.items() if status in found), "the gradient is lost for")


def _place(finding: Finding) -> str:
    return f"{finding.path}:{finding.line}: {finding.rule} {finding.name}"


def _fix(session: Session) -> str:
    if not session.fix_set:
        return ""
    places = " + ".join(f"{each.path}:{each.line}" for each in map(session.finding, session.fix_set))
    proof = "verified by running it" if session.fix_verified else "not verified"
    return f"smallest fix: take away {places} ({proof})"
