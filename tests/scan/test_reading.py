# ruff: noqa: E501 - sources under test stay on one line
"""Decoding by Python's rules, and the property that blanking changes nothing that is found."""

from __future__ import annotations

import ast
import codecs
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gradscope.scanning import reading
from gradscope.scanning.blanking import Blanked, blank
from gradscope.scanning.copies import Copies
from gradscope.scanning.facts import FileFacts
from gradscope.scanning.reading import Needles, decode
from gradscope.scanning.scanner import scan
from gradscope.scanning.walk import FileReader

SOURCE = "import torch\n\n@torch.no_grad()\ndef f(model, x):\n    return model(x)\n"


@pytest.mark.parametrize(
    ("data", "skipped"),
    [
        (SOURCE.encode(), ""),
        (b"\xef\xbb\xbf" + SOURCE.encode(), ""),
        (b"# -*- coding: latin-1 -*-\n# \xe9\n" + SOURCE.encode(), ""),
        (SOURCE.replace("\n", "\r\n").encode(), ""),
        (SOURCE.replace("\n", "\r").encode(), ""),
        (b"\f" + SOURCE.replace("\n", "\n\f", 1).encode(), ""),
        (b"# \xe9\n" + SOURCE.encode(), "cannot be decoded"),
        (b"# coding: no-such-codec\n", "cannot be decoded"),
        (SOURCE.encode() + b"\0", "NUL"),
        (b"x" * (reading.LARGEST_FILE + 1), "larger"),
    ],
)
def test_decoding(data: bytes, skipped: str) -> None:
    text = decode(data)
    assert skipped in text.skipped and bool(skipped) == bool(text.skipped)
    if not skipped:
        assert ast.dump(ast.parse(text.source)) == ast.dump(ast.parse(data))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import torch\ntorch.no_grad(\n", "is not valid Python"),
        ("with torch.no_grad() as :\n", "is not valid Python"),
        ("print 'torch.no_grad()'\n", "is not valid Python"),
        ("torch.no_grad()" + "(" * 3000 + ")" * 3000, ""),
        ("torch.no_grad() + " + "-" * 60_000 + "1\n", ""),
    ],
)
def test_a_file_that_cannot_be_parsed_is_named_and_nothing_crashes(tmp_path: Path, source: str, reason: str) -> None:
    (tmp_path / "bad.py").write_text(source)
    (tmp_path / "good.py").write_text(SOURCE)
    session = scan(str(tmp_path), cache=False)
    assert [Path(each["path"]).name for each in session.stats["skipped"]] == ["bad.py"]
    assert reason in session.unseen[0]
    assert [each.function for each in session.findings] == ["f"]


PIECES = st.sampled_from(
    [
        "import torch\n", "from torch import no_grad as quiet\n", "X = 1\n", "class A:\n    def f(self):\n        pass\n",
        "@torch.no_grad()\ndef g(x):\n    return x\n", "def h(x):\n    with torch.no_grad():\n        return x\n",
        'TEXT = """\ndef not_code():\n    torch.no_grad()\n"""\n', "if X:\n    import os\nelse:\n    X = 2\n",
        "try:\n    import a\nexcept ImportError:\n    a = None\n", "torch.set_grad_enabled(False)\n",
        "# a comment: torch.no_grad()\n", "class B(torch.nn.Module):\n    def forward(self, x):\n        return x.detach()\n",
        "Y = [\n    1,\n]\n", "@decorated\n\n# between\ndef k():\n    return torch.tensor(X)\n", "\n", "    \n", "'''\n", "x = (\n",
        "match X:\n    case 1:\n        pass\n", "async def m():\n    async with torch.no_grad():\n        pass\n", "\\\n",
        "class C:\n    def n(self, x):\n        return x.detach()\n    ", "    # torch",
        "def p():\n    from torch import no_grad\n    return no_grad\n", "# >>> from torch import no_grad as quiet\n",
        "@quiet()\nclass D:\n    import torch as th\n", "def q(x):\n    with quiet():\n        return x\n",
    ]
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(PIECES, max_size=12).map("".join))
@example("class C:\n    def n(self, x):\n        return x.detach()\n    \\\n\\\ntorch.set_grad_enabled(False)\n")
def test_blanking_finds_what_the_whole_file_shows(source: str) -> None:
    copies = Copies()

    def facts(text: str) -> FileFacts:
        return FileReader(FileFacts("p.py", "p"), False, frozenset({"p"}), {}, copies).read(text, Needles())

    try:
        ast.parse(source)
    except SyntaxError:
        found = facts(source)
        assert found.skipped or found.parsed
        return
    blanked = facts(source)
    copied = facts(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "blank", lambda text, offsets, deep, known: Blanked(text))
        whole = facts(source)
    assert (blanked.sites, blanked.functions) == (whole.sites, whole.functions)
    assert (copied.sites, copied.functions) == (whole.sites, whole.functions)
    methods = [{name: set(each.methods) for name, each in facts.classes.items()} for facts in (blanked, whole)]
    assert methods[0] == methods[1]
    assert blank(source, [], []).source.count("\n") == source.count("\n")


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("(x > 0.5).float()", True),
        ("(x\n        != y).float()", True),
        ("(x >\n        f(y)).float()", True),
        ("(x > f(y)\n    ).float()", True),
        ("(x is not y).float()", True),
        ("self.layer(x).float()", False),
        ("rotate(\n        x[(0, 1)]).float()", True),
        ("(x + y).float()", False),
        ("x + float(y)", True),
        ('x + float("inf")', False),
        ("torch.library.custom_op(x)", True),
        ("x.checkpoint(y)", True),
        ("my_checkpoint(y)", False),
        ("torch.tensor(0.5)", False),
        ("torch.tensor([[1, -2.5e-3],\n        [True, 0]], dtype=torch.float32)", False),
        ('x * torch.tensor(float("-inf"), device=x.device)', False),
        ("torch.tensor(e)", True),
        ("torch.tensor([0, y])", True),
        ("torch.tensor(0.5 * y)", True),
    ],
)
def test_only_what_may_stop_a_gradient_is_a_hit(expression: str, expected: bool) -> None:
    source = f"def f(self, x, y):\n    return {expression}\n"
    assert bool(reading.tensor_ops(source, reading.parameters_made(source))) == expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (SOURCE.encode("utf-16"), "NUL"),
        (b"# coding: rot13\n" + codecs.encode(SOURCE, "rot13").encode(), "cannot be decoded"),
    ],
)
def test_a_file_whose_bytes_hide_its_text_is_not_clean(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "odd.py").write_bytes(data)
    (tmp_path / "plain.py").write_text("import torch\n")
    assert reason in scan(str(tmp_path), cache=False).unseen[0]


def test_a_file_in_utf_7_is_read(tmp_path: Path) -> None:
    hidden = SOURCE.replace("no_grad", "no+AF8-grad")
    (tmp_path / "odd.py").write_text("# coding: utf-7\n" + hidden)
    assert [each.function for each in scan(str(tmp_path), cache=False).findings] == ["f"]
