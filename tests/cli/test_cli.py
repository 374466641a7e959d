"""The command as users run it: exit codes, one sentence for bad input, a quick start without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from gradscope.cli import output
from gradscope.cli.main import COMMANDS, group
from gradscope.errors import UsageError
from gradscope.report import dot
from gradscope.session import Session


def gradscope(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gradscope", *args],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # the same answers where there is a GPU
    )


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["trace", "--model", "nothing"], 2, "no preset called"),
        (["trace", "--model", "deepseek-ocr", "--weights", "./no/such/folder"], 2, "no checkpoint folder"),
        (["trace", "--model", "deepseek-ocr", "-o", "x.bmp"], 2, "names no format"),
        (["trace", "--model", "deepseek-ocr", "-o", "no/such/folder/x.svg"], 2, "no folder"),
        (["trase"], 2, "No such command"),
        (["trace"], 2, "--model"),
    ],
)
def test_a_bad_request_is_one_sentence(args: list[str], code: int, words: str) -> None:
    done = gradscope(*args)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--input 3x3", "takes a float tensor"),
        ("--input 1x3x100x100", "multiples of 64"),
        ("--input 1x3x64x64:int64", "takes a float tensor"),
        ("--input 1x3x64x64 --input 1x3x64x64", "takes one image"),
        ("--input empty.png", "cannot be read as an image"),
        ("--device cuda --mode real", "finds none here"),
        ("--device mps", "cannot even be pretended"),
    ],
)
def test_a_bad_request_of_the_preset_says_what_is_wrong(
    options: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_built", lambda: False)
    with pytest.raises(UsageError, match=words) as caught:
        group.main(["trace", "--model", "deepseek-ocr", *options.split()], standalone_mode=False)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2


def test_a_trace_writes_its_reports_and_overwrites_nothing(tmp_path: Path) -> None:
    args = ["trace", "--model", "deepseek-ocr", "--no-verify", "--format", "json"]
    files = ["-o", "s.json", "-o", "g.svg", "-o", "g.png", "-o", "g.dot", "-o", "r.txt"]
    done = gradscope(*args, *files, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["schema"] == "gradscope.session/1"
    assert json.loads((tmp_path / "s.json").read_text())["verdict"] == "blocked"
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    assert "encoder.py" in (tmp_path / "g.svg").read_text()
    assert "GS101" in (tmp_path / "r.txt").read_text()
    again = gradscope(*args, *files, cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_where_no_renderer_draws_the_source_and_the_report_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(source: str, fmt: str) -> bytes:
        raise UsageError("No Graphviz renderer is installed.", hint="Install one.")

    monkeypatch.setattr(dot, "draw", refuse)
    session = Session("trace", "flows", target={"name": "m", "entry": "forward", "inputs": [], "mode": "real",
                      "device": "cpu", "dtype": "float32"})  # fmt: skip
    files = (("svg", tmp_path / "graph.svg"), ("json", tmp_path / "session.json"))
    with pytest.raises(UsageError, match=r"No Graphviz renderer .*graph\.dot was written in place of graph\.svg"):
        output.Reporting("text", files, color="never").write(session)
    assert (tmp_path / "graph.dot").read_text().startswith("digraph")
    assert (tmp_path / "session.json").exists()
    assert "flows  the gradient arrives" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns(command: str) -> None:
    shown = CliRunner().invoke(group, [*command.split(), "--help"], terminal_width=80).output
    assert len(shown.splitlines()) > 5
    assert [line for line in shown.splitlines() if len(line) > 80] == []


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, gradscope\n"
        "from click.testing import CliRunner\n"
        "from gradscope.cli.main import group\n"
        "assert CliRunner().invoke(group, ['--help']).exit_code == 0\n"
        "assert CliRunner().invoke(group, ['trace', '--help']).exit_code == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_scan_of_one_file_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("import torch\n\n\n@torch.no_grad()\ndef forward(x):\n    return x\n")
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from gradscope.cli.main import group\n"
        "result = CliRunner().invoke(group, ['scan', 'net.py', '--no-cache'])\n"
        "print(result.output)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'PIL', 'graphviz')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "1 file" in done.stdout


SPARE = """
from torch import nn

class Spare(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)
"""


@pytest.mark.parametrize(
    ("options", "code", "first"),
    [
        ([], 0, "✓ flows  the gradient arrives"),
        (["--wrt", "spare"], 1, "! flows  nothing asked about is used"),
        (["--wrt", "spare", "--fail-on", "never"], 0, "! flows  nothing asked about is used"),
        (["--wrt", "spare", "--wrt", "used"], 0, "✓ flows  the gradient arrives"),
    ],
)
def test_no_gradient_arrives_where_nothing_asked_about_is_used(
    options: list[str], code: int, first: str, tmp_path: Path
) -> None:
    (tmp_path / "models.py").write_text(SPARE)
    done = gradscope("trace", "models.py:Spare", "--input", "2x4", *options, cwd=tmp_path)
    assert done.returncode == code and done.stdout.startswith(first)
