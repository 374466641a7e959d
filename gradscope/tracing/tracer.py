"""Trace a subject: run, diagnose, verify, and write it all down as a session."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Collection

import torch

from gradscope._version import __version__
from gradscope.errors import first_line
from gradscope.findings import SEVERITIES, Finding, Source, listed, matches
from gradscope.flow import FlowGraph
from gradscope.paths import short_path
from gradscope.session import Session
from gradscope.tracing.confirm import confirm
from gradscope.tracing.cuts import Cut
from gradscope.tracing.drawing import draw
from gradscope.tracing.older_torch import refuse_old_torch
from gradscope.tracing.propagation import reaching
from gradscope.tracing.recording import Recording, Site
from gradscope.tracing.restoring import unhurried_collector
from gradscope.tracing.runner import Runner
from gradscope.tracing.subject import Subject, Workshop
from gradscope.tracing.unanalysed import refuse_unanalysed
from gradscope.tracing.verify import Proof, prove
from gradscope.tracing.wording import called, finding_of, optimizer_findings, outside_findings, severity_of

MOST_NAMED = 4
# So many places at which numbers went out of sight are named.
MOST_PLACES = 3


def trace_subject(subject: Subject, workshop: Workshop, *, verify: bool = True, numeric: bool = False) -> Session:
    """Return the session of one subject; ``numeric`` also takes finite differences.

    Raises:
        UsageError: torch is older than what models are traced with.
        NotAnalysedError: the forward pass failed for a reason that is not autograd's, or gave no
            floating tensor to ask a gradient of.
    """
    refuse_old_torch()
    with unhurried_collector():  # until all that was recorded is freed again
        return _traced(subject, workshop, verify=verify, numeric=numeric)


def _traced(subject: Subject, workshop: Workshop, *, verify: bool, numeric: bool) -> Session:
    started = time.perf_counter()
    proof = prove(Runner(subject, workshop), verify=verify)
    recording = proof.first.recording
    refuse_unanalysed(subject, recording)
    said = confirm(subject, proof, workshop.device) if numeric else []
    ids = {site: f"F{index}" for index, site in enumerate(_by_severity(proof), start=1)}
    findings = [finding_of(proof.cuts[site], ids, proof) for site in ids]
    findings += outside_findings(proof, len(findings))
    findings += optimizer_findings(recording, len(findings))
    sources = _sources(proof, ids, subject)
    fix_set = [ids[site] for site in proof.fix if site in ids]  # finite differences may show that a cut costs nothing
    session = Session(
        kind="trace",
        verdict=_verdict(proof, findings),
        tool={"name": "gradscope", "version": __version__},
        environment={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.system().lower(),
        },
        target=_target(subject, workshop, recording),
        sources=sources,
        findings=findings,
        fix_set=fix_set,
        fix_verified=proof.verified and bool(fix_set) and not recording.left,
        graph=draw(recording, proof.diagnosis, ids, proof.first.frozen, subject.inputs),
        healed=_healed(proof, subject),
        crash=_crash(proof),
        remedy=subject.remedy,
        remarks=_remarks(subject, workshop, proof, sources.values()) + said,
        unseen=list(dict.fromkeys([*recording.unseen, *_kept_from_before(proof), *_gone_unseen(proof)])),
    )
    session.stats = {"seconds": round(time.perf_counter() - started, 2), "runs": proof.runs,
                     "operations": len(recording.operations)}  # fmt: skip
    return session


def _by_severity(proof: Proof) -> list[Site]:
    """Return the cuts in the order met, the grave ones first: a note has no business in front of an error."""
    crashed = proof.first.recording.error is not None
    sites = [site for site, cut in proof.cuts.items() if cut.touched or crashed]
    return sorted(sites, key=lambda site: SEVERITIES.index(severity_of(proof.cuts[site], proof.asked, crashed)))


# --- the parts of a session ------------------------------------------------------------------------


def _healed(proof: Proof, subject: Subject) -> FlowGraph | None:
    """Draw the run in which the gradient arrived; None where there was none."""
    if proof.healed is None or proof.healed_diagnosis is None:
        return None
    return draw(proof.healed.recording, proof.healed_diagnosis, {}, proof.first.frozen, subject.inputs)


def _verdict(proof: Proof, findings: list[Finding]) -> str:
    if proof.first.recording.error is not None or _raising(proof) is not None:
        return "crashes"
    if any(finding.severity == "error" for finding in findings):
        return "blocked"
    lost = {name for cut in proof.cuts.values() for name in cut.sources | cut.partial | cut.wrong}
    return "partial" if lost & proof.asked else "flows"


def _raising(proof: Proof) -> Cut | None:
    """Return the cut at which the backward pass for what is asked about ends with an exception, as it was given.

    One that shows behind other cuts only would raise once those are gone.
    """
    return next((cut for cut in proof.diagnosis.cuts.values() if cut.raises and cut.touched & proof.asked), None)


def _target(subject: Subject, workshop: Workshop, recording: Recording) -> dict[str, object]:
    first = next(iter(recording.leaves.values()), None)
    dtype = recording.values[first].detail.rpartition(" ")[2] if subject.borrowed and first is not None else ""
    return {
        "name": subject.name,
        "entry": subject.entry,
        "mode": workshop.mode,
        "device": workshop.device.type,
        "dtype": dtype or str(workshop.dtype).removeprefix("torch."),
        "inputs": list(subject.inputs),
        "wrt": list(subject.wrt),
    }


def _sources(proof: Proof, ids: dict[Site, str], subject: Subject) -> dict[str, Source]:
    crashed = proof.first.recording.error is not None
    sources: dict[str, Source] = {}
    for name, seen in proof.diagnosis.statuses.items():
        if subject.wrt and not matches(name, subject.wrt):
            continue
        status = seen
        found = [ids[site] for site, cut in proof.cuts.items() if name in cut.touched]
        if crashed:
            healed = proof.healed.recording.reached if proof.healed else frozenset()
            status = "blocked" if name in healed or not proof.verified else "unused"
            found = list(ids.values()) if status == "blocked" else []
        sources[name] = Source(
            name=name,
            kind="parameter" if name in proof.first.parameters else "input",
            status=status,
            frozen=name in proof.first.parameters and subject.is_frozen(name, proof.first.frozen),
            findings=found,
            gradient=proof.first.gradients.get(name) if proof.first.measured else None,
        )
    return sources


def _crash(proof: Proof) -> dict[str, object] | None:
    recording = proof.first.recording
    if recording.error is None:
        raising = _raising(proof)
        if raising is None:
            return None
        kind, _, message = recording.backward_error.partition(": ")
        return {
            "phase": "backward",
            "exception": kind or "RuntimeError",
            "message": (message or raising.error or raising.words).strip().splitlines()[0],
            "path": short_path(raising.site.path),
            "line": raising.site.line,
            "module": raising.module,
        }
    pending = recording.pending
    place = pending.place if pending else None
    modules = [scope.module for scope in recording.ancestors(pending.scope)] if pending else []
    return {
        "phase": "forward",
        "exception": type(recording.error).__name__,
        "message": first_line(recording.error),
        "path": short_path(place.code.co_filename) if place else "",
        "line": place.line if place else 0,
        "module": modules[-1] if modules else "",
    }


def _gone_unseen(proof: Proof) -> list[str]:
    """Name the places where numbers left torch and no finding tells what that costs."""
    return [
        f"{called(site.mechanism)} at {short_path(site.path)}:{site.line} takes numbers out of torch, where nothing "
        "follows them: whether the result needs them is not known (--numeric asks it)."
        for site in proof.diagnosis.untold[:MOST_PLACES]
    ]


def _kept_from_before(proof: Proof) -> list[str]:
    """Name the tensors that the model kept in an attribute and used in place of a parameter that came out unused."""
    values, diagnosis = proof.first.recording.values, proof.diagnosis
    unused = {name for name in proof.asked if diagnosis.statuses.get(name) == "unused"}
    details = {values[proof.first.recording.leaves[name]].detail: name for name in sorted(unused)}
    kept = {values[number].name: details[values[number].detail] for number in sorted(diagnosis.live)
            if values[number].name and not values[number].leaf and values[number].detail in details}  # fmt: skip
    return [
        f"The result uses {name}, which was computed before the run and kept: whether {source} is in it is not known."
        for name, source in kept.items()
    ]


def _remarks(subject: Subject, workshop: Workshop, proof: Proof, sources: Collection[Source]) -> list[str]:
    remarks = list(subject.remarks)
    if proof.as_given:
        remarks.append(proof.as_given)
    if proof.first.recording.went_back:
        remarks.append("The target goes backward itself: its sources are judged by what it goes backward from.")
    if workshop.mode == "structural":
        if workshop.device.type != "cpu":
            remarks.append(
                f"The {workshop.device.type} device was pretended with fake tensors: shapes, devices and "
                "autograd are true, no number was computed."
            )
        else:
            remarks.append(
                "Fake tensors: shapes and autograd are true, no number was computed. Whether a gradient is zero or NaN "
                "shows in real mode."
            )
    statuses = {source.status for source in sources}
    if statuses == {"unused"} and not proof.diagnosis.untold:
        remarks.append("None of the sources asked about is used for the result: there is no gradient to arrive.")
    elif {source.status for source in sources if source.name in proof.asked} == {"unused"}:
        remarks.append("None of what trains is used for the result: whatever else a gradient may reach is frozen.")
    return remarks + _on_frozen(subject, proof, statuses) + _on_unused(proof, sources)


def _on_frozen(subject: Subject, proof: Proof, statuses: set[str]) -> list[str]:
    """Say what is frozen, by whom, and what no optimizer holds."""
    remarks: list[str] = []
    frozen = proof.first.frozen - proof.first.froze
    if frozen and not proof.as_given:
        remarks.append(
            f"{len(frozen)} frozen parameters were unfrozen for the run and frozen again: frozen is not blocked."
        )
    if proof.first.froze:
        remarks.append(f"The call itself freezes {_by_module(sorted(proof.first.froze))}: no gradient comes there.")
    missing = sorted(name for name in proof.first.unasked if proof.diagnosis.statuses.get(name) == "blocked")
    if missing:
        remarks.append(f"No optimizer that steps here holds {_by_module(missing)}: no gradient is wanted there.")
    if _is_all_frozen(subject, proof) and statuses == {"flows"}:
        remarks.append(
            'As given, nothing requires a gradient: backward() from the result raises "element 0 of tensors does not '
            'require grad and does not have a grad_fn".'
        )
    return remarks


def _on_unused(proof: Proof, sources: Collection[Source]) -> list[str]:
    """Name the parameters that the result does not depend on, but for those whose numbers may matter unseen."""
    recording = proof.first.recording
    gone = reaching(recording, recording.escapes)
    unused = [source.name for source in sources if source.kind == "parameter" and source.status == "unused"
              and recording.leaves[source.name] not in gone]  # fmt: skip
    if not unused or all(source.status == "unused" for source in sources):
        return []
    return [
        f"The result does not depend on {_by_module(unused)}: no gradient comes there, of which "
        "DistributedDataParallel complains (find_unused_parameters)."
    ]


def _is_all_frozen(subject: Subject, proof: Proof) -> bool:
    """Tell whether nothing trains as the target was given: then everything is asked about."""
    first = proof.first
    return not (subject.wrt or subject.trainable or first.parameters - first.frozen) and first.parameters <= first.asked


def _by_module(names: list[str]) -> str:
    """Name parameters by their modules, the first few."""
    owners = Counter(name if name.startswith("input.") else name.rpartition(".")[0] or name for name in names)
    some = [f"{owner} ({count})" if count > 1 else owner for owner, count in owners.items()]
    return listed(some, MOST_NAMED)
