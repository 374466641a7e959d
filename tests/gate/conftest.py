"""The sample: a small training repository with a teacher, somebody else's encoder, a configuration and a baseline."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from gradscope.cli.main import group
from gradscope.errors import GradscopeError

SAMPLE = Path(__file__).parent.parent / "sample"
OWN = ("distill", "pixelcodec", "build", "net")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the sample to work in; the working folder is changed to it."""
    folder = tmp_path / "sample"
    shutil.copytree(SAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GRADSCOPE_CACHE_DIR", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def gradscope(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return the command line in this process: exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
            del sys.modules[name]  # as a new process would: each copy of the sample has its own
        try:
            code = group.main(list(arguments), prog_name="gradscope", standalone_mode=False)
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except GradscopeError as error:
            click.echo(str(error), err=True)
            code = error.exit_code
        out, err = capsys.readouterr()
        return int(code), out, err

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("COLUMNS", "120")
    return run
