"""The Python snippets of the guide to tracing run, and say what they say (those elsewhere are excerpts)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = [Path(__file__).parent.parent / "docs" / "trace.md"]
SNIPPETS = [
    pytest.param(source, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, source in enumerate(re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M))
]


@pytest.mark.parametrize("source", SNIPPETS)
@pytest.mark.filterwarnings("ignore")
def test_a_snippet_runs(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "snippet.py"
    script.write_text(source, encoding="utf-8")
    exec(compile(source, str(script), "exec"), {"__name__": "snippet"})
