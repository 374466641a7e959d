"""``gradscope report``: saved sessions in every format, with the exit code of the command that made them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from jsonschema import Draft202012Validator
from junitparser import JUnitXml

from gradscope.cli.main import group
from gradscope.errors import UsageError
from gradscope.findings import Finding, Source
from gradscope.flow import FlowEdge, FlowGraph, FlowNode
from gradscope.report.formats import FORMATS, hold_several
from gradscope.session import Session

DRAWN = {name for name, each in FORMATS.items() if each.needs_graph}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the sessions of a scan and of a trace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    target = {"name": "m", "entry": "forward", "inputs": [], "mode": "real", "device": "cpu", "dtype": "float32"}
    cut = Finding("F1", "GS104", "no-grad-block", "error", "Model.forward runs under no_grad.", "m.py", 3, cuts=("w",))
    warning = Finding("F2", "GS201", "detach", "warning", "detach in f.", "m.py", 9, source="x.detach()")
    nodes = [FlowNode("n1", "forward", "region", "blocked", finding="F1", path="m.py", line=3),
             FlowNode("n2", "w * x", "operation", "blocked", "n1"),
             FlowNode("o", "output.0", "output", "blocked")]  # fmt: skip
    Session("trace", "blocked", target=target, sources={"w": Source("w", "parameter", "blocked", findings=["F1"])},
            findings=[cut], fix_set=["F1"], graph=FlowGraph(nodes, [FlowEdge("n1", "o", "blocked")]),
            stats={"seconds": 1.0, "runs": 1}).save("trace.json")  # fmt: skip
    Session("scan", "partial", target={"name": "pkg", "entry": ""}, findings=[warning],
            stats={"files": 1, "seconds": 0.1}).save("scan.json")  # fmt: skip
    Session("scan", "flows", target={"name": "odd", "entry": ""}, unseen=["odd.py: no Python"]).save("unread.json")
    return tmp_path


def report(*args: str, given: bytes = b"") -> Result:
    result = CliRunner().invoke(group, ["report", *args], standalone_mode=False, input=given)
    if result.exception is not None and not isinstance(result.exception, UsageError):
        raise result.exception
    return result


def code(result: Result) -> int:
    return int(result.return_value)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_shows_a_trace_and_those_that_draw_none_a_scan(fmt: str, folder: Path) -> None:
    shown = report("trace.json", "--format", fmt)
    assert code(shown) == 1 and shown.stdout_bytes
    scan = report("scan.json", "--format", fmt)
    if fmt in DRAWN:
        assert "no graph that could be drawn" in str(scan.exception)
    else:
        assert code(scan) == 0 and b"GS201" in scan.stdout_bytes


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["trace.json"], 1),
        (["trace.json", "--fail-on", "never"], 0),
        (["trace.json", "--ignore", "GS104"], 0),
        (["scan.json"], 0),
        (["scan.json", "--fail-on", "warning"], 1),
        (["scan.json", "--fail-on", "warning", "--per-file-ignores", "m.py:GS201"], 0),
        (["unread.json"], 3),
        (["unread.json", "scan.json"], 3),
        (["unread.json", "trace.json", "scan.json"], 1),
    ],
)
def test_the_exit_code_is_that_of_the_gate(args: list[str], wanted: int, folder: Path) -> None:
    assert code(report(*args)) == wanted


def test_standard_input_is_read_and_json_comes_out_as_it_went_in(folder: Path) -> None:
    given = (folder / "trace.json").read_bytes()
    assert json.loads(report("-", "--format", "json", given=given).stdout) == json.loads(given)


def test_several_files_at_once(folder: Path) -> None:
    assert code(report("trace.json", "-o", "r.sarif", "-o", "r.xml", "-o", "gitlab=q.json", "-o", "r.md")) == 1
    assert json.loads((folder / "r.sarif").read_text())["version"] == "2.1.0"
    assert JUnitXml.fromfile("r.xml").failures == 1
    assert len(json.loads((folder / "q.json").read_text())) == 1
    assert "GS104" in (folder / "r.md").read_text()


def test_several_sessions_in_one_report(folder: Path) -> None:
    assert code(report("trace.json", "scan.json", "-o", "r.sarif", "-o", "r.xml")) == 1
    assert len(json.loads((folder / "r.sarif").read_text())["runs"]) == 2
    assert len(list(JUnitXml.fromfile("r.xml"))) == 2
    text = report("trace.json", "scan.json").stdout
    assert "GS104" in text and "GS201" in text


@pytest.mark.parametrize("fmt", sorted(set(FORMATS) - set(hold_several())))
def test_a_format_for_one_session_says_so_before_anything_is_written(fmt: str, folder: Path) -> None:
    refused = report("trace.json", "trace.json", "-o", "r.sarif", "-o", f"{fmt}=x.out")
    assert f"A {fmt} report shows one session, and 2 were given." in str(refused.exception)
    assert refused.stdout == "" and not (folder / "r.sarif").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["missing.json"], "There is no file missing.json"),
        (["m.txt"], "it is no JSON"),
        (["damaged.json"], "findings[0].line must be an integer"),
        (["scan.json", "-o", "x.svg"], "scan.json holds no graph"),
        (["scan.json", "-o", "x.bmp"], "names no format"),
        (["scan.json", "trace.json", "--baseline", "b.json", "--update-baseline"], "takes one session"),
    ],
)
def test_bad_input_is_one_sentence(args: list[str], said: str, folder: Path) -> None:
    (folder / "m.txt").write_text("hello")
    data: dict[str, Any] = json.loads((folder / "trace.json").read_text())
    data["findings"][0]["line"] = "three"
    (folder / "damaged.json").write_text(json.dumps(data))
    refused = report(*args)
    assert isinstance(refused.exception, UsageError) and said in refused.exception.message
    assert "\n" not in refused.exception.message and refused.stdout == ""


def test_the_schema_is_printed_and_judges_the_files(folder: Path) -> None:
    schema = json.loads(report("--schema").stdout)
    for path in folder.glob("*.json"):
        Draft202012Validator(schema).validate(json.loads(path.read_text()))


def test_nothing_heavy_is_imported(folder: Path) -> None:
    program = (
        "import sys; from gradscope.cli.main import group\n"
        "group.main(['report', 'trace.json', '-o', 'r.sarif', '-o', 'r.xml', '-o', 'r.md'], standalone_mode=False)\n"
        "sys.exit(sorted({'torch', 'jsonschema', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
