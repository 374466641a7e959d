"""Terminal reports letter by letter: a trace and a scan, narrow and wide, with colours and without."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from gradscope.findings import Finding, Source
from gradscope.flow import FlowGraph, FlowNode
from gradscope.report.formats import show
from gradscope.session import Session

CUT = Finding(
    "F1", "GS104", "no-grad-block", "error",
    "Student.forward runs under no_grad: autograd records nothing of what it computes.",
    "models/distillation/student_with_teacher.py", 12, cuts=tuple(f"{name}.weight" for name in "abcdefg") + ("a.bias",),
    source="with torch.no_grad():  # the teacher is not trained, so there is no need to keep its activations around",
    fix="Do not enter no_grad here when a gradient is wanted.", verified=True, function="Student.forward",
)  # fmt: skip
BEHIND = Finding(
    "F2", "GS201", "detach", "error",
    "detach in Student.forward gives out a tensor that autograd does not connect to its input.",
    "models/distillation/student_with_teacher.py", 20, cuts=("a.weight",), behind="F1", source="x = x.detach()",
    chain=("Student.forward", "Student._encode", "Student._normalise_features"),
)  # fmt: skip
NOTES = [
    Finding(f"F{number}", "GS201", "detach", "note", "A table is made once.", "models/tables.py", number,
            source="table = table.detach()")
    for number in range(3, 10)
]  # fmt: skip


def trace_session() -> Session:
    blocks = [FlowNode(f"l{i}", f"layer_{i}", "module", "blocked", "r", type="Block") for i in range(4)]
    nodes = [
        FlowNode("i", "input.0", "input", "flows", detail="2x3x224x224 float32"),
        FlowNode("r", "Student.forward", "region", "blocked", finding="F1", path=CUT.path, line=12),
        *blocks,
        FlowNode("o", "torch.cat([self.first(x), self.second(x), self.third(x), self.fourth(x)], dim=-1)", "operation",
                 "blocked", "r", detail="2x64 float32"),
        FlowNode("output.0", "output.0", "output", "flows", detail="2x64 float32"),
    ]  # fmt: skip
    sources = {name: Source(name, "parameter", "blocked") for name in CUT.cuts}
    return Session(
        kind="trace", verdict="blocked", sources=sources, findings=[CUT, BEHIND, *NOTES], fix_set=["F1", "F2"],
        target={"name": "train.py:build", "entry": "forward", "mode": "structural", "device": "cpu", "dtype": "float32",
                "inputs": ["2x3x224x224 float32"]},
        fix_verified=True, graph=FlowGraph(nodes, []), stats={"runs": 3, "seconds": 0.4},
        remarks=["Structural mode could not follow this model (it needs computed numbers at model.py:7), so it was "
                 "computed."],
        unseen=["2 tensors came from where no torch function looks."],
    )  # fmt: skip


def scan_session() -> Session:
    site = {"mechanism": "torch.no_grad", "line": 12}
    chain = [
        {"function": "Student.forward", "path": CUT.path, "sites": [site, {**site, "line": 14}]},
        {"function": "Student._encode_features_of_all_pages", "path": CUT.path, "sites": [{**site, "line": 20}]},
    ]
    entry = {"class": "Student", "module": "models.distillation.student_with_teacher", "clean": ["encoder", "head"],
             "findings": ["F1"]}  # fmt: skip
    return Session(
        kind="scan", verdict="blocked", findings=[CUT, *NOTES], target={"name": "models"},
        entries=[
            {**entry, "function": "Student.forward", "status": "blocked", "chain": chain},
            {**entry, "function": "Student.score", "status": "clean", "chain": []},
        ],
        stats={"files": 3, "seconds": 0.01}, unseen=["models/broken.py:3 is no Python: invalid syntax"],
    )  # fmt: skip


EXPECTED: dict[tuple[str, int], str] = {}

EXPECTED["trace", 80] = """\
✗ blocked  the gradient does not arrive
  train.py:build.forward(2x3x224x224 float32)
  structural on cpu, float32, 3 runs in 0.4 s
  8 parameters: 8 blocked

