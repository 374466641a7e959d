"""Finding the files that use a name, beside a plain search through every file."""

from __future__ import annotations

from pathlib import Path

import pytest

import gradscope
from gradscope.scanning.cache import Cache
from gradscope.scanning.collect import Collector, Text
from gradscope.scanning.facts import FileFacts
from gradscope.scanning.resolve import SourceFile
from gradscope.scanning.searching import Finder

OWN = sorted(Path(gradscope.__file__).parent.rglob("*.py"))


def texts() -> list[Text]:
    return [Text(SourceFile(str(path), path.stem), path.read_bytes(), FileFacts(str(path), path.stem)) for path in OWN]


def finder_of(texts: list[Text]) -> Finder:
    return Finder(texts, Collector(Cache(None), jobs=1).matching)


def paths(found: list[Text]) -> set[str]:
    return {text.file.path for text in found}


@pytest.mark.parametrize(
    "names",
    [
        ["Session"],
        ["SourceFile", "SourceFileNot", "Source"],
        ["e"],
        ["nowhere_at_all"],
        [],
        [path.stem for path in OWN],
    ],
)
def test_names_are_found_where_a_plain_search_finds_them(names: list[str]) -> None:
    finder = finder_of(texts())
    for _ in range(2):  # the second time from memory
        plain = {str(path) for path in OWN if any(name in path.read_text() for name in names)}
        assert paths(finder.holding(names)) == plain


def test_a_method_counts_beside_one_of_its_classes_only() -> None:
    calls: dict[str, set[str]] = {
        ".partition(": {"Package", "Other"},
        ".rpartition(": {"Other"},
        "lru_cache": set(),
    }
    sources = {str(path): path.read_text() for path in OWN}
    both = {path for path, text in sources.items() if ".partition(" in text and "Package" in text}
    plain = both | {path for path, text in sources.items() if "lru_cache" in text}
    assert both and paths(finder_of(texts()).calling(calls)) == plain
