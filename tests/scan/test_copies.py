"""A function that stands word for word in several files is read once, and only where it means the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradscope.scanning.copies import Reading
from gradscope.scanning.facts import Function, Site
from gradscope.scanning.scanner import scan

METHOD = """
    @torch.no_grad()
    def encode(self, x):
        y = self.layer(x)
        with torch.no_grad():
            z = helper(y.detach())
        return z
        # the end
"""
HEAD = "import torch\nfrom torch import nn\nfrom other import helper\n\n\nclass {name}(nn.Module):\n{kept}"


def _scanned(folder: Path, **files: str) -> tuple[dict[str, list[tuple[object, ...]]], int]:
    """Return the findings of every file, with their lines counted from its ``def``; and how many were copies."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    taken = 0
    at = Reading.at

    def counted(self: Reading, name: str, line: int) -> tuple[Function, list[Site]]:
        nonlocal taken
        taken += 1
        return at(self, name, line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reading, "at", counted)
        session = scan(str(folder), cache=False, jobs=1)
    found: dict[str, list[tuple[object, ...]]] = {name: [] for name in files}
    for each in session.findings:
        name = Path(each.path).stem
        first = files[name].split("    def encode")[0].count("\n")
        found[name].append((each.rule, each.severity, each.line - first, each.column, each.end_line - first, each.how))
    return found, taken


def test_a_copy_is_found_at_its_own_lines(tmp_path: Path) -> None:
    first, second = HEAD.format(name="A", kept="") + METHOD, HEAD.format(name="B", kept="    size = 1\n\n") + METHOD
    found, taken = _scanned(tmp_path, a=first, b=second)
    assert taken == 1
    assert found["a"] == found["b"] and len(found["a"]) == 3


@pytest.mark.parametrize(
    "second",
    [
        HEAD.replace("import torch\n", "import mine as torch\n").format(name="B", kept="") + METHOD,
        HEAD.replace("from other import helper", "from b import helper").format(name="B", kept="") + METHOD,
        HEAD.format(name="B", kept="    def layer(self, x):\n        return x.item()\n") + METHOD,
        HEAD.format(name="B", kept="    layer = 1\n") + METHOD,
        HEAD.format(name="B", kept="    helper = torch.no_grad\n") + METHOD,
        HEAD.format(name="B", kept="") + METHOD.replace("    @torch.no_grad()\n", ""),
    ],
)
def test_what_means_something_else_is_read_again(tmp_path: Path, second: str) -> None:
    (tmp_path / "both").mkdir()
    (tmp_path / "alone").mkdir()
    both, taken = _scanned(tmp_path / "both", a=HEAD.format(name="A", kept="") + METHOD, b=second)
    alone, _ = _scanned(tmp_path / "alone", b=second)
    assert taken == 0
    assert both["b"] == alone["b"]


def test_a_switch_kept_by_a_copied_method_is_known_to_the_next(tmp_path: Path) -> None:
    keeps = "    def prepare(self):\n        self.quiet = torch.no_grad()\n"
    uses = "    def encode(self, x):\n        with self.quiet:\n            return self.layer(x)\n"
    files = {name.lower(): HEAD.format(name=name, kept="") + keeps + uses for name in ("A", "B", "C")}
    found, _ = _scanned(tmp_path, **files)
    assert found["a"] == found["b"] == found["c"] and found["a"]
