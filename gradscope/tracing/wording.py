"""From cuts to findings: how grave each one is, what it says, and what to do."""

from __future__ import annotations

from gradscope.findings import Confidence, Finding, Severity, listed
from gradscope.paths import short_path
from gradscope.rules import rule_name
from gradscope.tracing.calls import DERIVES
from gradscope.tracing.cuts import EXPORTED_SWITCH, SWITCHES, Cut
from gradscope.tracing.frames import excerpt, source_line, source_site
from gradscope.tracing.recording import Recording, Site
from gradscope.tracing.verify import Proof

ADVICE = {
    "GS1": "Do not enter {mechanism} here when a gradient is wanted.",
    "GS107": "Switch it back before the call is over: {mechanism} as a block, which ends, or as a decorator.",
    "set_grad_enabled": "Let what {mechanism} is given here be True when a gradient is wanted.",
    EXPORTED_SWITCH: "Export the program again without the switch here: it keeps the one that it was exported with.",
    "GS2": "Keep the graph: leave out {mechanism} on the path that is trained.",
    "GS202": "Keep the graph: leave out {mechanism} on the path that is trained; put a computed weight to use with "
    "torch.func.functional_call.",
    "GS203": "Use the tensor as it is, and join several with torch.stack() or torch.cat(); put a computed weight to "
    "use with torch.func.functional_call.",
    "GS204": "Leave requires_grad of what was computed as it is; detach() it where the gradient is meant to end.",
    "GS205": "Use rsample(): it draws the same and lets the gradient through, where the distribution has it. Where the "
    "log_prob of the sample is what trains (REINFORCE), sample() is right.",
    "GS206": "Use torch.distributed.nn.functional, whose collectives have a backward.",
    "GS207": "Pass create_graph=True (or create_graph=self.training): then the derivative has a history of its own.",
    "GS3": "Keep the value a tensor on this path: compute with torch, and join tensors with torch.stack() or "
    "torch.cat(), not torch.tensor([...]).",
    "GS4": "Put a differentiable surrogate in the place of {mechanism} (straight-through, softmax, Gumbel).",
    "GS402": "Put a differentiable surrogate in the place of {mechanism}: sigmoid(sharpness * (x - threshold)) for a "
    "threshold, straight-through for a rounding.",
    "GS403": "Keep it floating where it is trained: interpolate between what two indices give, or weigh all by a "
    "softmax; of ids, ask about what is computed of them: the output of an embedding.",
    "GS404": "Look at the values here: saturated, masked, multiplied by zero, picked by the nearest? A layer that "
    "starts at zero does this in its first step only.",
    "GS5": "Give the function a backward, or register one for the operator.",
    "GS501": "Let the function's backward return a gradient, not None, for each input that is trained; a derivative "
    "that is taken inside it needs torch.enable_grad().",
    "CUDAGraph.replay": "Call the module itself where it is trained, or capture it with "
    "torch.cuda.make_graphed_callables(), which captures a backward pass as well.",
    "GS601": "Make the tensor outside of inference_mode, or clone() it after.",
    "GS602": "Empty the cache, or clone() what comes out of it; fill it outside of inference_mode.",
    "GS603": "Use the form that makes a new tensor (no trailing underscore, no inplace=True), or clone() before the "
    "write.",
    "GS604": "Pass use_reentrant=False, or let an input of the checkpoint require grad (enable_input_require_grads).",
    "GS606": "Look at what the hook returns: it takes the place of the gradient.",
    "GS607": "Keep what goes in where the derivative is finite, before the call and not by where() after it: away from "
    "0 for sqrt, log, division and norm, inside (-1, 1) for acos, small for exp, no row masked wholly for softmax.",
    "GS608": "detach() what is kept from call to call, or go backward once, from the sum of the losses.",
}

# The names that a user knows calls by; a comparison may come back with its sides swapped.
COMPARISONS = dict.fromkeys("eq ne lt le gt ge".split(), "the comparison")
CALLED = {DERIVES: "autograd.grad", "__set__": "assignment", "CheckpointFunction": "checkpoint", **COMPARISONS}
# What helps where the gradient is lost inside a function of torch, which is made to.
ADVICE_INSIDE = {
    "state_dict": "Take dict(module.named_parameters()), or state_dict(keep_vars=True): otherwise it detaches.",
    "stack_module_state": "It gives out new leaves: train those, or stack the parameters with torch.stack().",
}

