"""Files to facts: read, keep by content, parse what is new on as many processes as are asked for."""

from __future__ import annotations

import dataclasses
import gc
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from gradscope.scanning.cache import Cache, key_of
from gradscope.scanning.copies import Copies
from gradscope.scanning.facts import Call, Class, FileFacts, Frozen, Function, Ignore, Optimizer, Site
from gradscope.scanning.makers import definitions_of
from gradscope.scanning.reading import GRAD_MODE, Needles, decode, headers, hides_text
from gradscope.scanning.resolve import SourceFile
from gradscope.scanning.walk import FileReader

# Below this many bytes to parse a second process costs more than it saves.
WORTH_A_PROCESS = 1_500_000
# A chunk is this part of what one process would get of the rest: what it takes to read a file nobody knows
# beforehand, and with chunks that get smaller no process waits long for another's last. To search takes as long as
# there are bytes, so fewer will do.
READ_AT_ONCE, SEARCH_AT_ONCE = 1 / 4, 1
LEAST = 1 / 16  # of the first chunk

Needle: TypeAlias = bytes | re.Pattern[bytes]
Part: TypeAlias = Sequence[tuple[SourceFile, bytes | None]]
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a file is read with: the scan's top-level packages, names looked for, the package's own wrappers.

    ``makers`` are the functions and tables that models are got from, by the dotted names that they are used by.
    """

    roots: frozenset[str]
    names: tuple[str, ...] = ()
    wrappers: tuple[tuple[str, str], ...] = ()
    makers: tuple[str, ...] = ()

    def needles(self) -> tuple[Needles, Needles]:
        """Return what is looked for in a file of the targets, and in one outside of them."""
        own = {name.rpartition(".")[2] for name, _ in self.wrappers}
        names = (*GRAD_MODE, *sorted({*own, *self.names}))
        defined = sorted({begun for maker in self.makers for begun in definitions_of(maker)}.difference(names))
        return Needles(names), Needles((*names, *defined), operations=False)


@dataclass(slots=True)
class Text:
    """A file in memory between rounds: its bytes and their facts."""

    file: SourceFile
    data: bytes
    facts: FileFacts


@dataclass(slots=True)
class Collected:
    """All files, and which were parsed now or taken from the cache."""

    texts: dict[str, Text] = field(default_factory=dict)
    parsed: set[str] = field(default_factory=set)
    cached: set[str] = field(default_factory=set)

    @property
    def own(self) -> list[Text]:
        """The files of the targets, without those followed from them."""
        return [text for text in self.texts.values() if not text.file.is_outside]


class Collector:
    """Reads files once and looks into them again when a later round knows more names."""

    def __init__(self, cache: Cache, jobs: int, progress: Callable[[int, int], None] | None = None) -> None:
        self.cache = cache
        self._jobs = max(1, jobs)
        self._progress = progress or (lambda done, total: None)
        self.collected = Collected()
        self._pool: Executor | None = None
        self._numbers: dict[str, int] = {}  # of the files, in the pool

    def open(self, files: Iterable[SourceFile]) -> None:
        """Read the bytes of every file."""
        for file in files:
            facts = FileFacts(file.shown, file.module)
            try:
                data = file.read()
            except OSError as error:
                data, facts.skipped = b"", error.strerror or str(error)
            self.collected.texts[file.shown] = Text(file, data, facts)

    def read(self, settings: Settings, wanted: Iterable[Text] | None = None) -> None:
        """Bring the facts of the wanted files up to these settings; by default of all in which something is found."""
        every = self.collected.texts.values() if wanted is None else wanted
        texts = [text for text in every if not text.facts.skipped]
        if not self.cache.is_open:
            self._make(texts, settings, look_first=wanted is None)
            return
        if wanted is None:
            needles = settings.needles()
            texts = [text for text in texts if is_worth_reading(text.data, needles[text.file.is_outside])]
        keys = {key_of(repr((settings, text.file.is_outside)), text.file.module, text.data): text for text in texts}
        known = self.cache.get(keys)
        self.collected.cached.update(keys[key].file.shown for key in known)
        fresh = {key: text for key, text in keys.items() if key not in known}
        for key, value in known.items():
            keys[key].facts = facts_from(value, keys[key].facts)
        self._make(list(fresh.values()), settings)
        self.cache.put({key: facts_to(text.facts) for key, text in fresh.items()})

    def close(self) -> None:
        """Let the other processes go, and what is kept of functions in this one."""
        _copies.clear()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _make(self, texts: list[Text], settings: Settings, *, look_first: bool = False) -> None:
        for text, facts in zip(texts, self._parse(texts, settings, look_first), strict=True):
            if facts is not None:
                self.collected.parsed.add(text.file.shown)
                text.facts = facts

    def _parse(self, texts: list[Text], settings: Settings, look_first: bool) -> list[FileFacts | None]:
        size = sum(len(text.data) for text in texts)
        if self._pool is None and min(self._jobs, size // WORTH_A_PROCESS) > 1:
            self._numbers = {name: number for number, name in enumerate(self.collected.texts)}
            self._pool = self._processes()
        made: list[FileFacts | None] = []
        for part in self._in_chunks(self._chunks(texts, READ_AT_ONCE), read_chunk, settings, look_first):
            made += part
            self._progress(len(made), len(texts))
        return made

    def matching(self, texts: list[Text], needles: Sequence[Needle]) -> list[list[Text]]:
        """Return for every needle the texts that hold it."""
        found: list[list[Text]] = [[] for _ in needles]
        chunks = self._chunks(texts, SEARCH_AT_ONCE)
        for chunk, part in zip(chunks, self._in_chunks(chunks, search_chunk, needles), strict=True):
            for places, numbers in zip(found, part, strict=True):
                places += [chunk[number] for number in numbers]
        return found

    def _processes(self) -> Executor:
        # Most scans need none of it, and importing it takes longer than scanning a file.
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_start_method

        # A forked process has the bytes in memory at no cost; another kind reads them itself.
        is_forked = get_start_method() == "fork"
        held = [(text.file, text.data if is_forked else None) for text in self.collected.texts.values()]
        return ProcessPoolExecutor(self._jobs, initializer=_begin, initargs=(held,))

    def _chunks(self, texts: list[Text], at_once: float) -> list[list[Text]]:
        """Return chunks by size rather than by count: one file of 400 kB outweighs fifty."""
        rest = sum(len(text.data) for text in texts)
        share = at_once / self._jobs
        least = rest * share * LEAST
        chunks: list[list[Text]] = []
        room = 0.0
        for text in texts:
            if room <= 0:
                chunks.append([])
                room = max(rest * share, least)
            chunks[-1].append(text)
            room -= len(text.data)
            rest -= len(text.data)
        return chunks

    def _in_chunks(self, chunks: list[list[Text]], work: Callable[..., Made], *given: object) -> Iterator[Made]:
        """Yield what the work makes of every chunk, in order."""
        done = 0
        if self._pool is not None:
            with suppress(BrokenExecutor):
                numbers = [[self._numbers[text.file.shown] for text in chunk] for chunk in chunks]
                for task in [self._pool.submit(_work_on, part, work, *given) for part in numbers]:
                    yield task.result()
                    done += 1
                return
            self.close()  # a worker was killed (memory, a container's limit): the rest is done here
        for chunk in chunks[done:]:
            yield work([(text.file, text.data) for text in chunk], *given)


# In every process: what was read of functions in the scan at hand.
_copies = Copies()
# In a worker: all files, with their bytes where these came along.
_held: list[tuple[SourceFile, bytes | None]] = []


def _begin(held: list[tuple[SourceFile, bytes | None]]) -> None:
    gc.disable()
    _held[:] = held


def _work_on(numbers: list[int], work: Callable[..., Made], *given: object) -> Made:
    return work([_held[number] for number in numbers], *given)


def is_worth_reading(data: bytes, needles: Needles) -> bool:
    """Tell whether a file's bytes hold anything to look into, or may hide it."""
    return needles.are_in(data) or hides_text(data)


