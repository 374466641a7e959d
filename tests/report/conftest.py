"""A real browser for the page, where there is one, and the sessions that it is shown."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gradscope.report.formats import render
from gradscope.session import Session

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Yield a headless Chromium; skip where the machine has none or playwright is not installed.

    No longer than a module: playwright runs an event loop in this thread, and other tests want to run their own.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright: pip install 'torch-gradscope[browser]'")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_api.sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("there is no Chromium here: install one, or run `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """A report in the browser: what it asked for, what it complained about, and the page itself."""

    def __init__(self, page: Any, file: Path) -> None:
        self.page = page
        self.file = file
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(file.as_uri())

    def box(self, label: str) -> Any:
        """Return the boxes in sight whose name is ``label``."""
        named = self.page.locator(".pane:not([hidden]) .label > .name", has_text=label)
        return named.locator("xpath=../..")


Opener = Callable[..., Page]


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Iterator[Opener]:
    """Yield a function that opens a session's page; afterwards nothing but the file was asked for, without a word."""
    pages: list[Page] = []
    contexts: list[Any] = []

    def show(session: Session, *, full: bool = False, width: int = 1280, height: int = 900, **options: Any) -> Page:
        file = tmp_path / f"report{len(pages)}.html"
        file.write_bytes(render(session, "html", full=full))
        options.setdefault("reduced_motion", "reduce")
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        pages.append(Page(context.new_page(), file))
        return pages[-1]

    yield show
    for page in pages:
        assert set(page.requests) == {page.file.as_uri()}
        assert page.complaints == []
    for context in contexts:
        context.close()
