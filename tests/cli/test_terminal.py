"""What a terminal really gets, through a pseudo-terminal and through pipes of any encoding."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gradscope.errors import UsageError
from gradscope.stages import listening, tell
from gradscope.tracing.library import trace

SOURCE = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            return self.encoder(x)
"""
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(SOURCE)
    return tmp_path


def in_a_terminal(folder: Path, *args: str, **variables: str) -> str:
    """Run the command in a pseudo-terminal and return all that it wrote there, to stdout and stderr."""
    keys = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH")
    env = {key: os.environ[key] for key in keys if key in os.environ}
    env |= {"TERM": "xterm-256color", "COLUMNS": "80", "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1", **variables}
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "gradscope", *args]
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, cwd=folder, env=env) as process:
        os.close(follower)
        chunks = []
        while True:
            try:
                chunk = os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
    os.close(leader)
    assert process.returncode == 1
    return b"".join(chunks).decode()


def test_colours_only_where_they_are_wanted(folder: Path) -> None:
    assert "\x1b[1;31m✗ 1 error" in in_a_terminal(folder, "scan", "net.py")
    no_color = in_a_terminal(folder, "scan", "net.py", NO_COLOR="1")
    assert "\x1b[1m✗ 1 error" in no_color and not re.search(r"\x1b\[[0-9;]*3[0-7]", no_color)
    for plain in (
        in_a_terminal(folder, "scan", "net.py", "--color", "never"),
        in_a_terminal(folder, "scan", "net.py", TERM="dumb"),
    ):
        assert "\x1b" not in plain
        assert plain.startswith("✗ 1 error")


def test_a_pipe_and_a_log_get_no_escape_sequences(folder: Path) -> None:
    for variables in ({}, {"GITHUB_ACTIONS": "true"}):
        done = subprocess.run(
            [sys.executable, "-m", "gradscope", "scan", "net.py"], capture_output=True, check=False, cwd=folder,
            env={**os.environ, **variables},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (1, b"")
        assert b"\x1b" not in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "utf-8"])
@pytest.mark.parametrize("args", [["scan", "net.py"], ["explain", "GS101"], ["explain"], ["explain", "GS501"]])
def test_any_encoding_will_do(folder: Path, encoding: str, args: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gradscope", *args], capture_output=True, check=False, cwd=folder,
        env={**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == (1 if args[0] == "scan" else 0)
    assert done.stderr == b""
    text = done.stdout.decode(encoding)
    assert {"scan": "net.py:11", "explain": "GS101" if "GS501" not in args else "GS501"}[args[0]] in text
    assert not re.search(r"\?{2}", text)


def test_a_trace_shows_its_stages_and_leaves_nothing_of_them(folder: Path) -> None:
    (folder / "make.py").write_text(
        "import torch\nfrom net import Net\ndef build():\n    return Net(), torch.ones(2, 4)\n"
    )
    written = in_a_terminal(folder, "trace", "make.py:build")
    progress, _, report = written.rpartition("\x1b[?25h")  # the cursor is shown again where the spinner ends
    stages = list(dict.fromkeys(re.findall(r"Tracing make\.py:build: ([^\x1b\r\n]+)", ESCAPE.sub("\r", progress))))
    assert stages[0].strip() == "loading torch"
    assert "Tracing" not in report
    assert ESCAPE.sub("", report).lstrip("\r\n").startswith("✗ blocked")
    quiet = in_a_terminal(folder, "trace", "make.py:build", "-q")
    assert "Tracing" not in quiet
    assert quiet.startswith("\x1b[1;31m✗ blocked")


def test_every_run_of_a_trace_is_told() -> None:
    class Layered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return self.encoder(x.detach()) + self.encoder.bias.detach()

    told: list[str] = []
    with listening(told.append):
        session = trace(Layered(), torch.ones(2, 4), wrt="encoder.bias")
    assert told[0] == "run 1"
    assert len(told) == session.stats["runs"]
    assert all(stage.endswith(", to verify the fix") for stage in told[1:]) and len(told) > 1
    numeric: list[str] = []
    with listening(numeric.append):
        trace(nn.Linear(4, 1), torch.ones(2, 4), numeric=True)
    assert any(stage.startswith("finite differences") for stage in numeric)


def test_nobody_has_to_listen() -> None:
    heard: list[str] = []
    with pytest.raises(UsageError), listening(heard.append):
        tell("a")
        raise UsageError("no")
    tell("b")
    assert heard == ["a"]
