"""Where names are used: substring search over the bytes of all files, which costs a fraction of parsing them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from gradscope.scanning.collect import Text

# Names of one family (LayoutLMv3Model, LayoutLMv3Encoder) begin alike: where that beginning is, is searched once.
STEM = 8


class Finder:
    """Finds the files that hold names, and remembers where the beginnings of names are from round to round."""

    def __init__(self, texts: Iterable[Text]) -> None:
        self._texts = list(texts)
        self._begun: dict[bytes, list[Text]] = {}

    def holding(self, names: Iterable[str]) -> list[Text]:
        """Return the files that hold one of the names anywhere."""
        found: dict[str, Text] = {}
        for name in names:
            needle = name.encode()
            for text in self._beginning(needle[:STEM]):
                if needle in text.data:
                    found[text.file.shown] = text
        return list(found.values())

    def _beginning(self, stem: bytes) -> list[Text]:
        if stem not in self._begun:
            self._begun[stem] = [text for text in self._texts if stem in text.data]
        return self._begun[stem]

    def calling(self, calls: Mapping[str, set[str]]) -> list[Text]:
        """Return the files with one of these calls; ``.method(`` counts beside the name of one of its classes only."""
        found = {text.file.shown: text for text in self.holding(call for call, owners in calls.items() if not owners)}
        methods = [(call.encode(), [owner.encode() for owner in owners]) for call, owners in calls.items() if owners]
        # One search that leaps from dot to dot tells for all of them that a file has none.
        any_method = re.compile(rb"\.(?:%s)\(" % b"|".join(call[1:-1] for call, _ in methods))
        for text in self._texts if methods else ():
            data = text.data
            if text.file.shown in found or any_method.search(data) is None:
                continue
            if any(call in data and any(owner in data for owner in owners) for call, owners in methods):
                found[text.file.shown] = text
        return list(found.values())
