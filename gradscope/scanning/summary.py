"""From judgements to the session: findings with source and advice, entries, remarks; what was asked, and ignored."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from gradscope._version import __version__
from gradscope.errors import UsageError
from gradscope.findings import SEVERITIES, Excerpt, Finding
from gradscope.gate import codes, scan_verdict
from gradscope.paths import short_path
from gradscope.rules import rule_name
from gradscope.scanning.borrowing import borrowed
from gradscope.scanning.collect import Collected
from gradscope.scanning.entries import ClassReport, Entry
from gradscope.scanning.facts import Site
from gradscope.scanning.judge import Judge
from gradscope.scanning.judgement import Judgement, where
from gradscope.scanning.package import Place
from gradscope.scanning.reach import FORWARDS, Chain
from gradscope.scanning.reading import decode
from gradscope.scanning.steps import steps as steps_of
from gradscope.scanning.unfollowed import makers_not_followed, parts_not_followed
from gradscope.session import Session

# So many names are given in one remark.
MOST_NAMED = 5


def session_of(
    judge: Judge, collected: Collected, targets: tuple[str, ...], wanted: tuple[str, ...],
    skipped: list[tuple[str, str]], is_followed: bool,
) -> Session:  # fmt: skip
    asked = _entries_asked(judge, wanted)
    uses = [(entry.place, report.place if report.place != entry.place else None) for report, _, entry in asked]
    judgements = [*judge.judge(), *borrowed(judge, uses, lambda path: decode(collected.texts[path].data).source)]
    judgements.sort(key=_order)
    if wanted:
        on_the_way = {id(site) for _, _, entry in asked if entry.chain for _, site in entry.chain.sites}
        steps = {step for _, _, entry in asked if entry.chain for step in entry.chain.steps}
        judgements = [
            each for each in judgements if on_the_way.intersection(map(id, _sites(each)))
            and (each.chain[0] if each.stands_for else Place(each.facts.module, each.site.function)) in steps
        ]  # fmt: skip
        _weigh_asked(judgements, [entry for report, _, entry in asked if _is_named(report, entry, wanted)])
        judgements.sort(key=_order)
    ids: dict[tuple[int, Place], str] = {}  # by the site and the function that a finding is in
    findings = []
    for number, each in enumerate(judgements, start=1):
        place = Place(each.facts.module, each.site.function)
        ids.update(((id(site), place), f"F{number}") for site in _sites(each))
        findings.append(_finding(f"F{number}", each, judge, collected))
    findings, remarks = _without_ignored(findings, collected)
    remarks += [_not_followed(entry, names) for report, _, entry in asked if not entry.chain
                and (names := parts_not_followed(judge.reach, entry.place, report.place))]  # fmt: skip
    trained = ((entry, owner) for owner, entry in judge.training.trained)
    unknown = makers_not_followed(judge, [*uses, *steps_of(judge.reach), *trained]) if is_followed else []
    if unknown:
        remarks.append(f"What {some(unknown)} gives was not followed: the source does not show of which class it is.")
    own = len(collected.own)
    return Session(
        kind="scan",
        verdict=scan_verdict(findings),
        tool={"name": "gradscope", "version": __version__},
        environment={"python": platform.python_version(), "platform": platform.system().lower()},
        target={"name": " ".join(targets), "entry": ", ".join(wanted)},
        findings=findings,
        entries=[_entry(judge, owner, clean, entry, ids) for owner, clean, entry in asked or _entries(judge)],
        remarks=remarks,
        unseen=[f"{short_path(path)}: {reason}" for path, reason in skipped],
        stats={
            "files": own, "outside": len(collected.texts) - own,
            "parsed": len(collected.parsed), "cached": len(collected.cached),
            "skipped": [{"path": short_path(path), "reason": reason} for path, reason in skipped],
        },
    )  # fmt: skip


def _without_ignored(findings: list[Finding], collected: Collected) -> tuple[list[Finding], list[str]]:
    """Leave out what a ``# gradscope: ignore[...]`` in the statement, or on a line of its own above, is about.

    Returns what is left, and remarks on the comments: how many findings they hid, which hid none.
    """
    ignored: set[str] = set()
    remarks: list[str] = []
    by_place: dict[tuple[str, int], list[Finding]] = {}
    for finding in findings:
        by_place.setdefault((finding.path, finding.line), []).append(finding)
    for text in collected.texts.values():
        path = short_path(text.facts.path) if text.facts.ignores else ""
        for ignore in text.facts.ignores:
            meant = [each for line in range(ignore.first, ignore.last + 1) for each in by_place.get((path, line), ())]
            try:
                chosen = codes(ignore.codes) if ignore.codes else None
            except UsageError as error:
                remarks.append(f"{path}:{ignore.line}: the ignore comment is not understood: {error.message}")
                continue
            hidden = [each.id for each in meant if chosen is None or each.rule in chosen]
            ignored.update(hidden)
            if not hidden:
                remarks.append(f"{path}:{ignore.line}: this ignore comment hides nothing; remove it.")
    if ignored:
        hidden_ones = "1 finding is" if len(ignored) == 1 else f"{len(ignored)} findings are"
        remarks.insert(0, f"{hidden_ones} hidden by ignore comments.")
    return [finding for finding in findings if finding.id not in ignored], remarks


def _weigh_asked(judgements: list[Judgement], methods: list[Entry]) -> None:
    """Let what always stops a method that is asked about be an error: that it is meant for inference is no answer."""
    stopped = {id(site): entry.place.name for entry in methods
               if entry.chain and not (entry.chain.sometimes or entry.chain.partly)
               for _, site in entry.chain.sites if not site.conditional}  # fmt: skip
    for each in judgements:
        name = next((stopped[id(site)] for site in _sites(each) if id(site) in stopped), "")
        if name and each.severity != "error":
            each.severity = "error"
            what = "it" if name == each.site.function else name
            each.message = f"{where(each.site)}: what comes out of {what} carries no gradient."


def _sites(each: Judgement) -> tuple[Site, ...]:
    """Return the sites that a judgement is about: of a call those outside that it comes to."""
    return each.stands_for or (each.site,)


def _is_named(report: ClassReport, entry: Entry, wanted: tuple[str, ...]) -> bool:
    return entry.place.name in wanted or f"{report.place.name}.{entry.place.name.rpartition('.')[2]}" in wanted


def _order(each: Judgement) -> tuple[int, str, int, int]:
    return SEVERITIES.index(each.severity), each.facts.path, each.site.line, each.site.column


def _finding(number: str, each: Judgement, judge: Judge, collected: Collected) -> Finding:
    site, path = each.site, each.facts.path
    excerpt = Excerpt.around(_lines(collected.texts[path].data), site.line, site.end_line)
    advice = each.advice
    if each.severity == "error" and not advice:
        advice = _advice(site.how, site.function, judge, Place(each.facts.module, site.function))
    return Finding(
        id=number, rule=site.rule, name=rule_name(site.rule), severity=each.severity, message=each.message,
        path=short_path(path), line=site.line, confidence=each.confidence, column=site.column, end_line=site.end_line,
        function=site.function, mechanism=site.mechanism, how=site.how, fix=advice,
        chain=tuple(step.name for step in each.chain), excerpt=excerpt,
        source=excerpt.lines[site.line - excerpt.first].strip() if excerpt else "",
    )  # fmt: skip


def _advice(how: str, function: str, judge: Judge, place: Place) -> str:
    owner = judge.reach.owner(place)
    report = judge.report_of.get(owner) if owner else None
    clean = f" The modules inside it are clean: {', '.join(report.clean[:6])}." if report and report.clean else ""
    if how == "decorator":
        return f"Call the undecorated function: {function}.__wrapped__(self, ...).{clean}"
    return f"Leave the switch out where a gradient is wanted.{clean}"


def _entries(judge: Judge) -> list[tuple[ClassReport, list[str], Entry]]:
    reports = sorted(judge.own_reports, key=lambda report: judge.package.files[report.place.module].path)
    return [(report, report.clean, entry) for report in reports for entry in report.entries]


def _entries_asked(judge: Judge, wanted: tuple[str, ...]) -> list[tuple[ClassReport, list[str], Entry]]:
    found: list[tuple[ClassReport, list[str], Entry]] = []
    for name in wanted:
        places = _asked(judge, name)
        if not places:
            raise UsageError(
                f"There is no function or class {name!r} in the source scanned.", hint="Name it as Class.method."
            )
        for place, owner in places:
            chain: Chain | None = judge.reach.chain(place, owner)
            report = ClassReport(owner or place, bool(owner and judge.package.is_module(owner)), [], [])
            clean = judge.entries.clean_components(owner) if owner and chain else []
            found.append((report, clean, Entry(place, "blocked" if chain else "clean", chain)))
    return found


def _not_followed(entry: Entry, names: list[str]) -> str:
    return (
        f"{entry.place.name} also runs {some(names)}: the source scanned does not show of which class, "
        "so it was not followed."
    )


def some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"


def _asked(judge: Judge, name: str) -> list[tuple[Place, Place | None]]:
    """Return the functions that a name means, each with the class of ``self``: a method may be a base class's."""
    found: list[tuple[Place, Place | None]] = []
    owner, _, method = name.rpartition(".")
    for facts in judge.package.own:
        meant = judge.package.method(Place(facts.module, owner), method) if owner in facts.classes else None
        if meant is not None and judge.package.function(meant) is not None:
            found.append((meant, Place(facts.module, owner)))
            continue
        for place in (Place(facts.module, each) for each in facts.functions):
            home, _, short = place.name.rpartition(".")
            is_public = not short.startswith("_") or short in FORWARDS
            if place.name == name or (home == name and is_public):
                found.append((place, judge.reach.owner(place)))
    return found


def _entry(
    judge: Judge, report: ClassReport, clean: Iterable[str], entry: Entry, ids: dict[tuple[int, Place], str]
) -> dict[str, Any]:
    chain = entry.chain
    sites = chain.sites if chain else []
    return {
        "function": entry.place.name,
        "module": entry.place.module,
        "class": report.place.name,
        "is_module": report.is_module,
        "status": entry.status,
        "chain": [_step(judge, place, [site for at, site in sites if at == place]) for place in chain.steps]
        if chain
        else [],
        "findings": list(dict.fromkeys(
            ids[id(site), step] for at, site in sites for step in (at, *(chain.steps if chain else ()))
            if (id(site), step) in ids)),
        "alternatives": list(entry.alternatives),
        "clean": list(clean),
    }  # fmt: skip


def _step(judge: Judge, place: Place, sites: list[Any]) -> dict[str, Any]:
    function = judge.package.function(place)
    return {
        "function": place.name,
        "path": short_path(judge.package.files[place.module].path),
        "line": function.line if function else 0,
        "sites": [{"mechanism": site.mechanism, "line": site.line} for site in sites],
    }


@lru_cache(maxsize=8)  # findings come file by file
def _lines(data: bytes) -> list[str]:
    return decode(data).source.split("\n")
