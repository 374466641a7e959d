"""Trace a subject: run, diagnose, verify, and write it all down as a session."""

from __future__ import annotations

import fnmatch
import platform
import time
from collections.abc import Iterable

import torch

from gradscope._version import version
from gradscope.errors import NotAnalysedError
from gradscope.findings import SEVERITIES, Finding, Severity, Source
from gradscope.paths import short_path
from gradscope.rules import rule_name
from gradscope.session import Session
from gradscope.tracing.diagnose import Cut
from gradscope.tracing.drawing import draw
from gradscope.tracing.frames import source_line
from gradscope.tracing.recording import Recording, Site
from gradscope.tracing.runner import Run, Runner
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
    proof = prove(Runner(subject, workshop), lambda run: asked_for(subject, run), verify=verify)
    recording = proof.first.recording
    _refuse_unanalysed(subject, recording)
    asked = asked_for(subject, proof.first)
    ids = {site: f"F{index}" for index, site in enumerate(_by_severity(proof, asked), start=1)}
    findings = [_finding(proof.cuts[site], ids, proof, asked) for site in ids]
    findings += _outside_findings(proof, len(findings))
    sources = _sources(proof, ids, subject)
    session = Session(
        kind="trace",
        verdict=_verdict(recording, findings),
        tool={"name": "gradscope", "version": version()},
        environment={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.system().lower(),
        },
        target=_target(subject, workshop),
        sources=sources,
        findings=findings,
        fix_set=[ids[site] for site in proof.fix],
        fix_verified=proof.verified and not recording.left,
        graph=draw(recording, proof.diagnosis, ids, proof.first.frozen, subject.inputs),
        crash=_crash(recording),
        remedy=subject.remedy,
        remarks=_remarks(subject, workshop, proof, sources.values()),
        unseen=list(dict.fromkeys(recording.unseen)),
    )
    session.stats = {"seconds": round(time.perf_counter() - started, 2), "runs": proof.runs,
                     "operations": len(recording.operations)}  # fmt: skip
    return session


def asked_for(subject: Subject, run: Run) -> frozenset[str]:
    """Return the sources whose gradient is wanted: those that ``wrt`` names; else what trains.

    An input counts where its ``requires_grad`` was on. Where nothing trains, everything is asked about.
    """
    names = list(run.recording.leaves)
    if subject.wrt:
        return frozenset(name for name in names if _matches(name, subject.wrt))
    trained = {name for name in run.parameters if not _is_frozen(name, run, subject)} | run.wanted
    return frozenset(trained or names)


def _is_frozen(name: str, run: Run, subject: Subject) -> bool:
    return not _matches(name, subject.trainable) if subject.trainable else name in run.frozen


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for pattern in patterns)


def _by_severity(proof: Proof, asked: frozenset[str]) -> list[Site]:
    """Return the cuts in the order met, the grave ones first: a note has no business in front of an error."""
    crashed = proof.first.recording.error is not None
    sites = list(proof.cuts)
    return sorted(sites, key=lambda site: SEVERITIES.index(_severity(proof.cuts[site], asked, crashed)))


def _severity(cut: Cut, asked: frozenset[str], crashed: bool) -> Severity:
    if crashed:
        return "error"
    if cut.sources & asked:
        return "warning" if cut.escape else "error"
    return "warning" if cut.partial & asked else "note"


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


def _verdict(recording: Recording, findings: list[Finding]) -> str:
    if recording.error is not None:
        return "crashes"
    severities = {finding.severity for finding in findings}
    return "blocked" if "error" in severities else "partial" if "warning" in severities else "flows"


def _target(subject: Subject, workshop: Workshop) -> dict[str, object]:
    return {
        "name": subject.name,
        "entry": subject.entry,
        "mode": workshop.mode,
        "device": workshop.device.type,
        "dtype": str(workshop.dtype).removeprefix("torch."),
        "inputs": list(subject.inputs),
    }