def read_chunk(files: Part, settings: Settings, look_first: bool) -> list[FileFacts | None]:
    """Return the facts of some files; runs in this process or in a worker.

    With ``look_first`` there are none (None) of a file that holds nothing to look into.
    """
    needles, wrappers = settings.needles(), dict(settings.wrappers)
    return [_read_one(file, data, settings, wrappers, needles[file.is_outside], look_first) for file, data in files]


def search_chunk(files: Part, needles: Sequence[Needle]) -> list[list[int]]:
    """Return for every needle the positions of the files that hold it; runs in this process or in a worker."""
    found: list[list[int]] = [[] for _ in needles]
    for number, (file, given) in enumerate(files):
        try:
            data = file.read() if given is None else given
        except OSError:
            continue
        for places, needle in zip(found, needles, strict=True):
            if needle in data if isinstance(needle, bytes) else needle.search(data):
                places.append(number)
    return found


def _read_one(
    file: SourceFile,
    data: bytes | None,
    settings: Settings,
    wrappers: Mapping[str, str],
    needles: Needles,
    look_first: bool,
) -> FileFacts | None:
    facts = FileFacts(file.shown, file.module)
    try:
        data = file.read() if data is None else data
    except OSError as error:
        facts.skipped = error.strerror or str(error)
        return facts
    if look_first and not is_worth_reading(data, needles):
        return None
    text = decode(data)
    facts.skipped = text.skipped
    if text.skipped:
        return facts
    facts.headers = headers(text.source)
    try:
        reader = FileReader(facts, file.is_package, settings.roots, wrappers, _copies, settings.makers)
        return reader.read(text.source, needles)
    except RecursionError:
        return FileFacts(file.shown, file.module, skipped="nested too deeply to be read")


