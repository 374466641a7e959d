"""The baseline: what was there before does not count, whatever moves; what is new does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gradscope.baseline import SCHEMA, Baseline
from gradscope.cli.output import Reporting
from gradscope.errors import UsageError
from gradscope.findings import Finding, Source
from gradscope.gate import Gate
from gradscope.session import Session

NET = """\
import torch
from torch import nn


class {name}(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            return self.layer(x)
"""


def finding(number: int, **fields: object) -> Finding:
    known = {"rule": "GS104", "name": "no-grad-block", "severity": "error", "message": "m", "path": "a.py", "line": 3,
             "function": "Net.forward", "source": "with torch.no_grad():"}  # fmt: skip
    return Finding(id=f"F{number}", **{**known, **fields})  # type: ignore[arg-type]


def session(*findings: Finding, target: str = "src", **fields: object) -> Session:
    return Session("scan", "blocked", target={"name": target}, findings=list(findings), **fields)  # type: ignore[arg-type]


def states(known: Baseline, now: Session) -> list[str]:
    return [each.state for each in known.compared(now).findings]


def known(*findings: Finding, target: str = "src") -> Baseline:
    return Baseline(Path("baseline.json")).updated(session(*findings, target=target))


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({}, "unchanged"),
        ({"line": 99}, "unchanged"),
        ({"path": "renamed/b.py"}, "unchanged"),
        ({"source": "with  torch.no_grad( ):"}, "unchanged"),
        ({"source": "with torch.no_grad():  # noqa: X1 'why'"}, "unchanged"),
        ({"severity": "note", "message": "another"}, "unchanged"),
        ({"function": "Other.forward"}, "new"),
        ({"source": "with torch.no_grad(), lock:"}, "new"),
        ({"rule": "GS103"}, "new"),
    ],
)
def test_a_finding_is_known_again_by_what_it_is_and_not_by_where(change: dict[str, object], state: str) -> None:
    assert states(known(finding(1)), session(finding(1, **change))) == [state]


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ('x = f(y, "a # b").detach()  # c', 'x=f( y,"a # b" ).detach()'),
        ("return x if y else -z", "return x if y else - z"),
        (r"x = '\\' + y.item()  # '", r"x = '\\' + y.item()"),
    ],
)
def test_comments_and_idle_blanks_are_no_part_of_a_line(line: str, same: str) -> None:
    assert finding(1, source=line).fingerprint == finding(1, source=same).fingerprint


def test_a_string_and_a_blank_between_words_are_part_of_a_line() -> None:
    lines = ['f("a # b").detach()', 'f("a # c").detach()', "not x.item()", "notx.item()"]
    assert len({finding(1, source=line).fingerprint for line in lines}) == 4


def test_a_comment_leaves_the_file_as_it_is() -> None:
    line = known(finding(1))
    assert line.updated(session(finding(1, source="with torch.no_grad():  # why"))).lines == line.lines


def test_as_many_are_known_as_there_were() -> None:
    twice = known(finding(1), finding(2, line=9))
    assert [line.count for line in twice.lines] == [2]
    assert states(twice, session(finding(1), finding(2, line=9), finding(3, line=12))) == ["unchanged"] * 2 + ["new"]


def test_of_two_that_look_alike_the_one_in_the_other_file_is_new() -> None:
    copied = session(finding(1, path="0_copy.py"), finding(2))
    assert states(known(finding(1)), copied) == ["new", "unchanged"]


def test_fixed_are_those_that_this_target_had() -> None:
    both = known(finding(1), finding(2, function="Other.forward"))
    assert both.compared(session(finding(1))).baseline.fixed == 1  # type: ignore[union-attr]
    assert both.compared(session(target="src/a.py")).baseline.fixed == 0  # type: ignore[union-attr]


def test_what_options_leave_out_is_not_fixed() -> None:
    gate = Gate(ignore=frozenset({"GS104"}), baseline=known(finding(1)))
    judged = gate.judged(session(finding(1)))
    assert judged.findings == [] and judged.to_dict()["baseline"]["fixed"] == 0


@pytest.mark.parametrize("ignored", [{"GS104"}, {"GS104", "GS201"}])
def test_what_options_leave_out_stays_known_and_is_not_added(ignored: set[str], tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    Baseline(path).updated(session(finding(1))).save()
    now = session(finding(1), finding(2, rule="GS201", line=9), finding(3, rule="GS301", line=12))
    gate = Gate(ignore=frozenset(ignored), baseline=Baseline.load(path), update=True)
    Reporting(quiet=True, fmt="json").finish(now, gate)
    assert {line.rule for line in Baseline.load(path).lines} == {"GS104", "GS201", "GS301"} - (ignored - {"GS104"})


def test_a_file_that_could_not_be_read_keeps_its_lines() -> None:
    old = known(finding(1), finding(2, path="b.py", function="B.forward"))
    unread = session(stats={"skipped": [{"path": "b.py", "reason": "is no Python"}]})
    assert old.compared(unread).baseline.fixed == 1  # type: ignore[union-attr]
    assert [line.path for line in old.updated(unread).lines] == ["b.py"]


def test_targets_share_a_file_and_renew_only_their_own_lines() -> None:
    shared = known(finding(1)).updated(session(finding(1, function="T.forward"), target="other"))
    assert [line.target for line in shared.lines] == ["scan src", "scan other"]
    assert [line.target for line in shared.updated(session(target="other")).lines] == ["scan src"]
    # The same place seen by two targets is one problem, not two.
    twice = known(finding(1)).updated(session(finding(1), target="other"))
    assert states(twice, session(finding(1), finding(2))) == ["unchanged", "new"]


def test_the_file_has_a_sorted_line_for_each_finding_and_none_has_a_line_number(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    findings = [finding(1, path="é.py"), finding(2), finding(3, function="A.forward"), finding(4, line=8)]
    Baseline(path).updated(session(*findings)).save()
    text = path.read_text(encoding="utf-8")
    lines = [json.loads(line.rstrip(",")) for line in text.splitlines() if line.startswith('{"path')]
    assert [(line["path"], line["function"], line["count"]) for line in lines] == [
        ("a.py", "A.forward", 1), ("a.py", "Net.forward", 2), ("é.py", "Net.forward", 1),
    ]  # fmt: skip
    assert json.loads(text) == {"schema": SCHEMA, "findings": lines}
    assert '"line"' not in text and list(tmp_path.iterdir()) == [path]
    assert Baseline.load(path).lines == Baseline(path).updated(session(*reversed(findings))).lines


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it is not JSON"),
        ('{"schema": "gradscope.baseline/1", "findings": [', "it is not JSON"),
        ("<<<<<<< HEAD\n{}", "it is not JSON"),
        ("[]", "its schema is None"),
        ('{"schema": "gradscope.session/1"}', "its schema is 'gradscope.session/1'"),
        ('{"schema": "gradscope.baseline/2", "findings": []}', "its schema is 'gradscope.baseline/2'"),
        ('{"schema": "gradscope.baseline/1"}', "is damaged: 'findings'"),
        ('{"schema": "gradscope.baseline/1", "findings": 3}', "is damaged"),
        ('{"schema": "gradscope.baseline/1", "findings": [{"rule": "GS101"}]}', "is damaged"),
        ('{"schema": "gradscope.baseline/1", "findings": ["GS101"]}', "is damaged"),
    ],
)
@pytest.mark.parametrize("update", [False, True])
def test_a_file_that_is_no_baseline_is_refused_and_left_alone(
    content: str, said: str, update: bool, tmp_path: Path
) -> None:
    path = tmp_path / "b.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=said) as caught:
        Gate.of(baseline=path, update=update)
    assert "\n" not in caught.value.message and caught.value.hint
    assert path.read_text() == content


@pytest.mark.parametrize(("count", "said"), [("0", "count is 0"), ('"1"', "count is '1'"), ("true", "count is True")])
def test_a_count_that_is_none_is_damage(count: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    Baseline(path).updated(session(finding(1))).save()
    path.write_text(path.read_text().replace('"count": 1', f'"count": {count}'))
    with pytest.raises(UsageError, match=said):
        Baseline.load(path)


def test_a_session_beside_a_baseline_is_read_back(tmp_path: Path) -> None:
    judged = Gate(baseline=known(finding(1))).judged(session(finding(1), finding(2)))
    judged.save(tmp_path / "s.json")
    again = Session.load(tmp_path / "s.json")
    assert again.to_dict() == judged.to_dict()
    assert again.to_dict()["baseline"] == {"path": "baseline.json", "new": 1, "unchanged": 1, "fixed": 0}


def test_a_run_that_could_not_be_followed_writes_no_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its sources look unused because the way to them is unseen: nothing is known to be gone."""
    path = tmp_path / "b.json"
    about = {"name": "m", "entry": "f", "inputs": [], "mode": "real", "device": "cpu", "dtype": "float32"}
    seen = Session("trace", "blocked", target=about, findings=[finding(1)])
    Baseline(path).updated(seen).save()
    kept = path.read_bytes()
    sources = {"w": Source("w", "parameter", "unused")}
    doubtful = Session("trace", "flows", target=about, sources=sources, unseen=["a result with no known origin"])
    code = Reporting(color="never").finish(doubtful, Gate.of(baseline=path, update=True))
    out, err = capsys.readouterr()
    assert code == 3 and path.read_bytes() == kept
    assert err == f"{path} was not written: too much of the run could not be seen.\n"
    assert "the gate passes" not in out


# --- as a command ------------------------------------------------------------------------------------


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "gradscope", *arguments]
    return subprocess.run(run, capture_output=True, text=True, cwd=folder, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "net.py").write_text(NET.format(name="Net"))
    return tmp_path


