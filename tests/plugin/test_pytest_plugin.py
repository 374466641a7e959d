"""The pytest plugin in pytest's own test bench: what passes, what a failure reads like, what the reports hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gradscope
from gradscope.session import Session

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent.parent
MODEL = """
import unittest

import pytest
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        with torch.no_grad():
            features = self.encoder(x).detach()
        return self.head(features)


X = torch.ones(2, 4)
"""


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """Load all of torch that a trace needs: the test bench forgets what its runs import, and torch loads only once."""
    gradscope.trace(nn.Linear(1, 1), torch.ones(1, 1), mode="structural")
    gradscope.trace(nn.Linear(1, 1), torch.ones(1, 1), mode="real")


@pytest.fixture
def bench(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Run pytest with this plugin alone, whether it is installed or not, with every warning an error."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeini(
        "[pytest]\naddopts = -p gradscope.pytest_plugin --strict-markers -rA\nfilterwarnings =\n    error\n"
        # Where the plugin is installed, the pytest that runs this test has imported it.
        "    ignore:Module already imported:pytest.PytestAssertRewriteWarning\n"
    )
    return pytester


def run(bench: pytest.Pytester, tests: str, *args: str) -> pytest.RunResult:
    bench.makepyfile(test_model=MODEL + tests)
    return bench.runpytest_inprocess(*args)


MARKED = """
@pytest.mark.grad_flow
def test_marked():
    model = Model()
    return model, X
"""

FAILURE = """\
    @pytest.mark.grad_flow
    def test_marked():
        model = Model()
>       return model, X
E       gradscope.GradientsDoNotFlow: the gradient does not arrive at encoder.bias, encoder.weight, input.0
E         test_model.py:15: GS104 no-grad-block, in Model.forward
E         > with torch.no_grad():
E         Model.forward runs under no_grad: autograd records nothing of what it computes.
E         behind it: test_model.py:16: GS201 detach
E         smallest fix: take away test_model.py:15 + test_model.py:16 (verified by running it)
E         Do not enter no_grad here when a gradient is wanted.

test_model.py:25: GradientsDoNotFlow
"""


def test_a_failure_of_the_marker_reads_like_an_assertion(bench: pytest.Pytester) -> None:
    result = run(bench, MARKED)
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    assert FAILURE in text
    assert "FAILED test_model.py::test_marked - gradscope.GradientsDoNotFlow: the gradi" in text
    assert "1 trace: the gradient arrives in 0, does not in 1" in text
    assert "blocked  test_model.py::test_marked  test_model.py:15: GS104 no-grad-block" in text


@pytest.mark.parametrize("call", ["assert_flows", "assert_gradients_flow"])
def test_a_failure_of_the_fixture_shows_the_test_and_nothing_of_gradscope(bench: pytest.Pytester, call: str) -> None:
    result = run(bench, f"\n\ndef test_it(gradscope):\n    gradscope.{call}(Model(), X)\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([
        "    def test_it(gradscope):",
        f">       gradscope.{call}(Model(), X)",
        "E       gradscope.GradientsDoNotFlow: the gradient does not arrive at encoder.bias, encoder.weight, input.0",
        "test_model.py:24: GradientsDoNotFlow",
    ])  # fmt: skip
    assert "pytest_plugin.py" not in result.stdout.str()


def test_what_is_asked_and_what_is_allowed_decides(bench: pytest.Pytester) -> None:
    result = run(bench, """
@pytest.mark.grad_flow(wrt="head")
def test_other_source():
    return Model(), X

@pytest.mark.grad_flow(allow="encoder.*")
def test_allowed():
    return Model(), (X,)

@pytest.mark.grad_flow(allow="encoder.*")
def test_an_input_that_requires_a_gradient_is_asked_about():
    return Model(), {"x": torch.ones(2, 4, requires_grad=True)}

@pytest.mark.grad_flow(allow="encoder")
class TestClass:
    def test_inherited(self):
        return Model(), X

    @pytest.mark.grad_flow(allow="head.*", mode="real")
    def test_overridden(self):
        return Model(), X

    def test_through_the_fixture(self, gradscope):
        session = gradscope.assert_flows(Model(), x=X)
        assert {finding.state for finding in session.findings} == {"expected"}

def test_traces_only(gradscope):
    assert gradscope.trace(Model(), X).verdict == "blocked"
    assert [session.verdict for session in gradscope.sessions] == ["blocked"]
""")  # fmt: skip
    result.assert_outcomes(passed=5, failed=2)
    result.stdout.fnmatch_lines([
        "FAILED *test_an_input_that_requires_a_gradient_is_asked_about*",
        "FAILED *TestClass::test_overridden*",
    ])  # fmt: skip


def test_it_works_in_unittest_classes(bench: pytest.Pytester) -> None:
    result = run(bench, """