UNREGISTERED = (
    "used here, and no parameter of the model, since nothing registers what lies in a plain list, dict or attribute. "
    "model.parameters() does not give it to an optimizer."
)
REGISTER = (
    "Keep it in an nn.ModuleList, nn.ModuleDict or nn.ParameterList, or as an nn.Parameter that is not computed from "
    "one (to() after it makes a plain tensor)."
)
UNHELD = "the gradient arrives, and no optimizer that steps in this call holds it."
HOLD = "Make the optimizer last, when the model has its final layers, or add what is new with add_param_group()."


def severity_of(cut: Cut, asked: frozenset[str], crashed: bool) -> Severity:
    """Return how grave a cut is: an error where something asked about loses its gradient."""
    if (crashed and not cut.partial) or (cut.raises and cut.touched & asked):
        return "error"
    if cut.sources & asked:
        return "warning" if cut.escape else "error"
    if (cut.certain and cut.wrong & asked) or cut.nonfinite & asked:
        return "error"
    return "warning" if (cut.touched - cut.benign - cut.elsewhere) & asked else "note"


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


def optimizer_findings(recording: Recording, count: int) -> list[Finding]:
    """Return notes on what gets a gradient and that no optimizer will change.

    It is no parameter of the model, told at the call that uses it first; or none of the optimizers that step holds it.
    """
    names: dict[Site, list[str]] = {}
    for name, value in sorted(recording.unregistered.items()):
        user = next((each for each in recording.operations if value in each.inputs and each.place), None)
        if user is not None and user.place is not None:
            names.setdefault(source_site(user.place, "parameters"), []).append(name)
    notes = [(site, found, f"{listed(found)}: {UNREGISTERED}", REGISTER) for site, found in names.items()]
    training = recording.training
    if training.unheld and training.stepped is not None:
        site = source_site(training.stepped, "step")
        notes.append((site, training.unheld, f"{listed(training.unheld)}: {UNHELD}", HOLD))
    return [
        Finding(
            id=f"F{count + number}",
            rule="GS701",
            name=rule_name("GS701"),
            severity="note",
            message=message,
            path=short_path(site.path),
            line=site.line,
            function=site.function,
            mechanism=site.mechanism,
            how=site.how,
            cuts=tuple(sorted(found)),
            fix=advice,
            source=source_line(site.path, site.line),
            excerpt=excerpt(site.path, site.line),
        )
        for number, (site, found, message, advice) in enumerate(notes, start=1)
    ]


# --- words -------------------------------------------------------------------------------------------


def _confidence(cut: Cut) -> Confidence:
    if cut.escape:
        return "possible"
    return "likely" if not (cut.sources or cut.certain or cut.raises) and (cut.partial or cut.wrong) else "certain"


def _message(cut: Cut, crashed: bool) -> str:
    name = called(cut.site.mechanism)
    place = f"{cut.via} ({name}) in {cut.site.function}" if cut.via else f"{name} in {cut.site.function}"
    if cut.words:
        return f"{place}: {cut.words}"
    if cut.rule.startswith("GS1") and cut.site.mechanism in SWITCHES:
        return _of_region(cut, crashed)
    if crashed and not cut.flat:
        return f"{place}: autograd refuses it."
    return _of_gradient(cut, place) or _of_call(cut, place)


def _of_region(cut: Cut, crashed: bool) -> str:
    given = "(False)" if cut.site.mechanism == "set_grad_enabled" else ""
    region = f"{cut.site.function} runs under {cut.site.mechanism}{given}"
    if crashed and cut.site.mechanism == "inference_mode":
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
    if cut.elsewhere and not cut.sources | cut.partial:
        return " Another backward pass reaches what is cut off here."
    return "" if cut.sources or not cut.partial else " Another path carries a gradient: it is there, and incomplete."


def _what(cut: Cut) -> str:
    return "NaN or infinite" if cut.nonfinite else "zero" if cut.zero else "something else"


def _advice(cut: Cut) -> str:
    site = cut.site
    if site.how == "decorator":
        owner = site.function.rpartition(".")[0]
        given = "self, ..." if owner and not owner.endswith("<locals>") else "..."
        return f"Call the undecorated function: {site.function}.__wrapped__({given}), or the modules inside it."
    family = "GS4" if cut.flat or cut.stepped else cut.rule[:3]
    advice = cut.advice or ADVICE_INSIDE.get(cut.via) or ADVICE.get(cut.rule) or ADVICE.get(site.mechanism)
    return (advice or ADVICE.get(family, "")).format(mechanism=cut.via or called(site.mechanism))


def called(mechanism: str) -> str:
    """Return the name that a user knows a call by: ``deepcopy`` for ``__deepcopy__``."""
    if mechanism in CALLED:
        return CALLED[mechanism]
    return mechanism[2:-2] if mechanism.startswith("__") and mechanism.endswith("__") else mechanism
