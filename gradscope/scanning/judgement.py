"""One site with what is to be said of it, and the words that recur in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradscope.findings import Confidence, Severity
from gradscope.scanning.facts import FileFacts, Site
from gradscope.scanning.package import Place

FROZEN = "What it runs is frozen here: only a gradient to its input is lost."
KEEP_OR_TAKE_OUT = "Leave it out where a gradient is wanted, or hand the optimizer only what is trained."
NOTHING_LIVE = "what comes out of it depends on no parameter, module or float input"


@dataclass(slots=True)
class Judgement:
    """One site with its severity, how sure that is, the reason in words and the calls that lead to it.

    ``stands_for`` are the sites outside of the code scanned that a call in it comes to.
    """

    facts: FileFacts
    site: Site
    severity: Severity
    confidence: Confidence
    message: str
    chain: list[Place] = field(default_factory=list)
    advice: str = ""
    stands_for: tuple[Site, ...] = ()


def what(site: Site) -> str:
    """Say what a site is, in a word or two."""
    return f"{site.mechanism.rpartition('.')[2]} {site.how}"


def where(site: Site) -> str:
    """Say what a site does in its function."""
    name, function = site.mechanism.rpartition(".")[2], site.function or "The script"
    if site.how == "call":
        return f"{function} calls {name} and leaves gradients off"
    if site.how == "applied":
        return f"{function} wraps a function in {name}"
    return f"{function} {'runs' if site.how == 'decorator' else 'computes'} under {name}"


def handed(names: list[str]) -> str:
    """Say that an optimizer is given the parameters of these."""
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} handed to an optimizer"
