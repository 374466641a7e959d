"""What finite differences change in a diagnosis: lost, in steps, without influence, or silently wrong."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from gradscope.findings import listed
from gradscope.tracing.cuts import Cut, cut_at
from gradscope.tracing.derivatives import CPU
from gradscope.tracing.frames import code_name, source_site
from gradscope.tracing.numeric import Checked, check
from gradscope.tracing.own_passes import CannotCheck
from gradscope.tracing.propagation import Walks, union
from gradscope.tracing.recording import Operation, Recording, Site
from gradscope.tracing.subject import Subject
from gradscope.tracing.verify import Proof

# What a blocked, unused or nondifferentiable source turns out to be.
STATUS_OF = {"lost": "blocked", "differs": "blocked", "flat": "nondifferentiable", "none": "unused"}
# A source of such a status is wrong where finite differences disagree.
SAID_WHOLE = ("flows", "zero")
WRONG_BACKWARD = "its backward is not the derivative of its forward, as finite differences at its own operands show."
CAUSE_UNKNOWN = (
    "finite differences disagree with the gradient of what goes in here; where on its way it goes wrong was not found."
)
LAST_SEEN = (
    "the last that torch sees of these numbers. Finite differences show that the result depends on them: what takes "
    "them from here (a kernel, another library) gives no gradient back."
)
LEFT_TORCH = (
    "finite differences show that a part of the gradient is missing, and the numbers leave torch here: what Python "
    "makes of them (the size of a step, a bound) has no gradient."
)
SHARED_MEMORY = (
    "what is computed of the array has no gradient; or something is written into it, whose memory is the tensor's, and "
    "changes values that backward still needs."
)


def confirm(subject: Subject, proof: Proof, home: torch.device) -> list[str]:
    """Correct the proof's diagnosis by finite differences; return what there is to say about it.

    They are taken on the CPU, and on the model's own device where it does not run there (kernels of a GPU).

    A source that steps are taken for on purpose (a straight-through estimator) keeps its status.
    """
    diagnosis = proof.diagnosis
    if proof.first.recording.error is not None:
        return ["Finite differences were not taken: the forward pass ends with an exception."]
    if proof.first.recording.left:
        return ["Finite differences were not taken: what the call gives out has left torch."]
    asking = functools.partial(
        check, subject, _groups(proof), requiring=frozenset(proof.first.recording.leaves),
        doubted=frozenset(name for name, status in diagnosis.statuses.items() if status in SAID_WHOLE),
        goes_back=proof.first.recording.went_back,
    )  # fmt: skip
    try:
        try:
            checked = asking()
        except CannotCheck:
            if home == CPU:
                raise
            checked = asking(device=home)
    except CannotCheck as error:
        return [f"Finite differences could not be taken. {error.message}"]
    remarks = [f"Finite differences in float64: {len(checked.answers)} sources, {checked.evaluations} forward passes."]
    for name, answer in checked.answers.items():
        status = diagnosis.statuses[name]
        if status in ("blocked", "unused", "nondifferentiable") and answer in STATUS_OF:
            _settle(proof, name, STATUS_OF[answer])
        elif status in ("partial", "flows") and answer in ("agrees", "none"):
            _clear(proof, name)
    spoiled = {name for cut in proof.cuts.values() for name in cut.wrong}
    # What a hook computes the numeric check does not ask for.
    wrong = {name for name, answer in checked.answers.items() if answer == "differs"
             and (diagnosis.statuses[name] in SAID_WHOLE or name in spoiled)}  # fmt: skip
    wrong -= proof.first.recording.by_hook
    remarks += _blame_wrong(proof, wrong, checked) if wrong else []
    return remarks + _unanswered(checked)


def _unanswered(checked: Checked) -> list[str]:
    """Say for which sources finite differences tell nothing, and why."""
    named: dict[str, list[str]] = {}
    for name, answer in sorted(checked.answers.items()):
        named.setdefault(answer, []).append(name)
    why = {
        "unclear": "Finite differences do not converge for {}: a kink, or lower precision inside.",
        "refused": "Finite differences could not be taken for {}. Where that is moved: " + checked.refusal,
        "rewritten": "Finite differences were not taken for {}: the call itself gives other values there before use.",
    }
    return [words.replace("{}", listed(named[answer]), 1) for answer, words in why.items() if answer in named]


def _groups(proof: Proof) -> list[frozenset[str]]:
    """Return the sources asked about, grouped by what is thought of them."""
    groups: dict[tuple[str, frozenset[Site]], set[str]] = {}
    for name, status in proof.diagnosis.statuses.items():
        if name in proof.asked:
            cuts = frozenset(site for site, cut in proof.cuts.items() if name in cut.touched)
            groups.setdefault((status, cuts), set()).add(name)
    return [frozenset(names) for names in groups.values()]


def _settle(proof: Proof, name: str, status: str) -> None:
    """Give a source without a gradient the status that the function itself shows."""
    before = proof.diagnosis.statuses[name]
    proof.diagnosis.statuses[name] = status
    for cut in proof.cuts.values():
        if name not in cut.sources:
            continue
        if status == "unused":
            cut.sources.discard(name)
        elif status == "blocked":
            cut.escape = False
        elif before == "blocked":
            cut.stepped.add(name)
    if before == "unused" and status != "unused":
        _blame_last(proof, name, in_steps=status == "nondifferentiable")


def _blame_last(proof: Proof, name: str, *, in_steps: bool) -> None:
    """Name the last call that a source's numbers are seen in, where they reach the result by a way that is not seen."""
    recording = proof.first.recording
    passing = [op for op in _passing(recording, [name])[name] if op.place is not None]
    if not passing:
        recording.unseen.append(
            f"Finite differences say that the output depends on {name}; where its gradient is lost was not seen."
        )
        return
    cut = cut_at(proof.cuts, recording, passing[-1])
    cut.words, cut.certain = cut.words or LAST_SEEN, True
    cut.sources.add(name)
    if in_steps:
        cut.stepped.add(name)


