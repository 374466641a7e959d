"""What ships for other people's CI does what it says: the hook under real hook runners, the action's steps in bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradscope.report.formats import FORMATS

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent.parent
HOOK = "gradscope-scan"
NEW_CUT = "self.student(images).data"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# --- the hook ----------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> None:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def runner(name: str) -> str:
    """Return a hook runner of this environment or of the machine; skip where there is none."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not (found and shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip(f"needs {name} and a git checkout")
    return found


@pytest.mark.parametrize("name", ["pre-commit", "prek"])
def test_a_hook_runner_installs_the_hook_and_runs_it(name: str, sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [runner(name), "try-repo", str(ROOT), HOOK, "--all-files", "--verbose"]
    monkeypatch.setenv("PRE_COMMIT_HOME", str(sample.parent / "hooks"))
    monkeypatch.setenv("PREK_HOME", str(sample.parent / "hooks"))
    monkeypatch.delenv("PYTHONPATH", raising=False)  # the hook has its own environment
    git(sample, "init", "-q")
    git(sample, "add", "-A")
    passing = subprocess.run(command, capture_output=True, text=True, check=False)
    assert passing.returncode == 0, passing.stdout + passing.stderr
    assert "0 new, 2 unchanged, 0 fixed" in passing.stdout
    edit(sample / "distill" / "model.py", "self.student(images)", NEW_CUT)
    git(sample, "add", "-A")
    failing = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failing.returncode == 1
    assert "GS202 tensor-data  new" in failing.stdout and "exit code: 1" in failing.stdout


def test_the_hook_is_what_the_hook_runners_take() -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert hook["id"] == HOOK and hook["language"] == "python"
    assert hook["require_serial"] is True and hook["pass_filenames"] is False and hook["types"] == ["python"]


def test_the_entry_of_the_hook_runs(sample: Path, gradscope: Any) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    program, *arguments = hook["entry"].split()
    assert program == "gradscope"
    assert gradscope(*arguments)[0] == 0
    edit(sample / "distill" / "model.py", "self.student(images)", NEW_CUT)
    assert gradscope(*arguments)[0] == 1


# --- the action --------------------------------------------------------------------------------------


class Job:
    """What a runner does for the steps of a composite action that are shell: inputs, outputs, environment."""

    def __init__(self, folder: Path, **inputs: str) -> None:
        self.action = yaml.safe_load((ROOT / "action.yml").read_text())
        self.folder = folder
        self.inputs = {name: each.get("default", "") for name, each in self.action["inputs"].items()} | inputs
        self.temp = folder.parent / "temp"
        self.temp.mkdir()
        self.summary = self.temp / "summary"
        self.outputs: dict[str, dict[str, str]] = {"install": {"python": sys.executable}}

    def value(self, text: str) -> str:
        """Return what an expression of the action stands for."""
        path = text.removeprefix("${{").removesuffix("}}").strip().split(".")
        if path[0] == "inputs":
            return str(self.inputs[path[1]])
        return self.outputs[path[1]].get(path[3], "") if path[0] == "steps" else ""

    def step(self, name: str) -> subprocess.CompletedProcess[str]:
        """Run a step as the runner does: bash -eo pipefail, outputs through a file."""
        step = next(each for each in self.action["runs"]["steps"] if each["name"] == name)
        out = self.temp / f"out-{step.get('id', name)}"
        out.touch()
        environment = {
            **os.environ, "RUNNER_TEMP": str(self.temp), "GITHUB_OUTPUT": str(out), "GITHUB_STEP_SUMMARY":
            str(self.summary), **{key: self.value(value) for key, value in step["env"].items()},
        }  # fmt: skip
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        self.outputs[step.get("id", name)] = dict(line.split("=", 1) for line in out.read_text().splitlines())
        return done


@pytest.mark.parametrize(
    ("inputs", "code", "findings"),
    [
        ({}, "0", "0"),
        ({"summary": "false"}, "0", "0"),
        ({"args": "--no-config --fail-on warning", "targets": "distill pixelcodec"}, "1", "2"),
        ({"targets": "nothing_of_this_name"}, "2", None),
    ],
)
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_the_steps_of_the_action_run(inputs: dict[str, str], code: str, findings: str | None, sample: Path) -> None:
    job = Job(sample, **inputs)
    run = job.step("Run gradscope")
    assert run.returncode == 0, run.stderr
    outputs = job.outputs["run"]
    assert outputs["exit-code"] == code
    assert outputs.get("findings") == findings
    end = job.step("End as gradscope did")
    assert end.returncode == int(code)
    if findings is None:
        assert "There is no file, module or installed package called" in run.stderr and "sarif" not in outputs
        return
    if findings != "0":
        assert "::error file=pixelcodec/encoder.py,line=15," in run.stdout
    assert Path(outputs["sarif"]).read_text().startswith("{") and Path(outputs["json"]).exists()
    assert job.summary.exists() == ("markdown" in FORMATS and inputs.get("summary") != "false")


def test_every_input_and_output_of_the_action_is_used_and_told() -> None:
    text = (ROOT / "action.yml").read_text()
    action = yaml.safe_load(text)
    for name, each in action["inputs"].items():
        assert f"inputs.{name}" in text.partition("\nruns:")[2] and each["description"]
    for each in action["outputs"].values():
        assert each["description"] and each["value"].startswith("${{ steps.run.outputs.")
    # Nothing that a caller writes is pasted into a script.
    assert not any("${{" in step.get("run", "") for step in action["runs"]["steps"])
