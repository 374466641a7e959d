"""``gradscope explain``: the list, one page in three formats, a hint for a typing error; no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from gradscope.cli.main import group
from gradscope.errors import UsageError
from gradscope.rules import RULES, load_rule_page


def explain(*args: str) -> Result:
    return CliRunner().invoke(group, ["explain", *args], env={"COLUMNS": "80"}, catch_exceptions=False)


def test_without_a_rule_all_are_listed_within_80_columns() -> None:
    lines = explain().stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for code, name in RULES.items():
        assert any(code in line and name in line for line in lines)


@pytest.mark.parametrize("code", RULES)
def test_a_page_is_rendered_within_80_columns(code: str) -> None:
    lines = explain(code).stdout.splitlines()
    assert lines[0] == f"{code} {RULES[code]}"
    body = lines[: lines.index(next(line for line in lines if line.strip() == "References"))]
    assert max(map(len, body)) <= 80
    assert not any("``" in line for line in lines)


def test_a_name_does_as_well_as_a_code() -> None:
    assert explain("Inference-Mode-Decorator").stdout == explain("gs101").stdout


def test_plain_text_keeps_the_backticks_and_whole_urls() -> None:
    text = explain("GS101").stdout
    assert "`torch.enable_grad()`" in text
    assert "generated/torch.autograd.grad_mode.inference_mode.html\n" in text


def test_colour_is_asked_for_and_declined() -> None:
    assert "\x1b[" in explain("GS101", "--color", "always").stdout
    assert "\x1b[" not in explain("GS101", "--color", "never").stdout


def test_markdown_is_the_page_itself() -> None:
    assert explain("GS101", "--format", "markdown").stdout == load_rule_page("GS101")
    assert "| GS101 | inference-mode-decorator |" in explain("--format", "markdown").stdout


def test_json_is_one_record_or_a_list_of_them() -> None:
    record = json.loads(explain("detach", "--format", "json").stdout)
    assert record == {"code": "GS201", "name": "detach", "markdown": load_rule_page("GS201")}
    records = json.loads(explain("--format", "json").stdout)
    assert [each["code"] for each in records] == list(RULES)


def test_an_unknown_rule_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="detatch"):
        explain("detatch")
    done = subprocess.run(
        [sys.executable, "-m", "gradscope", "explain", "detatch"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "Did you mean GS201 detach?" in done.stderr
    assert "Traceback" not in done.stderr


def test_explain_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from gradscope.cli.main import group\n"
        "assert CliRunner().invoke(group, ['explain']).exit_code == 0\n"
        "assert CliRunner().invoke(group, ['explain', 'GS101']).exit_code == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
