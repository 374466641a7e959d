"""What several modules of these tests are run in."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest


@pytest.fixture
def vendor(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install the package that a module of tests has the sources of, ``VENDOR``; return the folder it lies in."""
    home = tmp_path / "site"
    for name, source in request.module.VENDOR.items():
        path = home / "vendor" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(source))
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    yield home
    for name in [name for name in sys.modules if name.partition(".")[0] in ("vendor", "encoders")]:
        del sys.modules[name]