class Case(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def _tracer(self, gradscope):
        self.gradscope = gradscope

    @pytest.mark.grad_flow(wrt="head")
    def test_sound(self):
        return Model(), X

    @pytest.mark.grad_flow
    def test_cut(self):
        return Model(), X

    def test_fixture(self):
        self.gradscope.assert_flows(Model(), X)
""")  # fmt: skip
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines([
        ">       return Model(), X",
        ">       self.gradscope.assert_flows(Model(), X)",
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        ("@pytest.mark.grad_flow\ndef test_it():\n    pass\n", "*returns the model and its inputs*not NoneType*"),
        ("@pytest.mark.grad_flow(wtr=1)\ndef test_it():\n    pass\n", "*grad_flow takes wrt, allow,*not 'wtr'*"),
        ("@pytest.mark.grad_flow('x')\ndef test_it():\n    pass\n", "*grad_flow takes wrt, allow,*by name*"),
        ("@pytest.mark.grad_flow(wrt='no')\ndef test_it():\n    return Model(), X\n", "*No source matches wrt 'no'*"),
        ("@pytest.mark.grad_flow\ndef test_it():\n    return Model(), X[:, :3]\n", "*Model could not be run with 2x3*"),
        ("@pytest.mark.grad_flow\ndef test_it():\n    assert X is None\n", ">       assert X is None"),
    ],
)
def test_what_goes_wrong_is_said_at_the_test(bench: pytest.Pytester, tests: str, words: str) -> None:
    result = run(bench, f"\n\n{tests}")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([words])
    assert "pytest_plugin.py" not in result.stdout.str()
    assert "pluggy" not in result.stdout.str().partition("FAILURES")[2]


SUITE = (
    MARKED
    + """
@pytest.mark.grad_flow(wrt="head")
def test_sound():
    return Model(), X

def test_unrelated():
    pass
"""
)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_one_report_holds_every_trace_of_the_run(bench: pytest.Pytester, workers: str) -> None:
    pytest.importorskip("xdist")
    result = run(bench, SUITE, "-p", "xdist.plugin", "-n", workers, "--gradscope-report", "sub/run.json",
                 "--gradscope-report", "run.txt", "--gradscope-report", "run.dot")  # fmt: skip
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["2 traces: the gradient arrives in 1, does not in 1", "wrote sub?run.json"])
    session = Session.load(bench.path / "sub" / "run.json")
    assert session.verdict == "blocked"
    traces = {each["name"]: each["verdict"] for each in session.stats["traces"]}
    assert traces == {"test_marked": "blocked", "test_sound": "flows"}
    assert session.sources["test_marked: encoder.weight"].status == "blocked"
    assert session.sources["test_sound: head.weight"].status == "flows"
    assert {node.label for node in session.graph.nodes if node.parent is None} == set(traces)
    assert "GS104 no-grad-block" in (bench.path / "run.txt").read_text(encoding="utf-8")
    assert "digraph" in (bench.path / "run.dot").read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_is_refused_first_or_fails_the_run(bench: pytest.Pytester) -> None:
    sound = '\n\n@pytest.mark.grad_flow(wrt="head")\ndef test_sound():\n    return Model(), X\n'
    result = run(bench, sound, "--gradscope-report", "run.bmp")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*run.bmp: the suffix names no format; use one of*.json*"])
    (bench.path / "run.txt").mkdir()
    result = run(bench, sound, "--gradscope-report", "run.txt")
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["could not write run.txt: *"])


def test_without_traces_there_is_no_section_and_without_the_plugin_no_fixture(bench: pytest.Pytester) -> None:
    result = run(bench, "\n\ndef test_unrelated():\n    pass\n")
    result.assert_outcomes(passed=1)
    assert "gradscope" not in result.stdout.str().partition("collected")[2]
    bench.makeini("[pytest]")
    result = run(bench, "\n\ndef test_it(gradscope):\n    pass\n", "-p", "no:gradscope")
    result.assert_outcomes(errors=1)


def test_it_works_in_importlib_mode(bench: pytest.Pytester) -> None:
    run(bench, SUITE, "--import-mode=importlib").assert_outcomes(passed=2, failed=1)


def test_a_real_model_with_a_cut_put_in(bench: pytest.Pytester) -> None:
    pytest.importorskip("torchvision")
    bench.makepyfile("""
import pytest
import torch
from torchvision.models import squeezenet1_1


@pytest.fixture
def model():
    return squeezenet1_1(weights=None)


@pytest.mark.grad_flow
def test_as_it_is(model):
    return model, torch.ones(1, 3, 64, 64)


@pytest.mark.grad_flow(wrt="features.*")
def test_with_a_cut(model):
    forward = model.classifier.forward
    model.classifier.forward = lambda x: forward(x.data)
    return model, torch.ones(1, 3, 64, 64)
""")
    result = bench.runpytest_inprocess()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines([
        "E       gradscope.GradientsDoNotFlow: the gradient does not arrive at features.0.bias, * and 47 more",
        "E         test_a_real_model_with_a_cut_put_in.py:19: GS202 tensor-data*",
        "E         > model.classifier.forward = lambda x: forward(x.data)",
        "E         smallest fix: take away *.py:19 (verified by running it)",
    ])  # fmt: skip


HEAVY = ("torch", "rich", "click", "numpy", "gradscope.session", "gradscope.report")


def test_loading_it_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys, pytest\n"
        "code = pytest.main(['-p', 'gradscope.pytest_plugin', '--collect-only', '-q', sys.argv[1]])\n"
        "assert code == pytest.ExitCode.NO_TESTS_COLLECTED, code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], 'gradscope.pytest_plugin' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[] True", done.stdout


def test_the_sessions_of_a_run_are_json(bench: pytest.Pytester) -> None:
    run(bench, MARKED, "--gradscope-report", "one.json")
    data = json.loads((bench.path / "one.json").read_text(encoding="utf-8"))
    assert (data["schema"], data["target"]["name"]) == ("gradscope.session/1", "Model")
    assert data["stats"]["traces"] == [
        {"name": "test_marked", "target": "Model", "verdict": "blocked", "findings": ["F1", "F2"]}
    ]
