"""Calls of other packages that lose a gradient are told at the call; torch itself is asked first.

``vendor`` stands for an installed package. Each script defines ``run(x)``, which gives what a loss would be made of,
and the tower whose parameters are asked about.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gradscope.findings import Finding
from gradscope.scanning.scanner import scan
from gradscope.session import Session

torch = pytest.importorskip("torch")

VENDOR = {
    "__init__": "from .towers import Tower, Lower as Lower\nfrom .functions import *\n",
    "base": """
        import torch
        from torch import nn

        class Base(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            @torch.inference_mode()
            def encode(self, x):
                return self.core(x)

            @torch.no_grad()
            def core(self, x):
                return self.layer(x)

            def forward(self, x):
                return self.layer(x)
    """,
    "towers": """
        from vendor.base import Base

        class Tower(Base):
            def through(self, x):
                return self.encode(x)

        class Lower(Tower):
            @classmethod
            def from_pretrained(cls):
                return cls()
    """,
    "functions": """
        import torch

        __all__ = ["helped"]

        @torch.no_grad()
        def helped(tower, x):
            return tower(x)
    """,
}
NET = "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.tower = {made}\n\n"
FORWARD = "    def forward(self, x):\n        return {call}  # here\n\n\nnet = Net()\ntower = net.tower\nrun = net\n"
HEAD = "import torch\nfrom torch import nn\n"
STEP = "def step(tower{note}, x):\n    {made}loss = {call}.sum()  # here\n    loss.backward()\n\n\n"


def module(imports: str, made: str, call: str) -> str:
    """Return a script with a module that keeps a tower and calls it."""
    return f"{HEAD}{imports}\n\n\n{NET.format(made=made)}{FORWARD.format(call=call)}"


STOPPED = {
    "by its name": module("from vendor import Tower", "Tower()", "self.tower.encode(x)"),
    "by another name": module("from vendor import Tower as T", "T()", "self.tower.encode(x)"),
    "by its module": module("import vendor", "vendor.Tower()", "self.tower.encode(x)"),
    "by its own module": module("from vendor.towers import Tower", "Tower()", "self.tower.encode(x)"),
    "by a module's other name": module("import vendor.towers as t", "t.Tower()", "self.tower.encode(x)"),
    "its numbers": module("from vendor import Tower", "Tower()", "torch.tensor(self.tower.encode(x).numpy())"),
    "through its other method": module("from vendor import Tower", "Tower()", "self.tower.through(x)"),
    "from_pretrained": module("from vendor import Lower", "Lower.from_pretrained()", "self.tower.encode(x)"),
    "a function": module("from vendor import helped, Tower", "Tower()", "helped(self.tower, x)"),
    "a function of a module": module("import vendor", "vendor.Tower()", "vendor.helped(self.tower, x)"),
    "derived": f"{HEAD}from vendor import Tower\n\n\nclass Net(Tower):\n"
    + FORWARD.format(call="self.encode(x)").replace("net.tower", "net"),
    "imported in the constructor": module("", "None", "self.tower.encode(x)").replace(
        "self.tower = None", "from vendor import Tower\n        self.tower = Tower()"
    ),
}
SEEN = """    def seen(self, x):
        print(self.tower.encode(x))
        return Tower()(x)

    def forward"""
LOOK_ALIKES = {
    "another method": module("from vendor import Tower", "Tower()", "self.tower(x)"),
    "undecorated": module("from vendor import Tower", "Tower()", "self.tower.layer(x)"),
    "only looked at": module("from vendor import Tower", "Tower()", "self.seen(x)").replace("    def forward", SEEN),
}  # fmt: skip
MINE = """

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def encode(self, x):
        return self.layer(x)


"""
LOOK_ALIKES["a method of the same name"] = module(MINE, "Mine()", "self.tower.encode(x)")


def gradient_arrives(source: str) -> bool:
    """Run a script and ask autograd whether a gradient gets to the tower's parameters."""
    space: dict[str, object] = {"__name__": "script"}
    exec(compile(source, "script.py", "exec"), space)
    out = space["run"](torch.ones(2, 4))
    return bool(out.requires_grad)


def scanned(source: str, **options: object) -> Session:
    """Scan a script in the working folder."""
    Path("script.py").write_text(source)
    return scan("script.py", cache=False, **options)


def calls(session: Session) -> list[Finding]:
    """Return the findings of a session that count."""
    return [finding for finding in session.findings if finding.severity != "note"]


@pytest.mark.parametrize("way", STOPPED)
def test_a_call_that_torch_finds_stopped_is_an_error_at_its_line(vendor: Path, way: str) -> None:
    assert not gradient_arrives(STOPPED[way])
    (finding,) = calls(scanned(STOPPED[way]))
    assert (finding.severity, finding.path) == ("error", "script.py")
    assert finding.source.endswith("# here")
    assert "vendor/" in finding.message
    assert "training through Net.forward loses the gradient here" in finding.message
    assert calls(scanned(STOPPED[way], follow=False)) == []


@pytest.mark.parametrize("way", LOOK_ALIKES)
def test_a_look_alike_that_torch_lets_through_is_not(vendor: Path, way: str) -> None:
    assert gradient_arrives(LOOK_ALIKES[way])
    assert calls(scanned(LOOK_ALIKES[way])) == []


def test_what_lies_behind_is_told_and_what_to_call_instead(vendor: Path) -> None:
    session = scanned(STOPPED["by its name"])
    (finding,) = calls(session)
    assert finding.message.endswith("Behind it: Base.core (vendor/base.py:14).")
    assert finding.chain == ("Net.forward", "Base.encode")
    assert finding.fix == "Call forward of it where a gradient is wanted."
    (entry,) = (entry for entry in session.entries if entry["function"] == "Net.forward")
    assert (entry["status"], entry["findings"]) == ("blocked", [finding.id])
    assert session.stats["files"] == 1


def test_each_way_in_names_the_finding_at_its_own_call(vendor: Path) -> None:
    first = STOPPED["by its name"]
    session = scanned(first + "\n\n" + first.replace("Net", "Other"))
    found = {entry["class"]: entry["findings"] for entry in session.entries}
    lines = {finding.id: finding.line for finding in session.findings}
    assert len(lines) == 2
    assert [lines[name] for name in (*found["Net"], *found["Other"])] == sorted(lines.values())


@pytest.mark.parametrize(
    ("note", "made", "call"),
    [
        ("", "tower = Tower()\n    ", "tower.encode(x)"),
        (": Tower", "", "tower.encode(x)"),
        (": 'Tower | None'", "", "tower.encode(x)"),
        ("", "tower = Lower.from_pretrained().to('cpu')\n    ", "tower.through(x)"),
        ("", "", "helped(tower, x)"),
    ],
)
def test_a_step_of_training_is_asked_about_too(vendor: Path, note: str, made: str, call: str) -> None:
    imports = "import torch\nfrom vendor import Lower, Tower, helped\n\n\n"
    source = imports + STEP.format(note=note, made=made, call=call)
    (finding,) = calls(scanned(source))
    assert (finding.severity, finding.source[-6:]) == ("warning", "# here")
    assert "no gradient gets back through this call of step" in finding.message
    (asked,) = calls(scanned(source, entry=("step",)))
    assert asked.severity == "error"
    name = "tower" if "tower." in call else ""
    if name:
        trained = source.replace(
            "    loss.back", "    torch.optim.AdamW(list(tower.parameters()), lr=1)\n    loss.back"
        )
        assert [each.severity for each in calls(scanned(trained))] == ["error"]
        counted = source.replace("    loss.back", "    n = sum(p.numel() for p in tower.parameters())\n    loss.back")
        assert [each.severity for each in calls(scanned(counted))] == ["warning"]


def test_a_method_that_is_inherited_is_told_at_the_class(vendor: Path) -> None:
    source = f"{HEAD}from vendor import Tower\n\n\nclass Mine(Tower):\n    size = 4\n\n\nnet = Mine()\n"
    assert not gradient_arrives(source + "tower = net\nrun = net.encode\n")
    session = scanned(source, entry=("Mine.encode",))
    (finding,) = calls(session)
    assert (finding.severity, finding.source) == ("error", "class Mine(Tower):")
    assert "Mine.encode is inherited" in finding.message
    assert [entry["status"] for entry in session.entries] == ["blocked"]
    assert calls(scanned(source, entry=("Mine.forward",))) == []


def test_what_a_step_does_not_go_backward_from_is_left_out(vendor: Path) -> None:
    step = "def step(tower: Tower, net, x):\n    net(x).sum().backward()\n    print(tower.encode(x))\n"
    source = f"{HEAD}from vendor import Tower\n\n\n{step}"
    assert calls(scanned(source)) == []


@pytest.mark.parametrize("name", ["training_step", "compute_loss"])
def test_what_gives_a_trainer_its_loss_is_a_step(vendor: Path, name: str) -> None:
    loss = f"    def {name}(self, x):\n        return torch.tensor(self.tower.encode(x).numpy()).sum()  # here\n"
    made = NET.format(made="Tower()").replace("nn.Module", "Trainer")
    source = f"{HEAD}from trainers import Trainer\nfrom vendor import Tower\n\n\n{made}{loss}"
    (finding,) = calls(scanned(source))
    assert (finding.severity, finding.source[-6:]) == ("warning", "# here")
    assert calls(scanned(source.replace(name, "predict_step"))) == []


def test_what_gives_nothing_loses_nothing(vendor: Path) -> None:
    saving = "\n    def save(self, x):\n        torch.save(self.encode(x), 'x.pt')\n"
    path = vendor / "vendor" / "base.py"
    path.write_text(path.read_text() + saving)
    assert calls(scanned(module("from vendor import Tower", "Tower()", "self.tower.save(x)"))) == []


def test_a_script_without_a_function_is_a_step(vendor: Path) -> None:
    source = (
        f"{HEAD}from vendor import Tower\n\ntower = Tower()\nopt = torch.optim.SGD(tower.parameters(), lr=1)\n"
        "for x in [torch.ones(2, 4)]:\n    loss = tower.encode(x).sum()  # here\n    loss.backward()\n    opt.step()\n"
    )
    with pytest.raises(RuntimeError, match="does not require grad"):
        exec(compile(source, "script.py", "exec"), {})
    (finding,) = calls(scanned(source))
    assert (finding.severity, finding.source[-6:]) == ("error", "# here")
    assert "this call of the script" in finding.message


def test_a_switch_of_ones_own_around_it_is_what_is_told(vendor: Path) -> None:
    source = STOPPED["by its name"].replace("        return", "        with torch.no_grad():\n            return")
    (finding,) = calls(scanned(source))
    assert finding.rule == "GS104"


RUN = """    def run(self, x):
        with torch.no_grad():
            return self.tower(x)

    def forward"""
FREEZING = (
    "self.tower.requires_grad_(False)", "for p in self.tower.parameters():\n            p.requires_grad = False"
)  # fmt: skip


@pytest.mark.parametrize("freeze", FREEZING)
def test_what_is_frozen_is_a_warning(vendor: Path, freeze: str) -> None:
    frozen = STOPPED["by its name"].replace("= Tower()\n", f"= Tower()\n        {freeze}\n")
    (finding,) = calls(scanned(frozen))
    assert finding.severity == "warning"
    assert "What it runs is frozen here" in finding.message
    own = frozen.replace("self.tower.encode(x)", "self.run(x)").replace("    def forward", RUN)
    assert [each.severity for each in calls(scanned(own))] == ["warning"]
    inner = freeze.replace("\n            p", "\n                p")
    sometimes = own.replace(freeze, f"if self.training:\n            {inner}")
    assert [each.severity for each in calls(scanned(sometimes))] == ["error"]


def test_a_comment_at_the_call_hides_it(vendor: Path) -> None:
    session = scanned(STOPPED["by its name"].replace("# here", "# gradscope: ignore[GS101] a feature extractor"))
    assert calls(session) == []
    assert session.remarks == ["1 finding is hidden by ignore comments."]


def test_a_module_beside_the_script_is_followed(vendor: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "towers.py").write_text((vendor / "vendor" / "base.py").read_text())
    (folder / "train.py").write_text(module("from towers import Base", "Base()", "self.tower.encode(x)"))
    (finding,) = calls(scan("project/train.py", cache=False))
    assert "project/towers.py:10" in finding.message
    (folder / "parts.py").write_text("import train\nfrom towers import Base\n\n\nclass Part(Base):\n    pass\n")
    (folder / "train.py").write_text(module("from parts import Part", "Part()", "self.tower.encode(x)"))
    (finding,) = calls(scan("project/train.py", cache=False))
    assert "project/towers.py:10" in finding.message
    assert len(calls(scan("project", cache=False))) > 1  # both files are the project's own now


def test_a_file_of_a_package_is_followed_into_the_rest_of_it(vendor: Path) -> None:
    path = vendor / "vendor" / "mine.py"
    path.write_text(module("from .towers import Tower", "Tower()", "self.tower.encode(x)"))
    (finding,) = calls(scan("site/vendor/mine.py", cache=False))
    assert finding.source.endswith("# here")
    assert "vendor/base.py:10" in finding.message
    assert scan("site/vendor", cache=False).stats["outside"] == 0


def test_nothing_of_it_is_imported(vendor: Path) -> None:
    path = vendor / "vendor" / "__init__.py"
    path.write_text(f"raise SystemExit('imported')\n{path.read_text()}")
    assert len(calls(scanned(STOPPED["by its name"]))) == 1
    assert "vendor" not in sys.modules


def test_another_version_of_it_is_scanned_anew(vendor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSCOPE_CACHE_DIR", str(tmp_path / "cache"))
    Path("script.py").write_text(STOPPED["by its name"])
    assert len(calls(scan("script.py"))) == len(calls(scan("script.py"))) == 1
    base = vendor / "vendor" / "base.py"
    base.write_text(base.read_text().replace("@torch.inference_mode()", "").replace("@torch.no_grad()", ""))
    assert calls(scan("script.py")) == []


def test_what_is_not_installed_is_said(vendor: Path) -> None:
    source = module("from elsewhere import Tower\nimport other", "Tower()", "self.tower.encode(x)")
    session = scanned(source)
    assert session.remarks == ["Not installed here, so what is called of it was not followed: elsewhere."]


def test_the_encoder_this_tool_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepseek_ocr_encoder")
    monkeypatch.chdir(tmp_path)
    made = "DeepSeekOCREncoder.from_pretrained('deepseek-ai/DeepSeek-OCR')"
    source = module("from deepseek_ocr_encoder import DeepSeekOCREncoder", made, "self.tower(x)")
    (finding,) = calls(scanned(source))
    assert (finding.rule, finding.severity) == ("GS101", "error")
    assert "DeepSeekOCREncoder.encode runs under inference_mode (deepseek_ocr_encoder/" in finding.message
    assert "Behind it: DeepSeekOCREncoder._forward_core" in finding.message
    assert finding.fix == "Call the modules inside it: sam, clip_pre, clip_tr."


def test_integers_are_not_what_a_switch_took_the_gradient_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.ones(1, 2, dtype=torch.long)
    assert not model.generate(ids, max_new_tokens=1).is_floating_point()
    assert model(ids).logits.requires_grad
    for call in ("self.tower.generate(x)", "self.tower(x)"):
        source = module("from transformers import GPT2LMHeadModel, GPT2Config", "GPT2LMHeadModel(GPT2Config())", call)
        assert calls(scanned(source)) == []
