"""From cuts to findings: how grave each one is, what it says, and what to do."""

from __future__ import annotations

from gradscope.findings import Confidence, Finding, Severity
from gradscope.paths import short_path
from gradscope.rules import rule_name
from gradscope.tracing.calls import DERIVES
from gradscope.tracing.cuts import SWITCHES, Cut
from gradscope.tracing.frames import excerpt, source_line
from gradscope.tracing.recording import Site
from gradscope.tracing.verify import Proof

ADVICE = {
    "GS1": "Do not enter {mechanism} here when a gradient is wanted.",
    "GS2": "Keep the graph: leave out {mechanism} on the path that is trained.",
    "GS205": "Use rsample(): it draws the same and lets the gradient through, where the distribution has it.",
    "GS206": "Use torch.distributed.nn.functional, whose collectives have a backward.",
    "GS207": "Pass create_graph=True (or create_graph=self.training): then the derivative has a history of its own.",
    "GS3": "Keep the value a tensor on this path.",
    "GS4": "Put a differentiable surrogate in the place of {mechanism} (straight-through, softmax, Gumbel).",
    "GS404": "Look at the values here: saturated, masked, multiplied by zero? A layer that starts at zero does this in "
    "its first step only.",
    "GS5": "Give the function a backward, or register one for the operator.",
    "GS601": "Make the tensor outside of inference_mode, or clone() it after.",
    "GS602": "Empty the cache, or clone() what comes out of it; fill it outside of inference_mode.",
    "GS603": "Use the form that makes a new tensor (no trailing underscore), or clone() before the write.",
    "GS604": "Pass use_reentrant=False, or let an input of the checkpoint require grad (enable_input_require_grads).",
    "GS606": "Look at what the hook returns: it takes the place of the gradient.",
    "GS607": "Keep the argument of sqrt, log, division and norm away from 0 before the call, not by where() after it.",
}


def severity_of(cut: Cut, asked: frozenset[str], crashed: bool) -> Severity:
    """Return how grave a cut is: an error where something asked about loses its gradient."""
    if crashed:
        return "error"
    if cut.sources & asked:
        return "warning" if cut.escape else "error"
    if (cut.certain and cut.wrong & asked) or cut.nonfinite & asked:
        return "error"
    return "warning" if (cut.touched - cut.benign) & asked else "note"


def finding_of(cut: Cut, ids: dict[Site, str], proof: Proof) -> Finding:
    """Return the finding of one cut."""
    site = cut.site
    hidden = proof.hidden_by.get(site)
    crashed = proof.first.recording.error is not None
    return Finding(
        id=ids[site],
        rule=cut.rule,
        name=rule_name(cut.rule),
        severity=severity_of(cut, proof.asked, crashed),
        confidence=_confidence(cut),
        message=_message(cut, crashed),
        path=short_path(site.path),
        line=site.line,
        end_line=site.line,
        function=site.function,
        module=cut.module,
        mechanism=site.mechanism,
        how=site.how,
        cuts=tuple(sorted(cut.touched)),
        behind=ids.get(hidden) if hidden else None,
        verified=proof.verified and site in proof.fix,
        fix=_advice(cut),
        chain=(*cut.chain, site.function) if site.how == "decorator" else cut.chain,
        source=source_line(site.path, site.line),
        excerpt=excerpt(site.path, site.line),
    )


def outside_findings(proof: Proof, count: int) -> list[Finding]:
    """Return notes on parameters that the model took a detached copy of when it was built."""
    notes: list[Finding] = []
    for cut in proof.diagnosis.outside_cuts.values():
        if cut.site in proof.cuts or not cut.sources or cut.rule.startswith("GS1"):
            continue
        names = ", ".join(sorted(cut.sources))
        notes.append(
            Finding(
                id=f"F{count + len(notes) + 1}",
                rule=cut.rule,
                name=rule_name(cut.rule),
                severity="note",
                message=f"{names} enters as a detached copy, made once in {cut.site.function}: it never trains, "
                "whatever else is fixed.",
                path=short_path(cut.site.path),
                line=cut.site.line,
                function=cut.site.function,
                mechanism=cut.site.mechanism,
                how="call",
                cuts=tuple(sorted(cut.sources)),
                chain=cut.chain,
                source=source_line(cut.site.path, cut.site.line),
                excerpt=excerpt(cut.site.path, cut.site.line),
            )
        )
    return notes


