"""Take the cuts away and run again, until the gradient arrives; then make the set small.

A cut counts as part of the fix only if a run showed it: with the whole set neutralised the gradient
arrives, and without this one it does not (shown by a further run, or by the first one where
``Diagnosis.needs`` says that it lies on every path).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gradscope.tracing.diagnose import Cut, Diagnosis, crash_cuts, diagnose
from gradscope.tracing.recording import Site
from gradscope.tracing.runner import Run, Runner

MOST_ROUNDS = 12


@dataclass(slots=True)
class Proof:
    """The first run, every cut by layer, and the smallest set whose removal lets the gradient through."""

    first: Run
    diagnosis: Diagnosis
    cuts: dict[Site, Cut] = field(default_factory=dict)
    hidden_by: dict[Site, Site] = field(default_factory=dict)
    fix: tuple[Site, ...] = ()
    verified: bool = False
    healed: Run | None = None
    runs: int = 1


def prove(runner: Runner, *, verify: bool = True) -> Proof:
    """Diagnose a subject and, where asked, find and verify the smallest fix."""
    first = runner.run()
    diagnosis = diagnose(first.recording)
    proof = Proof(first, diagnosis, cuts=_cuts_of(first, diagnosis))
    for cut in proof.cuts.values():
        if cut.outer is not None:
            proof.hidden_by[cut.site] = cut.outer
    if verify and proof.cuts:
        _peel(runner, proof)
        if proof.verified:
            _minimise(runner, proof)
    return proof


def _cuts_of(run: Run, diagnosis: Diagnosis) -> dict[Site, Cut]:
    return crash_cuts(run.recording) if run.recording.error is not None else dict(diagnosis.cuts)


def _peel(runner: Runner, proof: Proof) -> None:
    """Neutralise what was found, run, and add what that uncovers."""
    wanted = proof.diagnosis.blocked or set(proof.first.recording.leaves)
    removed = _removable(proof.cuts)
    newest = removed
    while newest and proof.runs < MOST_ROUNDS:
        run = runner.run(frozenset(removed))
        proof.runs += 1
        diagnosis = diagnose(run.recording)
        if _arrives(run, diagnosis, wanted):
            proof.healed, proof.verified, proof.fix = run, True, tuple(removed)
            return
        found = {site: cut for site, cut in _cuts_of(run, diagnosis).items() if site not in proof.cuts}
        for site, cut in found.items():
            proof.cuts[site] = cut
            proof.hidden_by[site] = cut.outer or newest[-1]
        newest = _removable(found)
        removed = removed + newest


def _minimise(runner: Runner, proof: Proof) -> None:
    """Drop from the fix whatever the gradient does not need."""
    wanted = proof.diagnosis.blocked or set(proof.first.recording.leaves)
    kept = list(proof.fix)
    for site in proof.fix:
        if len(kept) == 1:
            break
        if proof.diagnosis.needs(site):
            continue  # the first run itself shows it: no further run can say otherwise
        without = frozenset(kept) - {site}
        run = runner.run(without)
        proof.runs += 1
        if _arrives(run, diagnose(run.recording), wanted):
            kept.remove(site)
    proof.fix = tuple(kept)


def _arrives(run: Run, diagnosis: Diagnosis, wanted: set[str]) -> bool:
    reachable = {name for name in wanted if diagnosis.statuses.get(name) != "unused"}
    return run.recording.error is None and bool(reachable) and reachable <= run.recording.reached


def _removable(cuts: dict[Site, Cut]) -> list[Site]:
    """Return the sites that a run can do without: switches, and not single operations."""
    return [site for site, cut in cuts.items() if cut.rule.startswith("GS1")]
