"""The man pages are those of the commands there are: `python docs/man.py` writes them anew."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from gradscope.cli.main import COMMANDS, group

FOLDER = Path(__file__).parent.parent.parent / "man"


def page(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8").replace("\\-", "-")


def test_there_is_a_page_for_each_command_and_no_other() -> None:
    assert {each.name for each in FOLDER.iterdir()} == {"gradscope.1", *(f"gradscope-{name}.1" for name in COMMANDS)}
    assert re.findall(r"gradscope-(\w+)\(1\)", page("gradscope.1")) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_has_the_options_of_its_command(name: str) -> None:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    context = click.Context(command, info_name=name, **command.context_settings)
    options = [each for each in command.get_params(context) if isinstance(each, click.Option) and not each.hidden]
    wanted = {option for each in options for option in (*each.opts, *each.secondary_opts)}
    text = page(f"gradscope-{name}.1")
    assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", re.sub(r"\\f[BP]", "", options_of(text)))) == wanted


def options_of(text: str) -> str:
    """Return the lines that name options: each is the one after a ``.TP``."""
    section = text.partition(".SH OPTIONS\n")[2].partition("\n.SH ")[0]
    return "\n".join(re.findall(r"^\.TP\n(.*)$", section, re.MULTILINE))


@pytest.mark.skipif(not shutil.which("groff"), reason="needs groff")
@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.stem)
def test_a_page_is_good_roff(path: Path) -> None:
    command = ["groff", "-man", "-Tutf8", "-ww", "-b", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stderr == "" and "EXIT STATUS" in re.sub(r".\x08|\x1b\[\d*m", "", run.stdout)
