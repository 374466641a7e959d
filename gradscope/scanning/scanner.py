"""Scan: targets in, session out. Nothing of the target is imported, compiled to code or run."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from gradscope._version import __version__
from gradscope.errors import NotAnalysedError
from gradscope.paths import short_path
from gradscope.scanning.cache import Cache, default_folder, key_of
from gradscope.scanning.collect import Collected, Collector, Settings, Text, default_jobs
from gradscope.scanning.judge import Judge
from gradscope.scanning.made import makers_in
from gradscope.scanning.outside import Outside
from gradscope.scanning.outside import follow as used_outside
from gradscope.scanning.package import Package, Place
from gradscope.scanning.reach import FORWARDS, Reach
from gradscope.scanning.reading import decode, headers
from gradscope.scanning.resolve import Resolved, resolve
from gradscope.scanning.searching import Finder
from gradscope.scanning.summary import session_of, some
from gradscope.session import Session

MOST_ROUNDS = 5
# Above so many bytes only the callers of errors are looked for in files without a switch of their own.
LARGE = 8_000_000


def scan(
    *targets: str,
    entry: tuple[str, ...] = (),
    jobs: int | None = None,
    cache: bool = True,
    follow: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Session:
    """Find every place in the targets' source that stops gradients, and which public callables reach it.

    Args:
        targets: dotted modules or packages, files, folders, or installed distributions.
        entry: ``Class.method`` names; the findings are then those on the way from these entries.
        jobs: processes to parse with; by default the processors at hand, one where the target is small.
        cache: keep facts and results on disk, keyed by content.
        follow: look into other packages too, where the targets' own code calls them and they are installed here.
        progress: called with the files parsed and the files to parse.

    Raises:
        UsageError: a target or an entry does not exist.
        NotAnalysedError: the targets hold no Python source that could be read.
    """
    started = time.perf_counter()
    with _without_collection():
        collector = Collector(Cache(default_folder() if cache else None), jobs or default_jobs(), progress)
        session = _scan(targets, entry, collector, follow=follow)
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


def _scan(targets: tuple[str, ...], entry: tuple[str, ...], collector: Collector, *, follow: bool) -> Session:
    resolved = resolve(targets)
    wanted = tuple(dict.fromkeys((*entry, *resolved.entries)))
    store = collector.cache
    try:
        collector.open(resolved.files.values())
        outside = _follow(collector) if follow else Outside()
        if not store.is_open:
            return _scanned(collector, resolved, targets, wanted, outside)
        key = _result_key(collector.collected, wanted, resolved, outside)
        kept = store.get([key]).get(key)
        if kept is None:
            session = _scanned(collector, resolved, targets, wanted, outside)
            store.put({key: session.to_dict()})
        else:
            session = Session.restored(kept)
            session.stats.update(parsed=0, cached=session.stats["files"])
    finally:
        collector.close()
        store.close()
    return session


def _follow(collector: Collector) -> Outside:
    """Open the files of other packages that the targets use; return what was found, and what is not to be found here.

    A package so large is no script that puts others together.
    """
    texts = collector.collected.texts.values()
    if sum(len(text.data) for text in texts) > LARGE:
        return Outside()
    outside = used_outside((text.file, text.data) for text in texts)
    collector.open(outside.files)
    for file, imports in outside.files.items():  # what it hands on counts, whether or not more of it is read
        collector.collected.texts[file.shown].facts.imports = imports
    return outside


def _result_key(collected: Collected, wanted: tuple[str, ...], resolved: Resolved, outside: Outside) -> str:
    makers = sorted((name, sorted(written)) for name, written in outside.makers.items())
    parts = [os.getcwd(), repr(wanted), repr(resolved.skipped), repr(outside.missing), repr(makers), __version__]
    parts += [f"{text.file.shown}\0{text.file.module}\0{text.facts.skipped}" for text in collected.texts.values()]
    return key_of(*parts, *(text.data for text in collected.texts.values()))


def _scanned(
    collector: Collector, resolved: Resolved, targets: tuple[str, ...], wanted: tuple[str, ...], outside: Outside
) -> Session:
    judge = _read_in_rounds(collector, wanted, outside.makers)
    own = collector.collected.own
    skipped = [*resolved.skipped]
    skipped += [(text.facts.path, text.facts.skipped) for text in own if text.facts.skipped]
    if skipped and all(text.facts.skipped for text in own):
        path, reason = skipped[0]
        raise NotAnalysedError(
            f"Nothing could be scanned: {short_path(path)} {reason}.",
            hint="Scan the Python source, or trace the model.",
        )
    if not own:
        raise NotAnalysedError(
            f"{' '.join(targets)} holds no Python source.", hint="Name a package or a folder with .py files."
        )
    session = session_of(judge, collector.collected, targets, wanted, skipped, bool(outside.makers))
    if outside.missing:
        names = some(outside.missing)
        session.remarks.append(f"Not installed here, so what is called of it was not followed: {names}.")
    return session


# --- rounds ------------------------------------------------------------------------------------------


def _read_in_rounds(collector: Collector, wanted: tuple[str, ...], makers: Mapping[str, set[str]]) -> Judge:
    """Read what matches; again where the package's own wrappers are used; again where stopped functions are called.

    ``makers`` are what models are got from, and what to look for to find where the code scanned uses it.
    """
    asked = tuple(f"{word} {name.split('.')[0]}" for name in wanted for word in ("class", "def"))
    asked += tuple(sorted({written for each in makers.values() for written in each}))
    known_as = tuple(sorted(makers))
    texts = collector.collected.texts.values()
    roots = frozenset(text.file.module.partition(".")[0] for text in texts)
    collector.read(Settings(roots, asked, (), known_as))
    finder = Finder(texts, collector.matching)
    for text in texts:
        if not text.facts.parsed and not text.facts.skipped:
            _note_headers(text)
    wrappers: tuple[tuple[str, str], ...] = ()
    for _ in range(MOST_ROUNDS):  # a wrapper may be made of another one, and a function give what another one does
        known, known_makers = {name for name, _ in wrappers}, set(known_as)
        wrappers = tuple(sorted({*wrappers, *(item for text in texts for item in text.facts.wrappers.items())}))
        known_as = tuple(sorted({*known_as, *(name for text in texts for name in makers_in(text.facts, known_makers))}))
        new = {name.rpartition(".")[2] for name, _ in wrappers if name not in known}
        given = {f"{name.rpartition('.')[2]}(" for name in known_as if name not in known_makers}
        if not (new or given):
            break
        asked += tuple(sorted(given))
        collector.read(Settings(roots, asked, wrappers, known_as), finder.holding(new | given))
    outside = frozenset(text.file.module for text in texts if text.file.is_outside)
    judge = Judge(Package((text.facts for text in texts), outside))
    goals = _goals(judge, errors_only=sum(len(text.data) for text in texts) > LARGE)
    seen: dict[str, set[str]] = {}
    reach = judge.reach
    for _ in range(MOST_ROUNDS):
        calls = _calls_of(reach.leading_to(goals), reach.package)
        found = {call: owners for call, owners in calls.items() if call not in seen}
        if outside:  # a class outside may be found to have a method of that name only now
            grown = {call: owners - seen[call] for call, owners in calls.items() if call in seen}
            found |= {call: owners for call, owners in grown.items() if owners}
        if not found:
            break
        seen.update((call, seen.get(call, set()) | owners) for call, owners in found.items())
        callers = finder.calling(found)
        if not callers:
            break
        collector.read(Settings(roots, (*asked, *sorted(seen)), wrappers, known_as), callers)
        reach = Reach(Package((text.facts for text in texts), outside), {})
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
            owners |= package.also_called(owners)
            if name in FORWARDS:
                for each in owners:  # also as an annotation: def __init__(self, tower: Tower)
                    calls[each] = set()
            else:  # a base class may call it on self, where it is defined
                bases = (base.name.rpartition(".")[2] for base in package.mro(Place(place.module, owner)))
                calls.setdefault(f".{name}(", set()).update(owners, (f"class {base}" for base in bases))
        elif name and not owner:
            calls[name] = set()  # also without a call: self.run = helper
    return calls | {maker: set() for maker in package.makers_of(calls.keys())}
