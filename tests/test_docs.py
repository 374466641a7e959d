"""The Python snippets of the guide to tracing run, and say what they say (those elsewhere are excerpts)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = [Path(__file__).parent.parent / "docs" / "trace.md"]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SNIPPETS = [
    pytest.param(source, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, source in enumerate(PYTHON.findall(page.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("source", SNIPPETS)
@pytest.mark.filterwarnings("ignore")
def test_a_snippet_runs(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "snippet.py"
    script.write_text(source, encoding="utf-8")
    exec(compile(source, str(script), "exec"), {"__name__": "snippet"})
