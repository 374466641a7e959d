"""Scan: targets in, session out. Nothing of the target is imported, compiled to code or run."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from gradscope._version import __version__
from gradscope.errors import NotAnalysedError, UsageError
from gradscope.findings import SEVERITIES, Excerpt, Finding
from gradscope.gate import codes, scan_verdict
from gradscope.paths import short_path
from gradscope.rules import rule_name
from gradscope.scanning.cache import Cache, default_folder, key_of
from gradscope.scanning.collect import Collected, Collector, Settings, Text, default_jobs
from gradscope.scanning.entries import Entry
from gradscope.scanning.judge import ClassReport, Judge, Judgement, where
from gradscope.scanning.package import Package, Place
from gradscope.scanning.reach import FORWARDS, Chain, Reach
from gradscope.scanning.reading import decode, headers
from gradscope.scanning.resolve import Resolved, resolve
from gradscope.scanning.searching import Finder
from gradscope.session import Session

MOST_ROUNDS = 5
# Above so many bytes only the callers of errors are looked for in files without a switch of their own.
LARGE = 8_000_000
# So many attributes are named in one remark.
MOST_NAMED = 5


def scan(
    *targets: str,
    entry: tuple[str, ...] = (),
    jobs: int | None = None,
    cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Session:
    """Find every place in the targets' source that stops gradients, and which public callables reach it.

    Args:
        targets: dotted modules or packages, files, folders, or installed distributions.
        entry: ``Class.method`` names; the findings are then those on the way from these entries.
        jobs: processes to parse with; by default the processors at hand, one where the target is small.
        cache: keep facts and results on disk, keyed by content.
        progress: called with the files parsed and the files to parse.

    Raises:
        UsageError: a target or an entry does not exist.
        NotAnalysedError: the targets hold no Python source that could be read.
    """
    started = time.perf_counter()
    with _without_collection():
        session = _scan(targets, entry, jobs or default_jobs(), cache, progress)
    session.stats["seconds"] = round(time.perf_counter() - started, 3)
    return session


@contextmanager
def _without_collection() -> Iterator[None]:
    """Leave reference cycles be for a while: syntax trees have none, and looking for them is a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if not gc.get_freeze_count():  # to the old generation, or the next collection goes through all of it
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def _scan(
    targets: tuple[str, ...],
    entry: tuple[str, ...],
    jobs: int,
    cache: bool,
    progress: Callable[[int, int], None] | None,
) -> Session:
    resolved = resolve(targets)
    wanted = tuple(dict.fromkeys((*entry, *resolved.entries)))
    store = Cache(default_folder() if cache else None)
    collector = Collector(store, jobs, progress)
    try:
        collector.open(resolved.files.values())
        if not store.is_open:
            return _scanned(collector, resolved, targets, wanted)
        key = _result_key(collector.collected, wanted, resolved)
        kept = store.get([key]).get(key)
        if kept is None:
            session = _scanned(collector, resolved, targets, wanted)
            store.put({key: session.to_dict()})
        else:
            session = Session.restored(kept)
            session.stats.update(parsed=0, cached=session.stats["files"])
    finally:
        collector.close()
        store.close()
    return session


def _result_key(collected: Collected, wanted: tuple[str, ...], resolved: Resolved) -> str:
    parts = [os.getcwd(), repr(wanted), repr(resolved.skipped), __version__]
    parts += [f"{text.file.shown}\0{text.file.module}\0{text.facts.skipped}" for text in collected.texts.values()]
    return key_of(*parts, *(text.data for text in collected.texts.values()))


def _scanned(collector: Collector, resolved: Resolved, targets: tuple[str, ...], wanted: tuple[str, ...]) -> Session:
    judge = _read_in_rounds(collector, wanted)
    skipped = [*resolved.skipped]
    skipped += [
        (text.facts.path, text.facts.skipped) for text in collector.collected.texts.values() if text.facts.skipped
    ]
    if skipped and all(text.facts.skipped for text in collector.collected.texts.values()):
        path, reason = skipped[0]
        raise NotAnalysedError(
            f"Nothing could be scanned: {short_path(path)} {reason}.",
            hint="Scan the Python source, or trace the model.",
        )
    if not collector.collected.texts:
        raise NotAnalysedError(
            f"{' '.join(targets)} holds no Python source.", hint="Name a package or a folder with .py files."
        )
    return _session(judge, collector.collected, targets, wanted, skipped)


# --- rounds ------------------------------------------------------------------------------------------


