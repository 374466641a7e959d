"""Every snippet of the documentation runs and shows what it shows, and every internal link leads somewhere.

A page is one test. Its blocks run in their order, in one empty folder:

- ``python`` runs, in one namespace a page; with a ``title="train.py"`` it is written there as a file instead. What it
  prints is compared with the ``text`` block that has to follow.
- ``console``: each line that begins with ``$ `` is run, and what it prints is compared with the lines below it.
  ``...`` stands for anything; seconds are not compared. ``$ echo $?`` gives the exit code.
- ``toml``, ``yaml`` and ``json`` are parsed; with a title they are written as files, too.
- ``sh`` installs something, and is not run. Any other ``text`` is no snippet.
- A comment ``<!-- python ... -->`` runs unseen: what a page takes for granted, or a check that would bore its reader.

The fences are found by markdown-it-py, which rich brings along. A plugin (sybil) would save the ten lines that walk
the tokens and still need an evaluator for each of these kinds.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from packaging.requirements import Requirement

import gradscope
from gradscope.cli.main import COMMANDS, main
from gradscope.flow import FlowNode

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
GENERATED = ("api.md", "changelog.md", "cli.md")
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in GENERATED)
MARKDOWN = MarkdownIt().enable("table")
NEEDS = re.compile(r"\A---\nneeds: (.+)\n---\n")
TITLE = re.compile(r'title="(.+?)"')
HIDDEN = re.compile(r"<!-- python\n(.*)-->", re.DOTALL)
SECONDS = re.compile(r"\b\d+(\.\d+)? s\b")
# pytest draws its headings as wide as the terminal.
RULE = re.compile(r"={2,}")
# What the shell is needed for; a plain gradscope command runs in this process, where torch is imported already.
SHELL = re.compile(r"[|<>&;$]")


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("pretended_cuda")
def test_a_page_says_what_happens(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    if needed := NEEDS.match(text):
        asked = Requirement(needed[1])
        if version(asked.name) not in asked.specifier:
            pytest.skip(f"the page was made with {asked}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = set(sys.modules)
    try:
        Reader(page.name, monkeypatch).read(text)
    finally:
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
                del sys.modules[name]


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        pages: dict[str, str] = importlib.import_module("generate").pages()
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return pages


@pytest.fixture(scope="module")
def site(generated: dict[str, str]) -> dict[str, str]:
    return {page.name: page.read_text(encoding="utf-8") for page in PAGES} | generated


def test_every_link_leads_somewhere(site: dict[str, str]) -> None:
    pictures = sys.modules["pictures"].PICTURES
    dead = []
    for page, text in site.items():
        for link in links(text):
            target, _, anchor = link.partition("#")
            path = os.path.normpath(os.path.join(os.path.dirname(page), target)) if target else page
            if not (path in pictures or (path in site and (not anchor or anchor in anchors(site[path])))):
                dead.append(f"{page}: {link}")
    assert dead == []


def test_every_page_is_in_the_navigation_once(site: dict[str, str]) -> None:
    navigation = re.findall(r"[\w/-]+\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(navigation) == sorted(page for page in site if not re.match(r"rules/GS", page))


def test_every_file_and_name_of_the_internals_exists(site: dict[str, str]) -> None:
    code = re.findall(r"`([^`\n]+)`", site["internals.md"])
    paths = {each for each in code if each.startswith(("gradscope/", "tests/")) and "CODE" not in each}
    assert len(paths) > 40
    assert [path for path in paths if not (ROOT / path).exists()] == []
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "gradscope").rglob("*.py"))
    names = {each for each in code if re.fullmatch(r"_?[a-z]+(_[a-z]+)+|[A-Z_]{4,}|([A-Z][a-z]+)+", each)}
    assert len(names) > 10
    assert [name for name in names if not re.search(rf"\b{name}\b", source)] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_has_every_option_of_the_help(
    generated: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gradscope", name, "--help"])
    with printed() as out:
        assert left(main) == 0
    _, _, section = generated["cli.md"].partition(f"## {name}\n")
    section = section.partition("\n## ")[0]
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text_of(out), re.MULTILINE)
    assert options
    assert [option for option in options if option not in section] == []


def test_the_page_of_the_session_names_every_field(site: dict[str, str]) -> None:
    import torch

    class Cut(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return super().forward(x)

    trace = gradscope.trace(Cut(4, 4), torch.ones(2, 4)).to_dict()
    scan = gradscope.scan("deepseek_ocr_encoder").to_dict()
    node = FlowNode.__dataclass_fields__
    sections = dict(re.findall(r"^## (.+?)$(.+?)(?=^## |\Z)", site["session.md"], re.MULTILINE | re.DOTALL))
    for title, fields in {
        "The whole": trace, "Sources": trace["sources"][0], "Findings": trace["findings"][0], "The flow graph": node,
        "Entries": scan["entries"][0],
    }.items():  # fmt: skip
        first_column = "\n".join(row.split("|")[1] for row in sections[title].splitlines() if row.startswith("|"))
        assert set(fields) <= set(re.findall(r"`(\w+)`", first_column)), title


def test_a_screen_asks_nobody_for_a_font(generated: dict[str, str]) -> None:
    picture = sys.modules["pictures"].PICTURES["pictures/deepseek-ocr-scan.svg"]().decode()
    assert "inference-mode-decorator" in picture.replace("&#160;", " ")
    assert (
        re.findall(r"https?://[^\s\"]+", picture) == ["https://www.textualize.io", "http://www.w3.org/2000/svg"][::-1]
    )


def links(text: str) -> list[str]:
    """Return where a page's links and pictures lead, those to other sites left out."""
    inlines = [token.children or [] for token in MARKDOWN.parse(text) if token.type == "inline"]
    found = [str(each.attrs.get("href") or each.attrs.get("src") or "") for inline in inlines for each in inline]
    return [link for link in found if link and "://" not in link]