SCAN = ("scan", "src", "--no-cache", "--baseline", "b.json")


def test_only_what_is_new_fails(folder: Path) -> None:
    assert command(folder, *SCAN).returncode == 2
    written = command(folder, *SCAN, "--update-baseline")
    assert (written.returncode, written.stderr) == (0, "wrote b.json: 1 added, 0 removed\n")
    kept = (folder / "b.json").read_bytes()
    (folder / "src" / "net.py").rename(folder / "src" / "moved.py")
    (folder / "src" / "moved.py").write_text("# a line above\n" + NET.format(name="Net"))
    passing = command(folder, *SCAN)
    assert passing.returncode == 0
    assert "1 error" in passing.stdout.splitlines()[0]  # it is as blocked as it was
    assert "beside b.json: 0 new, 1 unchanged, 0 fixed; nothing new, so the gate passes" in passing.stdout
    assert "1 unchanged finding is not shown: -v." in passing.stdout and "moved.py:12" not in passing.stdout
    assert "moved.py:12" in command(folder, *SCAN, "-v").stdout

    (folder / "src" / "more.py").write_text(NET.format(name="More"))
    failing = command(folder, *SCAN)
    assert failing.returncode == 1
    assert "beside b.json: 1 new, 1 unchanged, 0 fixed\n" in failing.stdout
    assert "GS104 no-grad-block  new" in failing.stdout and "more.py:11" in failing.stdout
    assert "moved.py" not in failing.stdout
    (folder / "src" / "moved.py").write_text("")
    assert "1 new, 0 unchanged, 1 fixed" in command(folder, *SCAN).stdout
    assert (folder / "b.json").read_bytes() == kept
    assert "1 added, 1 removed" in command(folder, *SCAN, "--update-baseline").stderr