F1 error GS104 no-grad-block
   models/distillation/student_with_teacher.py:12
   > with torch.no_grad():  # the teacher is not trained, so there is no need t…
   Student.forward runs under no_grad: autograd records nothing of what it
   computes.
   cuts off 8 sources: a.* 2, b.weight, c.weight, d.weight and 3 more groups
   Do not enter no_grad here when a gradient is wanted.

F2 error GS201 detach  behind F1
   models/distillation/student_with_teacher.py:20
   > x = x.detach()
   detach in Student.forward gives out a tensor that autograd does not connect
   to its input.
   cuts off a.weight
   reached by Student.forward → Student._encode → Student._normalise_features

F3 note GS201 detach
   models/tables.py:3
   > table = table.detach()
   A table is made once.

F4 note GS201 detach
   models/tables.py:4
   > table = table.detach()
   A table is made once.

F5 note GS201 detach
   models/tables.py:5
   > table = table.detach()
   A table is made once.

F6 note GS201 detach
   models/tables.py:6
   > table = table.detach()
   A table is made once.

F7 note GS201 detach
   models/tables.py:7
   > table = table.detach()
   A table is made once.

and 2 more notes: -v shows all

Forward pass
├── → input.0  2x3x224x224 float32
├── ✂ Student.forward  GS104  models/distillation/student_with_teacher.py:12
│   ├── ✗ layer_0-3  x4  Block
│   └── ✗ torch.cat([self.first(x), self.second(x), self.third(x), self.fourth(…
└── → output.0  2x64 float32

Smallest fix: F1 + F2, verified by running it ✓

What was assumed
  - Structural mode could not follow this model (it needs computed numbers at
    model.py:7), so it was computed.

What could not be seen
  - 2 tensors came from where no torch function looks.
"""

EXPECTED["trace", 200] = """\
✗ blocked  the gradient does not arrive
  train.py:build.forward(2x3x224x224 float32)   structural on cpu, float32, 3 runs in 0.4 s
  8 parameters: 8 blocked

F1 error GS104 no-grad-block
   models/distillation/student_with_teacher.py:12
   > with torch.no_grad():  # the teacher is not trained, so there is no need to keep its activations around
   Student.forward runs under no_grad: autograd records nothing of what it computes.
   cuts off 8 sources: a.* 2, b.weight, c.weight, d.weight and 3 more groups
   Do not enter no_grad here when a gradient is wanted.

F2 error GS201 detach  behind F1
   models/distillation/student_with_teacher.py:20
   > x = x.detach()
   detach in Student.forward gives out a tensor that autograd does not connect to its input.
   cuts off a.weight
   reached by Student.forward → Student._encode → Student._normalise_features

F3 note GS201 detach
   models/tables.py:3
   > table = table.detach()
   A table is made once.

F4 note GS201 detach
   models/tables.py:4
   > table = table.detach()
   A table is made once.

F5 note GS201 detach
   models/tables.py:5
   > table = table.detach()
   A table is made once.

F6 note GS201 detach
   models/tables.py:6
   > table = table.detach()
   A table is made once.

F7 note GS201 detach
   models/tables.py:7
   > table = table.detach()
   A table is made once.

and 2 more notes: -v shows all

Forward pass
├── → input.0  2x3x224x224 float32
├── ✂ Student.forward  GS104  models/distillation/student_with_teacher.py:12
│   ├── ✗ layer_0-3  x4  Block
│   └── ✗ torch.cat([self.first(x), self.second(x), self.third(x), self.fourth(x)], dim=-1)  2x64 float32
└── → output.0  2x64 float32

Smallest fix: F1 + F2, verified by running it ✓

What was assumed
  - Structural mode could not follow this model (it needs computed numbers at model.py:7), so it was
    computed.

What could not be seen
  - 2 tensors came from where no torch function looks.
"""

EXPECTED["scan", 80] = """\
✗ 1 error, 0 warnings, 7 notes; 1 file could not be read
  gradients are stopped where training would need them
  models: 3 files in 0.01 s, nothing imported or run

Student models.distillation.student_with_teacher
  ✗ forward [no_grad, lines 12, 14]  blocked
      → _encode_features_of_all_pages [no_grad, line 20]
  ✓ score  clean
  ✓ clean inside it, call these to keep the gradient: encoder, head

F1 error GS104 no-grad-block
   models/distillation/student_with_teacher.py:12
   > with torch.no_grad():  # the teacher is not trained, so there is no need t…
   Student.forward runs under no_grad: autograd records nothing of what it
   computes.
   cuts off 8 sources: a.* 2, b.weight, c.weight, d.weight and 3 more groups
   Do not enter no_grad here when a gradient is wanted.

and 7 notes on what stops a gradient on purpose or without harm: -v

What could not be read
  - models/broken.py:3 is no Python: invalid syntax
"""

EXPECTED["scan", 200] = """\
✗ 1 error, 0 warnings, 7 notes; 1 file could not be read  gradients are stopped where training would need them
  models: 3 files in 0.01 s, nothing imported or run

Student models.distillation.student_with_teacher
  ✗ forward [no_grad, lines 12, 14] → _encode_features_of_all_pages [no_grad, line 20]  blocked
  ✓ score  clean
  ✓ clean inside it, call these to keep the gradient: encoder, head

F1 error GS104 no-grad-block
   models/distillation/student_with_teacher.py:12
   > with torch.no_grad():  # the teacher is not trained, so there is no need to keep its activations around
   Student.forward runs under no_grad: autograd records nothing of what it computes.
   cuts off 8 sources: a.* 2, b.weight, c.weight, d.weight and 3 more groups
   Do not enter no_grad here when a gradient is wanted.

and 7 notes on what stops a gradient on purpose or without harm: -v

What could not be read
  - models/broken.py:3 is no Python: invalid syntax
"""


def shown(session: Session, width: int, *, colour: bool, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    show(session, Console(file=stream, width=width, color_system="standard" if colour else None, force_terminal=colour))
    stream.flush()
    return raw.getvalue().decode(encoding)


CASES = [(kind, width) for kind in ("trace", "scan") for width in (80, 200)]
SESSIONS = {"trace": trace_session, "scan": scan_session}


@pytest.mark.parametrize(("kind", "width"), CASES)
def test_a_report_is_letter_by_letter_what_was_looked_at(kind: str, width: int) -> None:
    assert shown(SESSIONS[kind](), width, colour=False) == EXPECTED[kind, width]


@pytest.mark.parametrize(("kind", "width"), CASES)
def test_colours_change_nothing_but_colours(kind: str, width: int) -> None:
    coloured = shown(SESSIONS[kind](), width, colour=True)
    assert Text.from_ansi(coloured).plain.splitlines() == EXPECTED[kind, width].splitlines()
    for line in ("\x1b[1;31merror GS104 no-grad-block\x1b[0m", f"\x1b[1m   {CUT.path}:12\x1b[0m"):
        assert line in coloured
    if kind == "scan":  # the name of a further call is neither grey as its arrow is nor red
        assert "\x1b[90m→ \x1b[0m_encode_features_of_all_pages\x1b[31m [no_grad, line 20]" in coloured
    assert coloured.startswith("\x1b[1;31m✗ blocked\x1b[0m" if kind == "trace" else "\x1b[1;31m✗ 1 error, ")


@pytest.mark.parametrize("kind", ["trace", "scan"])
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal_but_for_a_word_that_is(kind: str, width: int) -> None:
    for line in shown(SESSIONS[kind](), width, colour=False).splitlines():
        whole = any(word in line for word in (f"{CUT.path}:", "line 20", "lines 12, 14", "Student models"))
        assert len(line) <= min(width, 200) or whole, line


def test_lists_that_are_long_are_folded_and_full_unfolds_them() -> None:
    session = trace_session()
    out = io.StringIO()
    show(session, Console(file=out, width=80), full=True)
    assert "F9 note" in out.getvalue() and "more note" not in out.getvalue()
    assert "and 2 more notes: -v shows all" in shown(session, 80, colour=False)


def test_windows_code_pages_get_ascii() -> None:
    for kind in ("trace", "scan"):
        assert shown(SESSIONS[kind](), 80, colour=False, encoding="cp1252").isascii()