def anchors(text: str) -> set[str]:
    """Return the anchors that the site gives a page's headings."""
    tokens = MARKDOWN.parse(text)
    titles = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    kept = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles]
    return {re.sub(r"[-\s]+", "-", title) for title in kept}


class Reader:
    """Somebody who follows a page to the letter."""

    def __init__(self, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.page = page
        self.monkeypatch = monkeypatch
        self.namespace: dict[str, Any] = {"__name__": "page"}
        self.code = 0
        self.said = ""

    def read(self, text: str) -> None:
        """Do what each block says, in order."""
        for token in MARKDOWN.parse(text):
            line = (token.map or [0])[0] + 2
            if token.type == "fence":
                self.fence(token, line)
            elif token.type == "html_block" and (hidden := HIDDEN.search(token.content)):
                self.python(hidden[1], line)
        assert not self.said, f"{self.page}: {self.said!r} is printed, and not shown"

    def fence(self, token: Token, line: int) -> None:
        """Do what one block says."""
        language, _, rest = token.info.partition(" ")
        if self.said:
            self.compare("python", token.content if language == "text" else "", self.said, line)
            self.said = ""
            return
        title = TITLE.search(rest)
        if title:
            Path(title[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(title[1]).write_text(token.content, encoding="utf-8")
        if language == "python" and not title:
            self.python(token.content, line)
        elif language == "console":
            self.console(token.content, line)
        elif language in PARSERS:
            PARSERS[language](token.content)
        elif language not in ("python", "sh", "text"):
            pytest.fail(f"{self.page}:{line}: nothing is known of blocks of {language!r}")

    def python(self, source: str, line: int) -> None:
        """Run Python as a file that has the line numbers of the page: frames and findings can be looked up."""
        path = Path(f"{Path(self.page).stem}_{line}.py").resolve()
        path.write_text("\n" * (line - 1) + source, encoding="utf-8")
        with printed() as out:
            try:
                exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), self.namespace)
            except Exception:
                pytest.fail(f"{self.page}:{line}:\n{traceback.format_exc()}", pytrace=False)
        self.said = text_of(out)

    def console(self, content: str, line: int) -> None:
        """Run each command and compare what it prints."""
        for command, shown in commands(content):
            self.compare(command, shown, f"{self.code}\n" if command == "echo $?" else self.run(command), line)

    def compare(self, what: str, shown: str, said: str, line: int) -> None:
        """Fail with the difference where a page shows something else than what was printed."""
        if missing := first_missing(shown, said):
            pytest.fail(f"{self.page}:{line}: {what}\nshown and not printed there: {missing}\n\n{said}", pytrace=False)

    def run(self, command: str) -> str:
        """Return what a command prints, and keep its exit code."""
        words = shlex.split(command)
        if SHELL.search(command) or words[0] not in ("gradscope", "python"):
            env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            done = subprocess.run(
                command, shell=True, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=120
            )
            self.code = done.returncode
            return done.stdout.decode()
        self.monkeypatch.setattr(sys, "argv", words if words[0] == "gradscope" else words[1:])
        with printed() as out:
            self.code = left(main if words[0] == "gradscope" else lambda: runpy.run_path(words[1], run_name="__main__"))
        return text_of(out)


PARSERS: dict[str, Callable[[str], Any]] = {"toml": tomllib.loads, "yaml": yaml.safe_load, "json": json.loads}


def first_missing(shown: str, said: str) -> str:
    """Return the first part of what is shown that was not printed where it should be; empty if all was."""
    shown, said = (" ".join(RULE.sub("==", SECONDS.sub("N s", text)).split()) for text in (shown, said))
    first, *parts = (part.strip() for part in shown.split("..."))
    if not (said.startswith(first) and (parts or said == first)):
        words = first.split()
        at = next(at for at, (want, got) in enumerate(itertools.zip_longest(words, said.split())) if want != got)
        return " ".join(words[at : at + 12]) or "(nothing)"
    rest = said[len(first) :]
    for part in filter(None, parts[:-1]):
        _, found, rest = rest.partition(part)
        if not found:
            return part
    return "" if not parts or rest.endswith(parts[-1]) else parts[-1]


def commands(content: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a console block and the text below it."""
    for part in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
        command, _, shown = part.replace("\\\n", "").partition("\n")
        yield command.strip(), shown


@contextlib.contextmanager
def printed() -> Iterator[io.TextIOWrapper]:
    """Catch stdout and stderr as a terminal shows them."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        yield out


def text_of(out: io.TextIOWrapper) -> str:
    """Return what was caught."""
    out.seek(0)
    return out.read()


def left(program: Callable[[], Any]) -> int:
    """Run a program and return its exit code; one that raises prints its traceback, as Python itself would."""
    try:
        program()
    except SystemExit as done:
        return int(done.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


@pytest.mark.parametrize(
    ("shown", "said", "missing"),
    [
        ("a b", "a\n  b", ""),
        ("ran in 0.5 s", "ran in 12.25 s", ""),
        ("a ... c", "a b b c", ""),
        ("a ...", "a b", ""),
        ("... c", "a b c", ""),
        ("a b", "a b c", "(nothing)"),
        ("a b c", "a b", "c"),
        ("a x c", "a b c", "x c"),
        ("a ... x ... c", "a b c", "x"),
        ("a ... c", "a b c d", "c"),
        ("2 errors ...", "3 errors, 1 warning", "2 errors"),
    ],
)
def test_a_page_that_shows_something_else_is_caught(shown: str, said: str, missing: str) -> None:
    assert first_missing(shown, said) == missing
