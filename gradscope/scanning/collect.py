"""Files to facts: read, keep by content, parse what is new on as many processes as are asked for."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

from gradscope.scanning.cache import Cache, key_of
from gradscope.scanning.facts import Call, Class, FileFacts, Function, Ignore, Site
from gradscope.scanning.reading import GRAD_MODE, Needles, decode, headers
from gradscope.scanning.resolve import SourceFile
from gradscope.scanning.walk import FileReader

# Below this many bytes to parse a second process costs more than it saves.
WORTH_A_PROCESS = 1_500_000
CHUNKS_PER_JOB = 8


@dataclass(frozen=True, slots=True)
class Settings:
    """What a file is read with: names looked for beyond torch's switches, and the package's own wrappers."""

    names: tuple[str, ...] = ()
    wrappers: tuple[tuple[str, str], ...] = ()

    def needles(self) -> Needles:
        """Return what is looked for in a file."""
        own = {name.rpartition(".")[2] for name, _ in self.wrappers}
        return Needles((*GRAD_MODE, *sorted({*own, *self.names})))


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


class Collector:
    """Reads files once and looks into them again when a later round knows more names."""

    def __init__(self, cache: Cache, jobs: int, progress: Callable[[int, int], None] | None = None) -> None:
        self._cache = cache
        self._jobs = jobs
        self._progress = progress or (lambda done, total: None)
        self.collected = Collected()

    def open(self, files: Iterable[SourceFile]) -> None:
        """Read the bytes of every file."""
        for file in files:
            facts = FileFacts(file.shown, file.module)
            try:
                data = file.read()
            except OSError as error:
                data, facts.skipped = b"", error.strerror or str(error)
            self.collected.texts[file.shown] = Text(file, data, facts)

    def read(self, settings: Settings, wanted: Callable[[Text], bool]) -> None:
        """Bring the facts of the wanted files up to these settings."""
        texts = [text for text in self.collected.texts.values() if not text.facts.skipped and wanted(text)]
        if not self._cache.is_open:
            self._make(texts, settings)
            return
        keys = {key_of(repr(settings), text.file.module, text.data): text for text in texts}
        known = self._cache.get(keys)
        self.collected.cached.update(keys[key].file.shown for key in known)
        fresh = {key: text for key, text in keys.items() if key not in known}
        for key, value in known.items():
            keys[key].facts = facts_from(value, keys[key].facts)
        self._make(list(fresh.values()), settings)
        self._cache.put({key: facts_to(text.facts) for key, text in fresh.items()})

    def _make(self, texts: list[Text], settings: Settings) -> None:
        made = self._parse(texts, settings)
        self.collected.parsed.update(text.file.shown for text in texts)
        for text, facts in zip(texts, made, strict=True):
            text.facts = facts

    def _parse(self, texts: list[Text], settings: Settings) -> list[FileFacts]:
        size = sum(len(text.data) for text in texts)
        jobs = max(1, min(self._jobs, size // WORTH_A_PROCESS))
        # Chunks of equal size rather than of equal count: one file of 400 kB outweighs fifty.
        chunks = _chunks(texts, size // (jobs * CHUNKS_PER_JOB) + 1)
        made: list[FileFacts] = []
        if jobs == 1:
            for chunk in chunks:
                made += read_chunk([(t.file, t.data) for t in chunk], settings)
                self._progress(len(made), len(texts))
            return made
        try:
            with ProcessPoolExecutor(jobs, initializer=gc.disable) as pool:
                # Workers read the files themselves: paths are cheaper to send than their content.
                tasks = [pool.submit(read_chunk, [(t.file, None) for t in chunk], settings) for chunk in chunks]
                for task in tasks:
                    made += task.result()
                    self._progress(len(made), len(texts))
        except BrokenProcessPool:  # a worker was killed (memory, a container's limit): do it here
            return read_chunk([(t.file, t.data) for t in texts], settings)
        return made


def read_chunk(files: list[tuple[SourceFile, bytes | None]], settings: Settings) -> list[FileFacts]:
    """Return the facts of some files; runs in this process or in a worker."""
    needles, wrappers = settings.needles(), dict(settings.wrappers)
    return [_read_one(file, data, wrappers, needles) for file, data in files]


def _read_one(file: SourceFile, data: bytes | None, wrappers: Mapping[str, str], needles: Needles) -> FileFacts:
    facts = FileFacts(file.shown, file.module)
    try:
        text = decode(file.read() if data is None else data)
    except OSError as error:
        facts.skipped = error.strerror or str(error)
        return facts
    facts.skipped = text.skipped
    if text.skipped:
        return facts
    facts.headers = headers(text.source)
    try:
        return FileReader(facts, file.is_package, wrappers).read(text.source, needles)
    except RecursionError:
        return FileFacts(file.shown, file.module, skipped="nested too deeply to be read")


def _chunks(texts: list[Text], size: int) -> list[list[Text]]:
    chunks: list[list[Text]] = []
    filled = size
    for text in texts:
        if filled >= size:
            chunks.append([])
            filled = 0
        chunks[-1].append(text)
        filled += len(text.data)
    return chunks


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
             [[call.target, call.line, call.used, call.sometimes] for call in f.calls],
             sorted(f.reads), sorted(f.returns), f.gives_value, f.kind]
            for f in facts.functions.values()
        ],
        "sites": [
            [sorted(value) if isinstance(value, frozenset) else value for value in dataclasses.astuple(site)]
            for site in facts.sites
        ],
        "wrappers": facts.wrappers,
        "headers": facts.headers,
        "ignores": [[i.line, i.first, i.last, i.codes] for i in facts.ignores],
        "parsed": facts.parsed,
        "skipped": facts.skipped,
    }  # fmt: skip


def facts_from(data: dict[str, Any], empty: FileFacts) -> FileFacts:
    """Read facts back from :func:`facts_to`."""
    facts = FileFacts(empty.path, empty.module, imports=data["imports"], wrappers=data["wrappers"])
    for name, line, bases, methods, attributes, aliases in data["classes"]:
        facts.classes[name] = Class(name, line, tuple(bases), tuple(methods), attributes, aliases)
    for name, line, end, parameters, signature, calls, reads, returns, gives_value, kind in data["functions"]:
        facts.functions[name] = Function(
            name, line, end, tuple(parameters), tuple(signature), tuple(Call(*call) for call in calls),
            frozenset(reads), frozenset(returns), gives_value, kind,
        )  # fmt: skip
    for rule, line, column, end, function, mechanism, how, depends, effects, gives, conditional, harmless in data[
        "sites"
    ]:
        facts.sites.append(
            Site(rule, line, column, end, function, mechanism, how, frozenset(depends), frozenset(effects),
                 tuple(gives), conditional, harmless)
        )  # fmt: skip
    facts.headers = {name: tuple(bases) for name, bases in data["headers"].items()}
    facts.ignores = [Ignore(line, first, last, tuple(codes)) for line, first, last, codes in data["ignores"]]
    facts.parsed, facts.skipped = data["parsed"], data["skipped"]
    return facts