def _clear(proof: Proof, name: str) -> None:
    """Take back that a source misses a part of its gradient, or has a spoiled one: it is what it should be."""
    proof.diagnosis.statuses[name] = "flows"
    for cut in proof.cuts.values():
        if name in cut.partial | cut.wrong:
            cut.partial.discard(name)
            cut.wrong.discard(name)
            cut.benign.add(name)


# --- wrong gradients -----------------------------------------------------------------------------------


def _blame_wrong(proof: Proof, wrong: set[str], checked: Checked) -> list[str]:
    """Name what makes a gradient differ from the derivative: each suspect, where the source's data passes it."""
    recording, diagnosis = proof.first.recording, proof.diagnosis
    remarks: list[str] = []
    passing = _passing(recording, wrong)
    culprits = {each.site for each in checked.derivatives if not each.surrogate}
    surrogates = {each.site for each in checked.derivatives if each.surrogate}
    for name in sorted(wrong):
        sites = [source_site(op.place, op.name) for op in passing[name] if op.place is not None]
        found = [site for site in sites if site in culprits]
        if not found and (name in diagnosis.surrogates or surrogates.intersection(sites)):
            continue
        suspects = _suspects(proof, recording, name, passing[name], found)
        if not suspects and _blame_escapes(proof, name, passing[name]):
            continue
        diagnosis.statuses[name] = "wrong"
        for cut in suspects:
            if cut.site in culprits:
                cut.rule, cut.words = "GS501", WRONG_BACKWARD
            cut.zero.discard(name)
            cut.wrong.add(name)
            cut.certain = True
        if not suspects:
            _blame_entrance(proof, recording, name, passing[name])
    off = [abs(checked.off[name]) for name in wrong if diagnosis.statuses[name] == "wrong" and name in checked.off]
    if off:
        least, most = (f"{100 * each:.2g} %" for each in (min(off), max(off)))
        remarks.append(f"A wrong gradient is off by {least if least == most else f'{least} to {most}'}.")
    kept = wrong - {name for name, status in diagnosis.statuses.items() if status in ("wrong", "partial")}
    if kept:
        where = sorted({f"{site.path}:{site.line}" for site in surrogates})
        remarks.append(
            f"{listed(sorted(kept))}: the gradient is a surrogate (straight-through), not the derivative."
            + (f" See {', '.join(where)}." if where else "")
        )
    return remarks


def _blame_escapes(proof: Proof, name: str, passing: list[Operation]) -> bool:
    """Name the calls that took numbers of a source out of torch, where it goes on: what Python makes of them counts."""
    recording = proof.first.recording
    values = {value for operation in passing for value in operation.outputs} | {recording.leaves[name]}
    live = proof.diagnosis.live
    last = max((operation.index for operation in passing if live.intersection(operation.outputs)), default=0)
    left = [each for each in recording.escapes
            if each.place is not None and each.index < last and values.intersection(each.inputs)]  # fmt: skip
    for operation in left:
        cut = cut_at(proof.cuts, recording, operation)
        cut.words, cut.certain = cut.words or LEFT_TORCH, True
        cut.partial.add(name)
    if left:
        proof.diagnosis.statuses[name] = "partial"
    return bool(left)


def _blame_entrance(proof: Proof, recording: Recording, name: str, passing: list[Operation]) -> None:
    """Name the call that takes a source in, where nothing on its way is known to err."""
    first = next((operation for operation in passing if operation.place is not None), None)
    if first is not None and first.place is not None:
        cut = cut_at(proof.cuts, recording, first)
        cut.words, cut.certain = CAUSE_UNKNOWN, True
        cut.wrong.add(name)


def _passing(recording: Recording, names: Iterable[str]) -> dict[str, list[Operation]]:
    bits = {name: 1 << index for index, name in enumerate(sorted(names))}
    walks = Walks(recording, {name: recording.leaves[name] for name in bits}, bits)
    return {
        name: [op for op in recording.operations if union(walks.data, op.inputs) & bit] for name, bit in bits.items()
    }


def _suspects(
    proof: Proof, recording: Recording, name: str, passing: list[Operation], functions: list[Site]
) -> list[Cut]:
    """Return the cuts to blame: a custom function with a wrong backward, an unseen write, a hook, a numpy view."""
    cuts = proof.cuts
    if functions:
        return [cuts.setdefault(site, Cut(site, "GS501")) for site in functions]
    written = [cut for cut in cuts.values()
               if name in cut.wrong | cut.nonfinite or (cut.rule == "GS606" and name in cut.zero)]  # fmt: skip
    if written:
        return written
    values = {value for op in passing for value in op.outputs} | {recording.leaves[name]}
    hooks = [place for value, place in recording.hooks.items() if value in values]
    hooks += [op.place for op in passing if op.name == "BackwardHookFunction" and op.place is not None]
    if hooks:
        sites = {source_site(place, "register_hook"): code_name(place.code) for place in hooks}
        return [cuts.setdefault(site, Cut(site, "GS606", chain=(code,))) for site, code in sites.items()]
    escapes = [op for op in recording.escapes if op.name == "numpy" and op.place and set(op.inputs) & values]
    return [cuts.setdefault(site, Cut(site, "GS603", words=SHARED_MEMORY))
            for site in dict.fromkeys(source_site(op.place, op.name) for op in escapes if op.place)]  # fmt: skip
