"""Where names are used: substring search over the bytes of all files, which costs a fraction of parsing them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from gradscope.scanning.collect import Needle, Text

# Names of one family (LayoutLMv3Model, LayoutLMv3Encoder) begin alike: where that beginning is, is searched once.
STEM = 8
# For more names than this one expression that looks for all of them takes less time than as many searches.
MANY = 8

Search: TypeAlias = Callable[[list[Text], Sequence[Needle]], list[list[Text]]]


class Finder:
    """Finds the files that hold names, and remembers where the beginnings of names are from round to round.

    ``search`` gives for every needle the files that hold it (:meth:`Collector.matching`).
    """

    def __init__(self, texts: Iterable[Text], search: Search) -> None:
        self._texts = list(texts)
        self._search = search
        self._begun: dict[bytes, list[Text]] = {}

    def holding(self, names: Iterable[str]) -> list[Text]:
        """Return the files that hold one of the names anywhere."""
        needles = [name.encode() for name in names]
        new = list({needle[:STEM] for needle in needles} - self._begun.keys())
        if len(new) > MANY:
            any_new = re.compile(b"|".join(map(re.escape, new)))
            texts = self._search(self._texts, [any_new])[0]
            self._begun.update((stem, [text for text in texts if stem in text.data]) for stem in new)
        elif new:
            self._begun.update(zip(new, self._search(self._texts, new), strict=True))
        found: dict[str, Text] = {}
        for needle in needles:
            for text in self._begun[needle[:STEM]]:
                if needle in text.data:
                    found[text.file.shown] = text
        return list(found.values())

    def calling(self, calls: Mapping[str, set[str]]) -> list[Text]:
        """Return the files with one of these calls; ``.method(`` counts beside the name of one of its classes only."""
        found = {text.file.shown: text for text in self.holding(call for call, owners in calls.items() if not owners)}
        methods = [(call.encode(), [owner.encode() for owner in owners]) for call, owners in calls.items() if owners]
        if not methods:
            return list(found.values())
        # One search that leaps from dot to dot tells for all of them that a file has none.
        any_method = re.compile(rb"\.(?:%s)\(" % b"|".join(call[1:-1] for call, _ in methods))
        for text in self._search(self._texts, [any_method])[0]:
            data = text.data
            if any(call in data and any(owner in data for owner in owners) for call, owners in methods):
                found[text.file.shown] = text
        return list(found.values())
