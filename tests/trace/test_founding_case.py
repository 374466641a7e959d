"""The founding case on the real package, judged by the package's source and by real autograd."""

from __future__ import annotations

import ast
import inspect
import io
import sys
from pathlib import Path

import pytest
import torch
from deepseek_ocr_encoder import DeepSeekOCREncoder, encoder
from rich.console import Console

from gradscope.report import terminal
from gradscope.session import Session
from gradscope.targets.deepseek_ocr import preset
from gradscope.targets.request import Request
from gradscope.tracing.tracer import trace_subject
from gradscope.tracing.workshops import open_workshop

TAKES_TENSORS = "skip_default_preprocessing" in inspect.signature(DeepSeekOCREncoder).parameters


def trace(**options: object) -> Session:
    mode = str(options.pop("mode", "structural"))
    device = str(options.pop("device", "auto"))
    return trace_subject(preset(Request(**options)), open_workshop(mode, device, None))  # type: ignore[arg-type]


def decorator_lines() -> dict[str, int]:
    """Read the lines of the inference_mode decorators from the installed source itself."""
    lines = {}
    for node in ast.walk(ast.parse(Path(inspect.getfile(encoder)).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if "inference_mode" in ast.unparse(decorator):
                    lines[node.name] = decorator.lineno
    return lines


@pytest.fixture(scope="module")
def default() -> Session:
    return trace()


def test_both_decorators_are_named_at_their_lines_outermost_first(default: Session) -> None:
    errors = [finding for finding in default.findings if finding.severity == "error"]
    lines = decorator_lines()
    assert [(f.rule, f.line, f.behind) for f in errors] == [
        ("GS101", lines["encode"], None),
        ("GS101", lines["_forward_core"], errors[0].id),
    ]
    assert all(f.path == "deepseek_ocr_encoder/encoder.py" for f in errors)


def test_every_tower_parameter_is_blocked_and_called_frozen(default: Session) -> None:
    assert default.verdict == "blocked"
    assert len(default.sources) > 500
    assert {(s.status, s.frozen) for s in default.sources.values()} == {("blocked", True)}


def test_the_fix_is_both_decorators_and_was_verified(default: Session) -> None:
    assert default.fix_set == ["F1", "F2"]
    assert default.fix_verified
    assert all(default.finding(name).verified for name in default.fix_set)


def test_the_detached_position_table_is_a_note(default: Session) -> None:
    notes = [f for f in default.findings if f.severity == "note"]
    assert [f.rule for f in notes] == ["GS201"]
    assert "position_embedding.weight.detach()" in notes[0].source


def test_a_tensor_input_is_blocked_too() -> None:
    session = trace(inputs=("1x3x512x512",))
    assert session.sources["input.0"].status == "blocked"
    assert session.target["entry"] == ("encode" if TAKES_TENSORS else "_forward_core")
    assert session.fix_verified


def test_a_trainable_head_crashes_and_the_decorator_is_blamed() -> None:
    session = trace(head=True)
    assert session.verdict == "crashes"
    assert "Inference tensors cannot be saved" in session.crash["message"]  # type: ignore[index]
    assert session.crash["module"] == "head"  # type: ignore[index]
    assert session.findings[0].line == decorator_lines()["encode"]
    assert session.fix_verified
    steps = [node.label for node in session.graph.nodes if node.kind != "operation"]
    assert steps[0] == "image 1024x1024"
    assert {"sam", "clip_pre", "clip_tr"} < set(steps)
    assert steps[-1] == "head  raises RuntimeError"
    (last,) = [edge for edge in session.graph.edges if edge.target == "crash"]
    assert last.status == "blocked"


def test_the_fixer_heals_it() -> None:
    session = trace(fixed=True, inputs=("1x3x320x448",))
    assert session.verdict == "flows"
    assert {s.status for s in session.sources.values()} == {"flows"}
    assert session.worst() != "error"


def test_the_trace_leaves_torch_as_it_was() -> None:
    from torch.autograd.grad_mode import inference_mode, no_grad, set_grad_enabled
    from torch.nn.modules import module

    def state() -> list[object]:
        switches = [no_grad.__enter__, no_grad.__exit__, inference_mode.__enter__, inference_mode.__exit__,
                    set_grad_enabled.__init__, set_grad_enabled.__enter__]  # fmt: skip
        hooks = [dict(module._global_forward_hooks), dict(module._global_forward_pre_hooks)]
        return [*switches, torch.autograd.Function.__dict__["apply"], *hooks,
                torch.is_grad_enabled(), torch.get_rng_state().tolist()]  # fmt: skip

    before = state()
    trace(inputs=("1x3x256x256",))
    assert state() == before


def test_a_failing_forward_also_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.autograd.grad_mode import inference_mode

    before = inference_mode.__enter__

    def interrupted(self: object, image: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DeepSeekOCREncoder, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trace()
    assert inference_mode.__enter__ is before
    assert torch.is_grad_enabled()


@pytest.mark.usefixtures("pretended_cuda")
def test_the_readme_shows_what_is_printed(default: Session) -> None:
    if TAKES_TENSORS:
        pytest.skip("the README shows the lines of deepseek-ocr-encoder 0.1.0")
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 does not tell the columns of a call: whole lines stand in the tree")
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("```text\n")[2].partition("```")[0].splitlines()
    console = Console(file=io.StringIO(), width=100, no_color=True)
    terminal.render(default, console)
    printed = iter(console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    assert len(shown) > 20
    assert [line for line in shown if line not in printed] == []  # each in its turn: shortened, and nothing else


def test_a_session_survives_saving(default: Session, tmp_path: Path) -> None:
    default.save(tmp_path / "s.json")
    assert Session.load(tmp_path / "s.json").to_dict() == default.to_dict()