def test_a_baseline_is_not_written_for_what_could_not_be_analysed(folder: Path) -> None:
    (folder / "src" / "net.py").write_text("import torch\ntorch.no_grad(\n")
    run = command(folder, *SCAN, "--update-baseline")
    assert run.returncode == 3 and not (folder / "b.json").exists()


def test_an_update_without_a_file_is_one_sentence(folder: Path) -> None:
    run = command(folder, "scan", "src", "--no-cache", "--update-baseline")
    assert (run.returncode, run.stdout) == (2, "")
    assert "--update-baseline needs a file to write." in run.stderr


def test_source_text_stays_out_of_the_baseline_where_it_is_not_wanted(folder: Path) -> None:
    command(folder, *SCAN, "--update-baseline", "--no-source")
    assert "torch.no_grad" not in (folder / "b.json").read_text()
    assert command(folder, *SCAN).returncode == 0


def test_a_trace_is_held_beside_the_file_that_a_scan_wrote(
    folder: Path, gradscope: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "src" / "build.py").write_text(
        "import torch\nfrom net import Net\n\n\ndef build():\n    return Net(), torch.ones(2, 4)\n"
    )
    monkeypatch.chdir(folder)
    gradscope(*SCAN, "--update-baseline")
    code, out, _ = gradscope("trace", "src/build.py:build", "--baseline", "b.json", "-o", "s.json")
    assert code == 0
    assert out.startswith("✗ blocked")
    assert "beside b.json: 0 new, 1 unchanged, 0 fixed; nothing new, so the gate passes" in out
    assert "src/net.py:11" in out.partition("Forward pass")[2]
    assert json.loads((folder / "s.json").read_text())["findings"][0]["state"] == "unchanged"