def default_jobs() -> int:
    """Return how many processes a scan may use: the processors that this one may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(8, len(affinity(0)) if affinity else os.cpu_count() or 1)


# --- facts as JSON -----------------------------------------------------------------------------------


def facts_to(facts: FileFacts) -> dict[str, Any]:
    """Return facts as JSON-ready data; path and module are the reader's own and left out."""
    return {
        "imports": facts.imports,
        "classes": [[c.name, c.line, c.bases, c.methods, c.attributes, c.aliases] for c in facts.classes.values()],
        "functions": [
            [f.name, f.line, f.end_line, f.parameters, f.signature,
             [list(call) for call in f.calls],
             sorted(f.reads), sorted(f.returns), f.gives_value, f.kind,
             None if f.backward is None else sorted(f.backward), f.steps, f.gives]
            for f in facts.functions.values()
        ],
        "sites": [
            [sorted(value) if isinstance(value, frozenset) else value for value in dataclasses.astuple(site)]
            for site in facts.sites
        ],
        "wrappers": facts.wrappers,
        "headers": facts.headers,
        "tables": facts.tables,
        "ignores": [[i.line, i.first, i.last, i.codes] for i in facts.ignores],
        "optimizers": facts.optimizers,
        "frozen": facts.frozen,
        "parsed": facts.parsed,
        "skipped": facts.skipped,
    }  # fmt: skip


def facts_from(data: dict[str, Any], empty: FileFacts) -> FileFacts:
    """Read facts back from :func:`facts_to`."""
    facts = FileFacts(empty.path, empty.module, imports=data["imports"], wrappers=data["wrappers"])
    for name, line, bases, methods, attributes, aliases in data["classes"]:
        facts.classes[name] = Class(name, line, tuple(bases), tuple(methods), attributes, aliases)
    for name, line, end, parameters, signature, calls, reads, returns, value, kind, backward, *rest in data[
        "functions"
    ]:
        steps, gives = rest
        facts.functions[name] = Function(
            name, line, end, tuple(parameters), tuple(signature), tuple(Call(*call) for call in calls),
            frozenset(reads), frozenset(returns), value, kind,
            None if backward is None else frozenset(backward), tuple(steps), gives,
        )  # fmt: skip
    for *place, function, mechanism, how, depends, effects, gives, conditional, harmless, runs in data["sites"]:
        rule, line, column, end = place
        facts.sites.append(
            Site(rule, line, column, end, function, mechanism, how, frozenset(depends), frozenset(effects),
                 tuple(gives), conditional, harmless, frozenset(runs))
        )  # fmt: skip
    facts.headers = {name: tuple(bases) for name, bases in data["headers"].items()}
    facts.ignores = [Ignore(line, first, last, tuple(codes)) for line, first, last, codes in data["ignores"]]
    facts.tables = data["tables"]
    facts.optimizers = [Optimizer(*each) for each in data["optimizers"]]
    facts.frozen = [Frozen(*each) for each in data["frozen"]]
    facts.parsed, facts.skipped = data["parsed"], data["skipped"]
    return facts
