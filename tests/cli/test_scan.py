"""``gradscope scan`` as a command: exit codes, the gate's options, formats, and what a reader sees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

NET = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            return self.layer(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)

    @torch.inference_mode()
    def generate(self, x):
        return self(x).item()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def gradscope(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradscope", "scan", "--no-cache", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_the_report_says_where_why_and_what_to_do(folder: Path) -> None:
    run = gradscope(folder, "net.py")
    assert run.returncode == 1 and run.stderr == ""
    for text in (
        "1 error, 1 warning", "forward [no_grad, line 11]  blocked", "net.py:11", "> with torch.no_grad():",
        "every public way through Net leads", "clean inside it, call these to keep the gradient: layer", "net.py:23",
        "Use forward where a gradient is wanted.",
    ):  # fmt: skip
        assert text in run.stdout


@pytest.mark.parametrize(
    ("options", "code", "rules"),
    [
        ([], 1, ["GS104", "GS101", "GS302"]),
        (["--ignore", "GS104"], 0, ["GS101", "GS302"]),
        (["--ignore", "no-grad-block,GS3"], 0, ["GS101"]),
        (["--select", "GS101"], 0, ["GS101"]),
        (["--select", "GS101", "--fail-on", "warning"], 1, ["GS101"]),
        (["--select", "GS3", "--fail-on", "note"], 1, ["GS302"]),
        (["--fail-on", "never"], 0, ["GS104", "GS101", "GS302"]),
        (["--per-file-ignores", "net.py:GS1"], 0, ["GS302"]),
        (["--per-file-ignores", "other.py:GS1"], 1, ["GS104", "GS101", "GS302"]),
        (["--entry", "Model.forward"], 0, []),
        (["--entry", "Net.forward"], 1, ["GS104"]),
        (["--entry", "Model"], 0, ["GS101"]),
        (["--entry", "Model.generate"], 1, ["GS101"]),
    ],
)
def test_the_gate(folder: Path, options: list[str], code: int, rules: list[str]) -> None:
    run = gradscope(folder, "net.py", "--format", "json", *options)
    assert [finding["rule"] for finding in json.loads(run.stdout)["findings"]] == rules
    assert run.returncode == code


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nothing_of_this_name"], 2, "There is no file, module or installed package called"),
        (["missing.py"], 2, "There is no file or folder missing.py"),
        (["net.py", "--select", "GS999"], 2, "There is no rule 'GS999'"),
        (["net.py", "--per-file-ignores", "GS104"], 2, "is no per-file ignore"),
        (["net.py", "--entry", "Net.backward"], 2, "There is no function or class 'Net.backward'"),
        (["net.py", "-o", "picture.png"], 2, "names no format that can be written here"),
        (["net.py", "-o", "net.json"], 2, "net.json exists already"),
        (["broken.py"], 3, "Nothing could be scanned"),
        (["math"], 3, "Nothing could be scanned"),
        ([], 2, "Missing argument"),
    ],
)
def test_bad_input_is_one_sentence(folder: Path, arguments: list[str], code: int, said: str) -> None:
    (folder / "net.json").write_text("kept")
    (folder / "broken.py").write_text("import torch\ntorch.no_grad(\n")
    run = gradscope(folder, *arguments)
    assert run.returncode == code and said in run.stderr and "Traceback" not in run.stderr
    assert run.stdout == "" and (folder / "net.json").read_text() == "kept"


def test_a_file_that_cannot_be_read_is_never_clean(folder: Path) -> None:
    (folder / "net.py").write_text("import torch\n")
    (folder / "broken.py").write_text("import torch\ntorch.no_grad(\n")
    run = gradscope(folder, ".")
    assert run.returncode == 3
    assert "What could not be read" in run.stdout and "broken.py" in run.stdout
    assert "nothing found in what could be read; 1 file could not" in run.stdout


def test_github_annotations(folder: Path) -> None:
    lines = gradscope(folder, "net.py", "--format", "github").stdout.splitlines()
    assert lines[0].startswith("::error file=net.py,line=11,endLine=11,title=GS104 no-grad-block::Net.forward computes")
    assert [line.split(" ")[0] for line in lines] == ["::error", "::warning", "::notice"]


def test_several_outputs_at_once(folder: Path) -> None:
    run = gradscope(folder, "net.py", "-o", "a.json", "-o", "a.txt")
    assert run.stderr.splitlines() == ["wrote a.json", "wrote a.txt"]
    assert json.loads((folder / "a.json").read_text())["kind"] == "scan"
    assert "net.py:11" in (folder / "a.txt").read_text()


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_place_stays_one_word_at_any_width(folder: Path, columns: int) -> None:
    (folder / "a_rather_long_name_of_a_folder").mkdir()
    (folder / "a_rather_long_name_of_a_folder" / "with_a_long_file_name.py").write_text(NET)
    command = [sys.executable, "-m", "gradscope", "scan", "--no-cache", "a_rather_long_name_of_a_folder"]
    environment = {"COLUMNS": str(columns), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert "a_rather_long_name_of_a_folder/with_a_long_file_name.py:11" in run.stdout
