"""The Markdown report, read back by a Markdown parser: tables stay tables, and foreign text stays text."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from real import REAL, traced

from gradscope.findings import Excerpt, Finding, Source
from gradscope.report import markdown
from gradscope.session import Session

NASTY = "a|b `c` <script>alert(1)</script> *d* [e](f) __init__ _x_ x_y @user #1 \\ ~z~ &amp; end"


def parsed(text: str) -> list[Token]:
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)


def rows(text: str) -> list[list[str]]:
    """Return the cells of all tables, as a reader sees them."""
    cells: list[list[str]] = []
    tokens = parsed(text)
    for token, following in itertools.pairwise(tokens):
        if token.type == "tr_open":
            cells.append([])
        elif token.type in ("td_open", "th_open"):
            cells[-1].append(seen(following))
    return cells


def seen(inline: Token) -> str:
    children = inline.children or []
    return "".join(child.content for child in children if child.type in ("text", "code_inline")).replace("\u200b", "")


def fences(text: str, language: str) -> list[str]:
    return [token.content for token in parsed(text) if token.type == "fence" and token.info == language]


def finding(number: int = 1, severity: str = "error", **fields: Any) -> Finding:
    given = {"message": "said", "path": "m.py", "line": 12} | fields
    return Finding(f"F{number}", "GS201", "detach", severity, **given)  # type: ignore[arg-type]


def session(*findings: Finding, **fields: Any) -> Session:
    return Session("trace", "blocked", findings=list(findings), target={"name": "m", "entry": "forward"}, **fields)


@pytest.mark.parametrize("name", REAL)
def test_real_sessions_show_each_finding_in_a_table(name: str) -> None:
    real = REAL[name]()
    text = markdown.render(real)
    assert len(text) < 65_536
    table = [row for row in rows(text) if len(row) == 4 and "F" in row[0]]
    assert sorted((row[1], row[2], row[3].partition(" (behind")[0]) for row in table) == sorted(
        (f"{f.rule} {f.name}", f"{f.path}:{f.line}", f.message) for f in real.findings
    )
    for error in (each for each in real.findings if each.severity == "error"):
        assert any(f"> {error.line:5}" in block and error.source in block for block in fences(text, "python"))
    assert text.count("<details>") == text.count("</details>") > 0


def test_a_trace_folds_its_sources_and_shows_the_cut() -> None:
    text = markdown.render(traced())
    assert "<summary>565 blocked</summary>" in text
    (chart,) = fences(text, "mermaid")
    assert "flowchart TB" in chart and "GS101" in chart
    assert "**Smallest fix:** F1, F2, proven by running it." in text


def test_foreign_text_stays_text() -> None:
    what = finding(message=NASTY, fix=NASTY, excerpt=Excerpt(12, ("x = '''", "```", "~~~~")))
    text = markdown.render(session(what, unseen=[NASTY], sources={NASTY: Source(NASTY, "parameter", "blocked")}))
    (row,) = [row for row in rows(text) if row[0].endswith("F1")]
    assert row[3] == NASTY
    (block,) = fences(text, "python")
    assert "```" in block and block.count("\n") == 3
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert "<script>" not in shown
    assert "@user" not in re.sub("<code>.*?</code>", "", shown)


def test_files_of_the_repository_are_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_REPOSITORY", "CI_PROJECT_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "a b.py").touch()
    inside, outside = finding(path="a b.py"), finding(path="torch/nn/x.py")
    assert markdown.link(inside) == "[`a b.py:12`](a%20b.py#L12)"
    assert markdown.link(outside) == "`torch/nn/x.py:12`"
    monkeypatch.setenv("GITHUB_REPOSITORY", "o/r")
    monkeypatch.setenv("GITHUB_SHA", "abc")
    monkeypatch.delenv("GITHUB_SERVER_URL", raising=False)
    assert markdown.link(inside) == "[`a b.py:12`](https://github.com/o/r/blob/abc/a%20b.py#L12)"


def test_a_report_too_long_for_a_comment_tells_the_gravest() -> None:
    many = [finding(n, "warning" if n % 2 else "error", message="long " * 200, excerpt=Excerpt(12, ("y" * 2000,)))
            for n in range(1, 400)]  # fmt: skip
    text = markdown.render(session(*many))
    assert len(text) <= 60_000 and "more findings are not shown" in text
    assert all(row[0].startswith("❌") for row in rows(text)[1:])
    assert markdown.render(session(*many), full=True).count("| GS201 detach |") == len(many)


def test_notes_and_what_is_expected_are_folded_away() -> None:
    text = markdown.render(
        session(finding(1), finding(2, "note"), finding(3, state="expected"), finding(4, state="new"))
    )
    top, _, folded = text.partition("<details>")
    assert "F1" in top and "F4 **new**" in top and "F2" not in top and "F3" not in top
    assert re.search("1 note<.*F2.*1 expected.*F3", folded, flags=re.DOTALL)
