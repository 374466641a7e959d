"""``[tool.gradscope]``: found upward, checked to the last key, and overruled by environment and option."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gradscope.config import Config, load_config, schema
from gradscope.errors import UsageError
from gradscope.expectations import Run

WHOLE = """\
[tool.gradscope]
targets = ["src", "timm.models"]
select = ["GS1", "detach"]
ignore = ["GS302"]
fail-on = "warning"
baseline = "known.json"
per-file-ignores = {"tests/*" = ["GS1", "GS2"]}

[[tool.gradscope.trace]]
model = "deepseek-ocr"
input = ["1x3x512x512"]
mode = "structural"
device = "cuda"
dtype = "bfloat16"
head = true
fixed = false
verify = false
seed = 3
weights = "./weights"

[[tool.gradscope.expect]]
target = "pkg.model:build"
entry = "training_step"
input = ["2x3x8x8"]
wrt = ["encoder"]
trainable = ["encoder"]
loss = "loss.py:loss"
numeric = true
flows = ["encoder.*"]
blocked = ["teacher.*"]
partial = ["stem"]
unused = ["old"]
reason = "it is so"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "pyproject.toml"
    path.write_text(text)
    return path


def test_all_of_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, WHOLE)
    monkeypatch.chdir(tmp_path)
    config = load_config()
    assert dict(config.options) == {
        "select": ["GS1", "detach"], "ignore": ["GS302"], "fail_on": "warning", "baseline": "known.json",
        "per_file": ["tests/*:GS1,GS2"],
    }  # fmt: skip
    assert config.targets == ("src", "timm.models")
    assert config.traces == (
        Run(model="deepseek-ocr", input=("1x3x512x512",), mode="structural", device="cuda", dtype="bfloat16",
            head=True, verify=False, seed=3, weights="./weights"),
    )  # fmt: skip
    (expectation,) = config.expectations
    assert expectation.run == Run(
        target="pkg.model:build", entry="training_step", input=("2x3x8x8",), wrt=("encoder",), trainable=("encoder",),
        loss="loss.py:loss", numeric=True,
    )  # fmt: skip
    assert (expectation.reason, expectation.place.line) == ("it is so", 21)
    assert {key: place.source for key, place in expectation.places.items()} == {
        "flows": 'flows = ["encoder.*"]', "blocked": 'blocked = ["teacher.*"]', "partial": 'partial = ["stem"]',
        "unused": 'unused = ["old"]',
    }  # fmt: skip


def test_the_nearest_file_with_the_table_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "member" / "src"
    inner.mkdir(parents=True)
    write(tmp_path, '[tool.gradscope]\nbaseline = "b.json"\n')
    write(tmp_path / "member", "[project]\nthis is no TOML")  # another tool's trouble
    monkeypatch.chdir(inner)
    assert dict(load_config().options) == {"baseline": "../../b.json"}
    write(tmp_path / "member", '[tool.gradscope]\nfail-on = "never"\n')
    assert dict(load_config().options) == {"fail_on": "never"}


def test_without_a_file_nothing_is_configured(tmp_path: Path) -> None:
    assert load_config(start=tmp_path) == Config()
    write(tmp_path, "tool = 'gradscope'")
    assert load_config(start=tmp_path) == Config()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tool.gradscope\n", "is no valid TOML"),
        ("[tool.gradscope]\nfail_on = 'note'", "has no key 'fail_on'. Did you mean 'fail-on'?"),
        ("[tool.gradscope]\nslect = []", "Did you mean 'select'?"),
        ("[tool.gradscope]\nzzz = 1", "has no key 'zzz'. It may have: targets, select"),
        ("[tool.gradscope]\nselect = 'GS1'", "select in [tool.gradscope] has to be a list, not 'GS1'."),
        ("[tool.gradscope]\nselect = ['GS1', 1]", "select in [tool.gradscope], item 2 has to be a string, not 1."),
        ("[tool.gradscope]\nfail-on = 'fatal'", "fail-on in [tool.gradscope] is 'fatal'. Use one of error, warning"),
        ("[tool.gradscope]\nper-file-ignores = ['GS1']", "has to be a table"),
        ("[tool.gradscope]\nper-file-ignores = {'a.py' = 'GS1'}", "'a.py' in per-file-ignores in [tool.gradscope] has"),
        ("tool.gradscope = 3", "[tool.gradscope] has to be a table, not 3."),
        ("[tool.gradscope]\nexpect = {}", "expect in [tool.gradscope] has to be a list"),
        ("[[tool.gradscope.expect]]\ntarget = 'a:b'", "expects nothing. Give it one of flows, blocked"),
        ("[[tool.gradscope.expect]]\ntarget = 'a:b'\nflows = []", "flows in expect in [tool.gradscope] is empty."),
        ("[[tool.gradscope.expect]]\nflows = ['a']", "has to name one thing to trace. Give it either target or model."),
        ("[[tool.gradscope.trace]]\ntarget = 'a:b'\nmodel = 'c'", "has to name one thing to trace."),
        ("[[tool.gradscope.trace]]\ntarget = 'a:b'\nflow = ['c']", "has no key 'flow'."),
        (
            "[[tool.gradscope.trace]]\ntarget = 'a:b'\nseed = true",
            "seed in trace in [tool.gradscope] has to be a whole",
        ),
    ],
)
def test_what_is_not_understood_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert said in str(caught.value) and "pyproject.toml" in str(caught.value)
    assert "\n" not in caught.value.message