def _read_in_rounds(collector: Collector, wanted: tuple[str, ...]) -> Judge:
    """Read what matches; again where the package's own wrappers are used; again where stopped functions are called."""
    asked = tuple(f"{word} {name.split('.')[0]}" for name in wanted for word in ("class", "def"))
    texts = collector.collected.texts.values()
    roots = frozenset(text.file.module.partition(".")[0] for text in texts)
    collector.read(Settings(roots, asked))
    finder = Finder(texts, collector.matching)
    for text in texts:
        if not text.facts.parsed and not text.facts.skipped:
            _note_headers(text)
    wrappers: tuple[tuple[str, str], ...] = ()
    for _ in range(MOST_ROUNDS):  # a wrapper may be made of another one
        known = {name for name, _ in wrappers}
        wrappers = tuple(sorted({*wrappers, *(item for text in texts for item in text.facts.wrappers.items())}))
        new = {name.rpartition(".")[2] for name, _ in wrappers if name not in known}
        if not new:
            break
        collector.read(Settings(roots, asked, wrappers), finder.holding(new))
    judge = Judge(Package(text.facts for text in texts))
    goals = _goals(judge, errors_only=sum(len(text.data) for text in texts) > LARGE)
    seen: dict[str, set[str]] = {}
    reach = judge.reach
    for _ in range(MOST_ROUNDS):
        calls = _calls_of(reach.leading_to(goals), reach.package)
        found = {call: owners for call, owners in calls.items() if call not in seen}
        if not found:
            break
        seen |= found
        collector.read(Settings(roots, (*asked, *sorted(seen)), wrappers), finder.calling(found))
        reach = Reach(Package(text.facts for text in texts), {})
    return judge if reach is judge.reach else Judge(reach.package)


def _goals(judge: Judge, *, errors_only: bool) -> set[Place]:
    """Return the stopped functions whose callers are worth looking for."""
    if not errors_only:
        return judge.regions
    return {Place(each.facts.module, each.site.function) for each in judge.judge("GS10") if each.severity == "error"}


def _note_headers(text: Text) -> None:
    if b"class " in text.data:
        decoded = decode(text.data)
        text.facts.skipped = decoded.skipped
        text.facts.headers = headers(decoded.source)


def _calls_of(stopped: set[Place], package: Package) -> dict[str, set[str]]:
    """Return how calls of these functions are written, and for a method how the classes it may be called on are.

    A file that calls ``self.part.encode(...)`` names the class of ``part`` somewhere, so ``.encode(`` alone,
    which every string has too, is not enough to look into it.
    """
    calls: dict[str, set[str]] = {}
    for place in stopped:
        owner, _, name = place.name.rpartition(".")
        is_method = owner in package.files[place.module].classes
        if is_method:
            owners = {each.rpartition(".")[2] for each in package.descendants(owner.rpartition(".")[2])}
            if name in FORWARDS:
                for each in owners:  # also as an annotation: def __init__(self, tower: Tower)
                    calls[each] = set()
            else:  # a base class may call it on self, where it is defined
                bases = (base.name.rpartition(".")[2] for base in package.mro(Place(place.module, owner)))
                calls.setdefault(f".{name}(", set()).update(owners, (f"class {base}" for base in bases))
        elif name and not owner:
            calls[name] = set()  # also without a call: self.run = helper
    return calls | {maker: set() for maker in package.makers_of(calls.keys())}


# --- the session -------------------------------------------------------------------------------------


def _session(
    judge: Judge, collected: Collected, targets: tuple[str, ...], wanted: tuple[str, ...],
    skipped: list[tuple[str, str]],
) -> Session:  # fmt: skip
    judgements = sorted(judge.judge(), key=_order)
    asked = _entries_asked(judge, wanted)
    if wanted:
        on_the_way = {id(site) for _, _, entry in asked if entry.chain for _, site in entry.chain.sites}
        judgements = [each for each in judgements if id(each.site) in on_the_way]
        _weigh_asked(judgements, [entry for report, _, entry in asked if _is_named(report, entry, wanted)])
        judgements.sort(key=_order)
    ids: dict[int, str] = {}
    findings = []
    for number, each in enumerate(judgements, start=1):
        ids[id(each.site)] = f"F{number}"
        findings.append(_finding(f"F{number}", each, judge, collected))
    findings, remarks = _without_ignored(findings, collected)
    remarks += [_not_followed(entry, names) for report, _, entry in asked if not entry.chain
                and (names := judge.reach.not_followed(entry.place, report.place))]  # fmt: skip
    files = len(collected.texts)
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
            "files": files, "parsed": len(collected.parsed), "cached": len(collected.cached),
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
        name = stopped.get(id(each.site))
        if name and each.severity != "error":
            each.severity = "error"
            what = "it" if name == each.site.function else name
            each.message = f"{where(each.site)}: what comes out of {what} carries no gradient."


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
    reports = sorted(judge.reports, key=lambda report: judge.package.files[report.place.module].path)
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
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    what = f"{', '.join(names[:MOST_NAMED])}{more}"
    return (
        f"{entry.place.name} also runs {what}: the source scanned does not show of which class, so it was not followed."
    )


def _asked(judge: Judge, name: str) -> list[tuple[Place, Place | None]]:
    """Return the functions that a name means, each with the class of ``self``: a method may be a base class's."""
    found: list[tuple[Place, Place | None]] = []
    owner, _, method = name.rpartition(".")
    for facts in judge.package.files.values():
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
    judge: Judge, report: ClassReport, clean: Iterable[str], entry: Entry, ids: dict[int, str]
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
        "findings": list(dict.fromkeys(ids[id(site)] for _, site in sites if id(site) in ids)),
        "alternatives": list(entry.alternatives),
        "clean": list(clean),
    }


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
