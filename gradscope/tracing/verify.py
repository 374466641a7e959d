"""Take the cuts away and run again, until the gradient arrives; then make the set small.

A cut counts as part of the fix only if a run showed it: with the whole set neutralised the gradient
arrives, and without this one it does not (shown by a further run, or by the first one where
``Diagnosis.needs`` says that it lies on every path).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gradscope.errors import first_line
from gradscope.tracing.calls import MENDABLE
from gradscope.tracing.cuts import SWITCHES, Cut
from gradscope.tracing.diagnose import Diagnosis, diagnose
from gradscope.tracing.outcome import Pass, Run
from gradscope.tracing.recording import Site
from gradscope.tracing.refused import crash_cuts, is_autograds
from gradscope.tracing.runner import Runner
from gradscope.tracing.unanalysed import needs_numbers

MOST_ROUNDS = 12


@dataclass(slots=True)
class Proof:
    """The first run, every cut by layer, and the smallest set whose removal lets the gradient through.

    ``as_given`` says why only what is asked about was made to require a gradient; empty where everything was.
    """

    first: Run
    diagnosis: Diagnosis
    cuts: dict[Site, Cut] = field(default_factory=dict)
    hidden_by: dict[Site, Site] = field(default_factory=dict)
    fix: tuple[Site, ...] = ()
    verified: bool = False
    healed: Run | None = None
    healed_diagnosis: Diagnosis | None = None
    wanted: frozenset[str] = frozenset()
    runs: int = 1
    as_given: str = ""

    @property
    def asked(self) -> frozenset[str]:
        """Return the sources whose gradient is wanted."""
        return self.first.asked


def prove(runner: Runner, *, verify: bool = True) -> Proof:
    """Diagnose a subject and, where asked, find and verify the smallest fix for the sources asked about."""
    first, diagnosis, said, runs = _first(runner)
    names = first.asked
    wanted = frozenset(diagnosis.blocked & names) or (names if first.recording.error is not None else frozenset())
    proof = Proof(first, diagnosis, cuts=_cuts_of(first, diagnosis), wanted=wanted, runs=runs, as_given=said)
    for cut in proof.cuts.values():
        if cut.outer is not None:
            proof.hidden_by[cut.site] = cut.outer
    if verify and proof.cuts and wanted:
        _peel(runner, proof)
        if proof.verified:
            _minimise(runner, proof)
    return proof


def _first(runner: Runner) -> tuple[Run, Diagnosis, str, int]:
    """Return the run to judge by: with every source requiring a gradient, or as the user runs it where that differs.

    A reentrant checkpoint gives no gradient unless one of its inputs requires one, and an input that is written in
    place, weighs a loss or stands for a number is refused only where it requires one: there, what nobody asked about
    may not be made to.
    """
    first, runs = _run_back(runner, as_given=False)
    recording, diagnosis = first.recording, diagnose(first.recording)
    everything = first.asked >= set(recording.leaves)
    if recording.error is not None and not everything and not needs_numbers(recording.error):
        given, more = _run_back(runner, as_given=True)
        said = f"Only what is asked about was made to require a gradient: with all of it, {first_line(recording.error)}"
        if given.recording.error is None or (is_autograds(recording.error) and not is_autograds(given.recording.error)):
            return given, diagnose(given.recording), said, runs + more
        runs += more
    elif not everything and recording.reentrant:
        given, more = _run_back(runner, as_given=True)
        seen = diagnose(given.recording)
        said = "Only what is asked about was made to require a gradient: reentrant checkpoints depend on it."
        if seen.blocked - diagnosis.blocked:
            return given, seen, said, runs + more
        runs += more
    return first, diagnosis, "", runs


def _run_back(runner: Runner, *, as_given: bool) -> tuple[Run, int]:
    """Run forward and backward; where something came from nowhere or came to nothing, again with a closer look."""
    run = runner.run(backward="plain", as_given=as_given)
    lost_sight = _lost_sight(runner, run)
    if not (run.troubled or lost_sight):
        return run, 1
    look: Pass = "watched" if run.troubled else "plain"
    return runner.run(backward=look, as_given=as_given, dispatched=lost_sight), 2


def _lost_sight(runner: Runner, run: Run) -> bool:
    """Tell whether to look closer: a module was guessed at, or something seems unused and something is a stranger."""
    if runner.workshop.mode == "structural" or not (run.strangers or run.guesses):
        return False
    if run.guesses:
        return True
    statuses = diagnose(run.recording).statuses
    return any(statuses.get(name) == "unused" for name in run.asked)


def _cuts_of(run: Run, diagnosis: Diagnosis) -> dict[Site, Cut]:
    return crash_cuts(run.recording) if run.recording.error is not None else dict(diagnosis.cuts)


def _peel(runner: Runner, proof: Proof) -> None:
    """Neutralise what was found, run, and add what that uncovers."""
    wanted = proof.wanted
    removed = _removable(proof.cuts)
    newest = removed
    while newest and proof.runs < MOST_ROUNDS:
        run = runner.run(
            frozenset(removed), as_given=bool(proof.as_given), backward="plain", dispatched=proof.first.dispatched
        )
        proof.runs += 1
        diagnosis = diagnose(run.recording)
        if _arrives(run, diagnosis, wanted):
            proof.healed, proof.verified, proof.fix = run, True, tuple(removed)
            proof.healed_diagnosis = diagnosis
            _add_remaining(proof, diagnosis, newest[-1])
            return
        found = {site: cut for site, cut in _cuts_of(run, diagnosis).items() if site not in proof.cuts}
        for site, cut in found.items():
            if run.recording.error is not None:  # with the ones before it gone, autograd refuses this call
                cut.sources |= wanted
            proof.cuts[site] = cut
            proof.hidden_by[site] = cut.outer or newest[-1]
        newest = _removable(found)
        removed = removed + newest


def _add_remaining(proof: Proof, diagnosis: Diagnosis, newest: Site) -> None:
    """Add the cuts that leave the gradient incomplete once it arrives: they lie behind those that are gone."""
    for site, cut in diagnosis.cuts.items():
        if site not in proof.cuts and cut.partial & proof.wanted:
            proof.cuts[site] = cut
            proof.hidden_by[site] = cut.outer or newest


def _minimise(runner: Runner, proof: Proof) -> None:
    """Drop from the fix whatever the gradient does not need."""
    wanted = proof.wanted
    healed = _statuses(proof.healed_diagnosis, wanted)
    kept = list(proof.fix)
    for site in proof.fix:
        if len(kept) == 1:
            break
        if proof.first.recording.error is None and proof.diagnosis.needs(site):
            continue  # the first run itself shows it: no further run can say otherwise
        without = frozenset(kept) - {site}
        run = runner.run(without, as_given=bool(proof.as_given), dispatched=proof.first.dispatched)
        proof.runs += 1
        diagnosis = diagnose(run.recording)
        # As good as with everything removed: a gradient that misses one of its paths is not.
        if _arrives(run, diagnosis, wanted) and _statuses(diagnosis, wanted) == healed:
            kept.remove(site)
        elif site in diagnosis.cuts:
            _learn(proof, site, diagnosis.cuts[site].sources & wanted)
    proof.fix = tuple(kept)


def _learn(proof: Proof, site: Site, sources: set[str]) -> None:
    """Add to a cut what it cuts off once nothing else does; where another one hid that, it lies behind it."""
    cut = proof.cuts[site]
    gained = sources - cut.sources
    others = (other for other in proof.fix if not _lies_behind(proof, other, site))
    hiding = [other for other in others if proof.cuts[other].sources & gained]
    if hiding and not cut.sources & proof.wanted:
        proof.hidden_by.setdefault(site, hiding[0])
    cut.sources |= gained


def _lies_behind(proof: Proof, site: Site, front: Site) -> bool:
    """Tell whether a cut was found behind another one, or behind one that was."""
    while site in proof.hidden_by and site != front:
        site = proof.hidden_by[site]
    return site == front


def _statuses(diagnosis: Diagnosis | None, wanted: frozenset[str]) -> dict[str, str]:
    return {name: diagnosis.statuses.get(name, "") for name in wanted} if diagnosis is not None else {}


def _arrives(run: Run, diagnosis: Diagnosis, wanted: frozenset[str]) -> bool:
    reachable = {name for name in wanted if diagnosis.statuses.get(name) != "unused"}
    arrived = all(run.gradients.get(name, True) is not None for name in reachable)
    if any(cut.raises and cut.touched & reachable for cut in diagnosis.cuts.values()):
        return False
    through = reachable <= run.recording.reached and arrived and not run.recording.left_open
    return run.recording.error is None and bool(reachable) and through


def _removable(cuts: dict[Site, Cut]) -> list[Site]:
    """Return the sites that a run can do without: switches, and calls that can give back their input instead."""
    return [
        site
        for site, cut in cuts.items()
        if (cut.sources or not cut.partial)
        and (
            (cut.rule.startswith("GS1") and site.mechanism in SWITCHES)
            or (site.mechanism in MENDABLE and not cut.flat and not cut.escape)
        )
    ]