def test_a_file_that_is_named_has_to_have_the_table(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no \[tool.gradscope\] table"):
        load_config(write(tmp_path, "[project]\nname = 'x'\n"))
    with pytest.raises(UsageError, match=r"Cannot read .*nothing.toml: No such file"):
        load_config(tmp_path / "nothing.toml")


def test_expectations_that_have_no_header_of_their_own_are_placed_at_the_table(tmp_path: Path) -> None:
    path = write(tmp_path, "\n[tool.gradscope]\nexpect = [{target = 'a:b', flows = ['c']}]\n")
    assert load_config(path).expectations[0].place.line == 2


# --- the schema --------------------------------------------------------------------------------------


def test_the_schema_is_a_valid_one_and_accepts_what_is_accepted_here() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    tomllib = pytest.importorskip("tomllib")
    jsonschema.Draft7Validator.check_schema(schema())
    validator = jsonschema.Draft7Validator(schema())
    assert not list(validator.iter_errors(tomllib.loads(WHOLE)["tool"]["gradscope"]))
    for bad in ({"fail_on": "note"}, {"trace": [{"target": "a", "model": "b"}]}, {"expect": [{"target": "a"}]}):
        assert list(validator.iter_errors(bad)), bad


def test_the_schema_reads_like_those_of_schemastore() -> None:
    assert schema()["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert schema()["$id"].startswith("https://json.schemastore.org/partial-")
    assert schema()["additionalProperties"] is False
    runs = schema()["properties"]["expect"]["items"]["properties"]
    for name, rule in {**schema()["properties"], **runs, **schema()["definitions"]}.items():
        assert "$ref" in rule or (rule["description"] and not rule["description"].endswith(".")), name


def test_the_sample_and_the_schema_pass_validate_pyproject(tmp_path: Path) -> None:
    pytest.importorskip("validate_pyproject")
    (tmp_path / "schema.json").write_text(json.dumps(schema()))
    sample = Path(__file__).parent.parent / "sample" / "pyproject.toml"
    command = [sys.executable, "-m", "validate_pyproject", f"--tool=gradscope={tmp_path}/schema.json"]
    for path, code in ((sample, 0), (write(tmp_path, "[tool.gradscope]\nfail_on = 'note'\n"), 1)):
        run = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
        assert run.returncode == code, run.stdout + run.stderr


# --- as a command ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text("import torch\n\n\ndef f(x):\n    return x.detach() * 2\n")
    write(tmp_path, '[tool.gradscope]\ntargets = ["net.py"]\nfail-on = "note"\n')
    return tmp_path


@pytest.mark.parametrize(
    ("options", "environment", "code"),
    [
        ([], {}, 1),  # file
        ([], {"GRADSCOPE_FAIL_ON": "never"}, 0),  # environment over file
        (["--fail-on", "note"], {"GRADSCOPE_FAIL_ON": "never"}, 1),  # option over environment
        (["--fail-on", "error"], {}, 0),  # option over file
        (["--no-config", "net.py"], {}, 0),  # default
        (["--no-config", "--config", "pyproject.toml", "net.py"], {}, 0),
        (["--config", "other.toml"], {}, 0),
        ([], {"GRADSCOPE_CONFIG": "other.toml"}, 0),
        ([], {"GRADSCOPE_SELECT": "GS1 GS3"}, 0),
        ([], {"GRADSCOPE_PER_FILE_IGNORES": "net.py:GS2"}, 0),
        ([], {"GRADSCOPE_UPDATE_BASELINE": "1"}, 2),
        (["--no-config"], {}, 2),
        (["--config", "nothing.toml"], {}, 2),
    ],
)
def test_an_option_beats_the_environment_beats_the_file(
    options: list[str], environment: dict[str, str], code: int, folder: Path
) -> None:
    (folder / "other.toml").write_text('[tool.gradscope]\ntargets = ["net.py"]\nfail-on = "never"\n')
    command = [sys.executable, "-m", "gradscope", "scan", "--no-cache", *options]
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path), **environment}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == code, run.stdout + run.stderr
    assert "Traceback" not in run.stderr


def test_a_configuration_that_is_wrong_stops_no_help(folder: Path) -> None:
    write(folder, "[tool.gradscope]\nwrong = 1\n")
    for arguments, code in ((["scan", "--help"], 0), (["explain", "GS101"], 0), (["scan"], 2)):
        command = [sys.executable, "-m", "gradscope", *arguments]
        assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == code
