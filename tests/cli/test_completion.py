"""Completion as a shell asks for it: the script is sourced by a real bash, and torch is never imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def environment(folder: Path) -> dict[str, str]:
    """Return an environment in which ``gradscope`` is a program."""
    program = folder / "gradscope"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gradscope "$@"\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("gradscope ch", "check"),
        ("gradscope scan --fail-on n", "note never"),
        ("gradscope scan --up", "--update-baseline"),
        ("gradscope trace --mode s", "structural"),
        ("gradscope completion z", "zsh"),
    ],
)
def test_bash_completes(line: str, expected: str, tmp_path: Path) -> None:
    words = line.split()
    script = f"""
        source <(gradscope completion bash)
        complete -p gradscope
        COMP_WORDS=({" ".join(words)}) COMP_CWORD={len(words) - 1}
        _gradscope_completion gradscope
        echo "${{COMPREPLY[*]}}"
    """
    command = ["bash", "--noprofile", "--norc", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), check=False)
    assert run.stdout.splitlines() == ["complete -o nosort -F _gradscope_completion gradscope", expected], run.stderr


@pytest.mark.parametrize(("shell", "line"), [("zsh", "#compdef gradscope"), ("fish", "complete --no-files --command")])
def test_other_shells_get_a_script_of_their_own(shell: str, line: str, tmp_path: Path) -> None:
    command = ["gradscope", "completion", shell]
    env = environment(tmp_path)
    run = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert line in run.stdout and "_GRADSCOPE_COMPLETE" in run.stdout
    if shutil.which(shell):
        check = [shell, "-n" if shell == "zsh" else "--no-execute", "/dev/stdin"]
        subprocess.run(check, input=run.stdout, text=True, check=True)


def test_completing_imports_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys\n"
        "from gradscope.cli.main import group\n"
        "try:\n    group.main(prog_name='gradscope')\n"
        "except SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    asked = {"_GRADSCOPE_COMPLETE": "bash_complete", "COMP_WORDS": "gradscope trace --", "COMP_CWORD": "2"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0 and "plain,--wrt" in run.stdout