# --- words -------------------------------------------------------------------------------------------


def _confidence(cut: Cut) -> Confidence:
    if cut.escape:
        return "possible"
    return "likely" if not (cut.sources or cut.certain) and (cut.partial or cut.wrong) else "certain"


def _message(cut: Cut, crashed: bool) -> str:
    place = f"{_called(cut.site.mechanism)} in {cut.site.function}"
    if cut.words:
        return f"{place}: {cut.words}"
    if cut.rule.startswith("GS1") and cut.site.mechanism in SWITCHES:
        return _of_region(cut, crashed)
    if crashed:
        return f"{place}: autograd refuses it."
    return _of_gradient(cut, place) or _of_call(cut, place)


def _of_region(cut: Cut, crashed: bool) -> str:
    region = f"{cut.site.function} runs under {cut.site.mechanism}"
    if crashed:
        return f"{region}: it returns inference tensors, which autograd refuses to save for backward."
    return f"{region}: autograd records nothing of what it computes.{_also(cut)}"


def _of_gradient(cut: Cut, place: str) -> str:
    """Say what a backward pass or finite differences showed; empty where they showed nothing."""
    if cut.rule == "GS606":
        return f"A hook set by {place} changes the gradient on its way: what comes out is {_what(cut)}."
    if cut.stepped and cut.stepped >= cut.sources:
        return f"The output depends on what passes {place} in steps only: nothing that is unblocked can help."
    if cut.benign and not cut.sources | cut.partial:
        return f"{place} cuts off a part of the gradient that adds nothing to it, as finite differences show."
    if cut.zero or cut.nonfinite:
        return f"A sound gradient arrives at {place} and goes on as {_what(cut)}."
    return f"The backward of {place} raises an exception." if cut.raises else ""


def _of_call(cut: Cut, place: str) -> str:
    if cut.rule == "GS205" or cut.rule.startswith("GS1"):
        return f"{place} switches recording off inside torch: nothing of what it computes is recorded.{_also(cut)}"
    if cut.rule == "GS207":
        return f"{place} gives a derivative without a history: to autograd it is a constant.{_also(cut)}"
    if cut.flat:
        return f"{place} has no useful derivative: nothing that is unblocked can help."
    if cut.escape or cut.rule.startswith("GS3"):
        return f"{place} takes the numbers into Python, where no gradient follows."
    if cut.rule == "GS501" and cut.sources:
        return f"{place} gives no gradient back to what went in.{_also(cut)}"
    return f"{place} gives out a tensor that autograd does not connect to its input.{_also(cut)}"


def _also(cut: Cut) -> str:
    return "" if cut.sources or not cut.partial else " Another path carries a gradient: it is there, and incomplete."


def _what(cut: Cut) -> str:
    return "NaN or infinite" if cut.nonfinite else "zero" if cut.zero else "something else"


def _advice(cut: Cut) -> str:
    site = cut.site
    if site.how == "decorator":
        owner = site.function.rpartition(".")[0]
        given = "self, ..." if owner and not owner.endswith("<locals>") else "..."
        return f"Call the undecorated function: {site.function}.__wrapped__({given}), or the modules inside it."
    advice = cut.advice or ADVICE.get(cut.rule) or ADVICE.get("GS4" if cut.flat or cut.stepped else cut.rule[:3], "")
    return advice.format(mechanism=_called(site.mechanism))


def _called(mechanism: str) -> str:
    """Return the name that a user knows a call by: ``deepcopy`` for ``__deepcopy__``."""
    if mechanism == DERIVES:
        return "autograd.grad"
    return mechanism[2:-2] if mechanism.startswith("__") and mechanism.endswith("__") else mechanism