def _sources(proof: Proof, ids: dict[Site, str], subject: Subject) -> dict[str, Source]:
    crashed = proof.first.recording.error is not None
    sources: dict[str, Source] = {}
    for name, seen in proof.diagnosis.statuses.items():
        if subject.wrt and not _matches(name, subject.wrt):
            continue
        status = seen
        found = [ids[site] for site, cut in proof.cuts.items() if name in cut.sources or name in cut.partial]
        if crashed:
            healed = proof.healed.recording.reached if proof.healed else frozenset()
            status = "blocked" if name in healed or not proof.verified else "unused"
            found = list(ids.values()) if status == "blocked" else []
        sources[name] = Source(
            name=name,
            kind="parameter" if name in proof.first.parameters else "input",
            status=status,
            frozen=name in proof.first.parameters and _is_frozen(name, proof.first, subject),
            findings=found,
        )
    return sources


def _finding(cut: Cut, ids: dict[Site, str], proof: Proof, asked: frozenset[str]) -> Finding:
    site = cut.site
    hidden = proof.hidden_by.get(site)
    crashed = proof.first.recording.error is not None
    return Finding(
        id=ids[site],
        rule=cut.rule,
        name=rule_name(cut.rule),
        severity=_severity(cut, asked, crashed),
        confidence="possible" if cut.escape else "likely" if not cut.sources and cut.partial else "certain",
        message=_message(cut, crashed),
        path=short_path(site.path),
        line=site.line,
        end_line=site.line,
        function=site.function,
        module=cut.module,
        mechanism=site.mechanism,
        how=site.how,
        cuts=tuple(sorted(cut.sources | cut.partial)),
        behind=ids.get(hidden) if hidden else None,
        verified=proof.verified and site in proof.fix,
        fix=_advice(cut),
        chain=(*cut.chain, site.function) if site.how == "decorator" else cut.chain,
        source=source_line(site.path, site.line),
    )


def _message(cut: Cut, crashed: bool) -> str:
    site = cut.site
    also = "" if cut.sources or not cut.partial else " Another path carries a gradient, so it is there and incomplete."
    if cut.rule.startswith("GS1"):
        place = f"{site.function} runs under {site.mechanism}"
        if crashed:
            return f"{place}: it returns inference tensors, which autograd refuses to save for backward."
        return f"{place}: autograd records nothing of what it computes.{also}"
    if cut.flat:
        return f"{site.mechanism} in {site.function} has no useful derivative: nothing that is unblocked can help."
    if cut.escape or cut.rule.startswith("GS3"):
        return f"{site.mechanism} in {site.function} takes the numbers into Python, where no gradient follows."
    return f"{site.mechanism} in {site.function} gives out a tensor that autograd does not connect to its input.{also}"


def _advice(cut: Cut) -> str:
    site = cut.site
    if site.how == "decorator":
        return f"Call the undecorated function: {site.function}.__wrapped__(self, ...), or the modules inside it."
    if cut.rule.startswith("GS1"):
        return f"Do not enter {site.mechanism} here when a gradient is wanted."
    if cut.flat:
        return f"Put a differentiable surrogate in the place of {site.mechanism} (straight-through, softmax, Gumbel)."
    if cut.rule.startswith("GS3"):
        return "Keep the value a tensor on this path."
    if cut.rule.startswith("GS5"):
        return "Give the function a backward, or register one for the operator."
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


def _remarks(subject: Subject, workshop: Workshop, proof: Proof, sources: Iterable[Source]) -> list[str]:
    remarks = list(subject.remarks)
    if workshop.mode == "structural":
        if workshop.device.type != "cpu":
            remarks.append(
                f"The {workshop.device.type} device was pretended with fake tensors: shapes, devices and "
                "autograd are true, no number was computed."
            )
        else:
            remarks.append("Fake tensors: shapes and autograd are true, no number was computed.")
    statuses = {source.status for source in sources}
    if statuses == {"unused"}:
        remarks.append("None of the sources asked about is used for the result: there is no gradient to arrive.")
    if proof.first.frozen:
        remarks.append(
            f"{len(proof.first.frozen)} frozen parameters were unfrozen for the run and frozen again: "
            "frozen is not blocked."
        )
    return remarks
