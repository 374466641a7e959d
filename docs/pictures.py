"""The pictures of this site, each made by gradscope itself: graphs of real sessions, and screens of the terminal."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.terminal_theme import MONOKAI

import gradscope
from gradscope.report.formats import render, show
from gradscope.session import Session
from gradscope.targets.request import Request
from gradscope.targets.spec import load_preset
from gradscope.tracing.tracer import trace_subject
from gradscope.tracing.workshops import open_workshop

TUTORIAL = Path(__file__).parent / "tutorial.md"
TRACE = Path(__file__).parent / "trace.md"
FILE = re.compile(r'^```python title="(.+?)"\n(.*?)^```$', re.DOTALL | re.MULTILINE)
COLUMNS = 104
# What a terminal shows as grey is all but black in this theme.
GREY = "#8d919a"


def pictures() -> dict[str, bytes]:
    """Return each picture by its path in the site's folder."""
    return {name: draw() for name, draw in PICTURES.items()}


def screen(command: str, session: Session) -> bytes:
    """Return a terminal as a picture: the command, and what it shows."""
    console = Console(file=io.StringIO(), width=COLUMNS, record=True, force_terminal=True)
    console.print(f"[bold]$ {command}[/]", highlight=False)
    show(session, console)
    picture = console.export_svg(title="", theme=MONOKAI, unique_id="screen")
    # A page of this site asks no other server for anything, and not for a font either.
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
    picture = picture.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")
    return picture.replace("#625e4c", GREY).encode()


@cache
def _founding(*, fixed: bool = False) -> Session:
    return trace_subject(load_preset("deepseek-ocr")(Request(fixed=fixed)), open_workshop("structural", "cuda"))


@cache
def _tutorial() -> tuple[Session, Session]:
    """Trace the two models of the tutorial, from the files that it shows."""
    with _files_of(TUTORIAL):
        train, opened = importlib.import_module("train"), importlib.import_module("opened")
        return _traced(train.build(), train.loss), _traced(opened.build(), train.loss)


def _ways() -> Session:
    with _files_of(TRACE):
        return gradscope.trace(importlib.import_module("ways").build(), torch.randn(3, 8))


def _traced(built: Any, loss: Any) -> Session:
    model, batch = built
    return gradscope.trace(model, **batch, loss=loss)


@contextlib.contextmanager
def _files_of(page: Path) -> Iterator[None]:
    """Make what a page shows as files importable."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in FILE.findall(page.read_text(encoding="utf-8")):
            (Path(folder) / name).write_text(content, encoding="utf-8")
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            sys.path.remove(folder)


PICTURES: dict[str, Callable[[], bytes]] = {
    "pictures/clipseg-broken.svg": lambda: render(_tutorial()[0], "svg"),
    "pictures/clipseg-healed.svg": lambda: render(_tutorial()[1], "svg"),
    "pictures/deepseek-ocr-broken.svg": lambda: render(_founding(), "svg"),
    "pictures/deepseek-ocr-healed.svg": lambda: render(_founding(fixed=True), "svg"),
    "pictures/deepseek-ocr-trace.svg": lambda: screen("gradscope trace --model deepseek-ocr", _founding()),
    "pictures/deepseek-ocr-scan.svg": lambda: screen(
        "gradscope scan deepseek_ocr_encoder", gradscope.scan("deepseek_ocr_encoder")
    ),
    "pictures/ways.svg": lambda: render(_ways(), "svg"),
}
