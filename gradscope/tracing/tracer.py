"""Trace a subject: run, diagnose, verify, and write it all down as a session."""

from __future__ import annotations

import platform
import time

import torch

from gradscope._version import version
from gradscope.errors import NotAnalysedError
from gradscope.findings import Finding, Source
from gradscope.paths import short_path
from gradscope.rules import rule_name
from gradscope.session import Session
from gradscope.tracing.diagnose import Cut, Diagnosis
from gradscope.tracing.drawing import draw
from gradscope.tracing.frames import source_line
from gradscope.tracing.recording import Recording, Site
from gradscope.tracing.runner import Runner
from gradscope.tracing.subject import Subject, Workshop
from gradscope.tracing.verify import Proof, prove

AUTOGRAD_ERRORS = ("inference tensor", "Inference tensor", "does not require grad", "modified by an inplace")


def trace_subject(subject: Subject, workshop: Workshop, *, verify: bool = True) -> Session:
    """Return the session of one subject.

    Raises:
        NotAnalysedError: the forward pass failed for a reason that is not autograd's, or gave no
            floating tensor to ask a gradient of.
    """
    started = time.perf_counter()
    proof = prove(Runner(subject, workshop), verify=verify)
    recording = proof.first.recording
    _refuse_unanalysed(subject, recording)
    ids = {site: f"F{index}" for index, site in enumerate(proof.cuts, start=1)}
    findings = [_finding(cut, ids, proof) for cut in proof.cuts.values()]
    findings += _outside_findings(proof, len(findings))
    session = Session(
        kind="trace",
        verdict=_verdict(recording, proof.diagnosis),
        tool={"name": "gradscope", "version": version()},
        environment={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.system().lower(),
        },
        target=_target(subject, workshop),
        sources=_sources(proof, ids),
        findings=findings,
        fix_set=[ids[site] for site in proof.fix],
        fix_verified=proof.verified,
        graph=draw(recording, proof.diagnosis, ids, proof.first.frozen, subject.inputs),
        crash=_crash(recording),
        remedy=subject.remedy,
        remarks=_remarks(subject, workshop, proof),
        unseen=list(recording.unseen),
    )
    session.stats = {"seconds": round(time.perf_counter() - started, 2), "runs": proof.runs,
                     "operations": len(recording.operations)}  # fmt: skip
    return session


# --- the parts of a session ------------------------------------------------------------------------


def _refuse_unanalysed(subject: Subject, recording: Recording) -> None:
    error = recording.error
    if error is not None and not any(text in str(error) for text in AUTOGRAD_ERRORS):
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotAnalysedError(
            f"{subject.name} could not be run: its forward pass raised {type(error).__name__}: {first_line}",
            hint="Check the input (`--input`), the device and the mode (`--mode real` runs without pretending).",
        ) from error
    if error is None and not recording.sinks:
        raise NotAnalysedError(
            f"{subject.name}.{subject.entry} returned no floating-point tensor: there is nothing to ask a gradient of."
        )


def _verdict(recording: Recording, diagnosis: Diagnosis) -> str:
    if recording.error is not None:
        return "crashes"
    return "blocked" if diagnosis.blocked else "flows"


def _target(subject: Subject, workshop: Workshop) -> dict[str, object]:
    return {
        "name": subject.name,
        "entry": subject.entry,
        "mode": workshop.mode,
        "device": workshop.device.type,
        "dtype": str(workshop.dtype).removeprefix("torch."),
        "inputs": list(subject.inputs),
    }


def _sources(proof: Proof, ids: dict[Site, str]) -> dict[str, Source]:
    crashed = proof.first.recording.error is not None
    sources: dict[str, Source] = {}
    for name, seen in proof.diagnosis.statuses.items():
        status = seen
        found = [ids[site] for site, cut in proof.cuts.items() if name in cut.sources]
        if crashed:
            healed = proof.healed.recording.reached if proof.healed else frozenset()
            status = "blocked" if name in healed or not proof.verified else "unused"
            found = list(ids.values()) if status == "blocked" else []
        sources[name] = Source(
            name=name,
            kind="parameter" if name in proof.first.parameters else "input",
            status=status,
            frozen=name in proof.first.frozen,
            findings=found,
        )
    return sources


def _finding(cut: Cut, ids: dict[Site, str], proof: Proof) -> Finding:
    site = cut.site
    hidden = proof.hidden_by.get(site)
    crashed = proof.first.recording.error is not None
    return Finding(
        id=ids[site],
        rule=cut.rule,
        name=rule_name(cut.rule),
        severity="error",
        confidence="certain",
        message=_message(cut, crashed),
        path=short_path(site.path),
        line=site.line,
        end_line=site.line,
        function=site.function,
        module=cut.module,
        mechanism=site.mechanism,
        how=site.how,
        cuts=tuple(sorted(cut.sources)),
        behind=ids.get(hidden) if hidden else None,
        verified=proof.verified and site in proof.fix,
        fix=_advice(cut),
        chain=(*cut.chain, site.function) if site.how == "decorator" else cut.chain,
        source=source_line(site.path, site.line),
    )


def _message(cut: Cut, crashed: bool) -> str:
    site = cut.site
    if cut.rule.startswith("GS1"):
        place = f"{site.function} runs under {site.mechanism}"
        if crashed:
            return f"{place}: it returns inference tensors, which autograd refuses to save for backward."
        return f"{place}: autograd records nothing of what it computes."
    return f"{site.mechanism} in {site.function} gives out a tensor that autograd does not connect to its input."


def _advice(cut: Cut) -> str:
    site = cut.site
    if site.how == "decorator":
        return f"Call the undecorated function: {site.function}.__wrapped__(self, ...), or the modules inside it."
    if cut.rule.startswith("GS1"):
        return f"Do not enter {site.mechanism} here when a gradient is wanted."
    return f"Keep the graph: leave out {site.mechanism} on the path that is trained."


def _outside_findings(proof: Proof, count: int) -> list[Finding]:
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
            )
        )
    return notes


def _crash(recording: Recording) -> dict[str, object] | None:
    if recording.error is None:
        return None
    pending = recording.pending
    place = pending.place if pending else None
    modules = [scope.module for scope in recording.ancestors(pending.scope)] if pending else []
    return {
        "exception": type(recording.error).__name__,
        "message": str(recording.error).strip().splitlines()[0],
        "path": short_path(place.code.co_filename) if place else "",
        "line": place.line if place else 0,
        "module": modules[-1] if modules else "",
    }


def _remarks(subject: Subject, workshop: Workshop, proof: Proof) -> list[str]:
    remarks = list(subject.remarks)
    if workshop.mode == "structural":
        if workshop.device.type != "cpu":
            remarks.append(
                f"The {workshop.device.type} device was pretended with fake tensors: shapes, devices and "
                "autograd are true, no number was computed."
            )
        else:
            remarks.append("Fake tensors: shapes and autograd are true, no number was computed.")
    if proof.first.frozen:
        remarks.append(
            f"{len(proof.first.frozen)} frozen parameters were unfrozen for the run and frozen again: "
            "frozen is not blocked."
        )
    return remarks
