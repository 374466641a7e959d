"""What a function makes is of the class that its source shows, however the caller comes by it; torch is asked first.

``vendor`` stands for an installed package. Each script defines ``run(x)``, which gives what a loss would be made of.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from gradscope.errors import GradscopeError
from gradscope.findings import Finding
from gradscope.scanning.scanner import scan
from gradscope.session import Session

torch = pytest.importorskip("torch")

VENDOR = {
    "__init__": """
        from .factory import *
        from .factory import Embedder, ask, create, load, load_one_of, load_pair, load_parts, registry, same_registry
        from .score import score
        from .towers import Host as Model
        from .towers import Other, Tower
    """,
    "towers": """
        import torch
        from torch import nn

        class Other(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def encode(self, x):
                return self.layer(x)

            def forward(self, x):
                return self.layer(x)

        class Tower(Other):
            @torch.no_grad()
            def encode(self, x):
                return self.layer(x)

            @staticmethod
            def small(pretrained=False):
                model = Tower._made(4)
                return model

            @staticmethod
            def _made(size):
                return Tower()

            @classmethod
            def named(cls, name):
                return cls()

        class Sub(Tower):
            pass

        class Closed(Other):
            @torch.no_grad()
            def forward(self, x):
                return self.layer(x)

        class Base:
            def encode(self, x):
                return self.encode_on_one_device(x)

            def encode_on_one_device(self, x):
                raise NotImplementedError

        class Host(Base):
            def __init__(self):
                self.tower = Other()

            def encode(self, x):
                return super().encode(x)

            @torch.no_grad()
            def encode_on_one_device(self, x):
                return self.tower(x)
    """,
    "factory": """
        import torch
        from vendor.towers import Closed, Other, Sub, Tower

        __all__ = ["load_parts"]

        def _build(size, device="cpu"):
            model = Tower()
            if device is not None:
                model = model.to(device)
            model.load_state_dict(model.state_dict())
            return model.eval()

        def load(name="base"):
            return _build(4)

        def load_pair(name="base"):
            model = load(name)
            return model, (lambda x: x), None

        def load_parts():
            return {"image": Tower(), "text": Other()}

        def load_one_of(kind):
            model_class = Other
            if kind == "stopped":
                model_class = Tower
            return model_class()

        def Embedder(name):
            if name == "tower":
                return Tower()
            return Sub()

        def build_closed(checkpoint=None):
            closed = Closed()
            return closed

        build_default = build_closed

        registry = {
            "default": build_default,
            "closed": build_closed,
            "other": Other,
            "tower": load,
        }
        same_registry = registry

        _made_at_run_time = {}

        def register(function):
            _made_at_run_time[function.__name__] = function
            return function

        @register
        def tower_small():
            return Tower()

        def create(name):
            create_fn = _made_at_run_time[name]
            model = create_fn()
            return model

        def ask(x):
            return load().encode(x)
    """,
    "score": """
        import torch
        from vendor.towers import Tower

        @torch.no_grad()
        def score(tower, x):
            return tower(x)
    """,
    "auto": """
        import torch
        from vendor.towers import Tower

        class AutoTower:
            @classmethod
            def from_pretrained(cls, name):
                return _TABLE[name]()

        class Finder:
            @classmethod
            def from_finetuned(cls, name, **settings):
                model_class = _TABLE[name]
                return model_class(
                    **settings,
                )

        _TABLE = {}
        _TABLE["tower"] = Tower
    """,
}
NET = "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        {made}\n\n"
FORWARD = "    def forward(self, x):\n        return {call}  # here\n\n\nrun = Net()\n"
HEAD = "import torch\nfrom torch import nn\n"
STEP = (
    "optimizer = torch.optim.SGD(model.parameters(), lr=1)\nfor x in [torch.ones(2, 4)]:\n"
    "    loss = {call}.sum()  # here\n    loss.backward()\n    optimizer.step()\n"
)


def module(imports: str, made: str, call: str = "self.tower.encode(x)") -> str:
    """Return a script with a module that makes a tower and calls it."""
    return f"{HEAD}{imports}\n\n\n{NET.format(made=made)}{FORWARD.format(call=call)}"


OWN = "def load_mine(device='cpu'):\n    encoder = load()\n    return encoder.to(device)\n"
TABLE = "BUILDERS = {'a': lambda: Tower(), 'b': Tower}\n\n\ndef build(name):\n    return BUILDERS[name]()\n"
CLOSED = "from vendor import registry"
STOPPED = {
    "a function": module("from vendor import load", "self.tower = load()"),
    "by another name": module("from vendor import load as make", "self.tower = make('base').eval()"),
    "by its module": module("import vendor", "self.tower = vendor.load()"),
    "beside torch": module("import torch, vendor", "self.tower = vendor.load()"),
    "first of several": module("from vendor import load_pair", "self.tower, _, self.size = load_pair()"),
    "an item": module("from vendor import load_pair", "self.tower = load_pair()[0].train()"),
    "a part by its key": module("import vendor", "self.tower = vendor.load_parts()['image']"),
    "a local name": module("import vendor", "tower, *rest = vendor.load_pair()\n        self.tower = tower"),
    "both ways of a condition": module(CLOSED, "self.tower = (registry['default'] if self else registry['closed'])()",
                                       "self.tower(x)"),
    "a static method": module("from vendor import Tower", "self.tower = Tower.small()"),
    "a class method": module("from vendor import Tower", "self.tower = Tower.named('x')"),
    "the name of a class": module("import vendor", "self.tower = vendor.Embedder('tower')"),
    "a table": module(CLOSED, "self.tower = registry['tower']()"),
    "a table asked": module(CLOSED, "self.tower = registry.get('tower')()"),
    "a table by another name": module("import vendor", "self.tower = vendor.same_registry['tower']()"),
    "what a table holds, called later": module(CLOSED, "build = registry['closed']\n        self.tower = build()",
                                               "self.tower(x)"),
    "another name for a function": module(CLOSED, "self.tower = registry['default']()", "self.tower(x)"),
    "one's own function": module(f"from vendor import load\n\n\n{OWN}", "self.tower = load_mine()"),
    "one's own table": module(f"from vendor import Tower\n\n{TABLE}", "self.tower = build('a')"),
    "in a list": module(CLOSED, "self.towers = nn.ModuleList([registry['closed']() for _ in range(2)])",
                        "sum(tower(x) for tower in self.towers)"),
    "in a dict": module("import vendor", "self.towers = {'a': vendor.load()}", "self.towers['a'].encode(x)"),
    "a method that a base class calls": module("from vendor import Model", "self.tower = Model()"),
    "the name of its module": module("from vendor import score, Tower", "self.tower = Tower()", "score(self.tower, x)"),
}  # fmt: skip
LOOK_ALIKES = {
    "its forward pass": module("from vendor import load", "self.tower = load()", "self.tower(x)"),
    "a module in it": module("from vendor import load", "self.tower = load()", "self.tower.layer(x)"),
    "another part": module("import vendor", "self.tower = vendor.load_parts()['text']"),
    "another key": module(CLOSED, "self.tower = registry['other']()", "self.tower(x) + self.tower.encode(x)"),
    "put in its place": module("import vendor", "self.tower = vendor.load()\n        self.tower = vendor.Other()"),
}


def gradient_arrives(source: str) -> bool:
    """Run a script and ask autograd whether a gradient gets through what it calls."""
    space: dict[str, object] = {"__name__": "script"}
    exec(compile(source, "script.py", "exec"), space)
    return bool(space["run"](torch.ones(2, 4)).requires_grad)


def trains(source: str) -> bool:
    """Run a script that trains, and tell whether its backward pass goes through."""
    try:
        exec(compile(source, "script.py", "exec"), {"__name__": "__main__"})
    except RuntimeError as error:
        assert "does not require grad" in str(error)
        return False
    return True


def scanned(source: str, **options: object) -> Session:
    """Scan a script in the working folder."""
    Path("script.py").write_text(source)
    return scan("script.py", **{"cache": False, **options})


def calls(session: Session) -> list[Finding]:
    """Return the findings of a session that count."""
    return [finding for finding in session.findings if finding.severity != "note"]


@pytest.mark.parametrize("way", STOPPED)
def test_what_is_made_is_followed_to_where_torch_finds_it_stopped(vendor: Path, way: str) -> None:
    assert not gradient_arrives(STOPPED[way])
    (finding,) = calls(scanned(STOPPED[way]))
    assert (finding.severity, finding.source[-6:]) == ("error", "# here")
    assert "vendor/" in finding.message
    assert calls(scanned(STOPPED[way], follow=False)) == []


@pytest.mark.parametrize("way", LOOK_ALIKES)
def test_a_look_alike_that_torch_lets_through_is_not(vendor: Path, way: str) -> None:
    assert gradient_arrives(LOOK_ALIKES[way])
    session = scanned(LOOK_ALIKES[way])
    assert calls(session) == []
    assert session.remarks == []


ONE_OF_SEVERAL = {
    "a function": module("from vendor import load_one_of", "self.tower = load_one_of('stopped')"),
    "a condition": module(f"{CLOSED}\n\nstopped = True",
                          "self.tower = (registry['tower'] if stopped else registry['other'])()"),
    "a key": module(f"{CLOSED}\n\nKEY = 'closed'", "self.towers = nn.ModuleList([registry[n]() for n in [KEY]])",
                    "sum(tower(x) for tower in self.towers)"),
}  # fmt: skip


@pytest.mark.parametrize("way", ONE_OF_SEVERAL)
def test_one_of_several_classes_is_no_certain_break(vendor: Path, way: str) -> None:
    source = other = ONE_OF_SEVERAL[way]
    for stopped, not_stopped in (("'stopped'", "'other'"), ("= True", "= False"), ("KEY = 'closed'", "KEY = 'other'")):
        other = other.replace(stopped, not_stopped)
    assert not gradient_arrives(source)
    assert gradient_arrives(other)
    (finding,) = calls(scanned(source))
    assert (finding.severity, finding.confidence) == ("warning", "possible")


SCRIPTS = {
    "a loop": "model = registry['closed']().train()\n" + STEP.format(call="model(x)"),
    "several at once": "model, transform, _ = load_pair('base')\n" + STEP.format(call="model.encode(x)"),
    "a function": "model = registry['closed']()\n\n\ndef step(x):\n    loss = model(x).sum()  # here\n"
    "    loss.backward()\n\n\nstep(torch.ones(2, 4))\n",
    "a main block": "if __name__ == '__main__':\n"
    + "".join(f"    {line}\n" for line in ("model = load()\n" + STEP.format(call="model.encode(x)")).splitlines()),
    "at once": STEP.replace("model.parameters()", "nn.Linear(4, 4).parameters()").format(call="load().encode(x)"),
    "a list": "models = [load(), load()]\nmodel = models[0]\n"
    + STEP.format(call="sum(each.encode(x) for each in models)"),
}


@pytest.mark.parametrize("way", SCRIPTS)
def test_a_script_that_trains_is_told_at_its_call(vendor: Path, way: str) -> None:
    source = f"{HEAD}from vendor import load, load_pair, registry\n\n{SCRIPTS[way]}"
    assert not trains(source)
    (finding,) = calls(scanned(source))
    assert finding.source[-6:] == "# here"
    open_now = source.replace("registry['closed']", "registry['other']").replace(".encode(", ".forward(")
    assert trains(open_now)
    assert calls(scanned(open_now)) == []


def test_a_module_beside_the_script_gets_it_from_elsewhere(vendor: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    own = f"from vendor import load\n\nBUILDERS = {{'a': load}}\n\n\n{OWN}"
    own += "\n\ndef build(name):\n    build_it = BUILDERS[name]\n    return build_it()\n"
    (folder / "encoders.py").write_text(own)
    for made in ("load_mine()", "build('a')"):
        (folder / "train.py").write_text(module("from encoders import build, load_mine", f"self.tower = {made}"))
        (finding,) = calls(scan("project/train.py", cache=False))
        assert "Tower.encode runs under no_grad" in finding.message
    (folder / "encoders.py").write_text(
        module("from vendor import load", "self.tower = load()").replace("Net", "Part").partition("run =")[0]
    )
    (folder / "train.py").write_text(module("from encoders import Part", "self.part = Part()", "self.part(x)"))
    (finding,) = calls(scan("project/train.py", cache=False))
    assert finding.chain == ("Net.forward", "Part.forward", "Tower.encode")


UNKNOWN = {
    "a table filled at run time": ("from vendor import create", "create('tower_small')", "vendor.create"),
    "an automatic class": ("from vendor.auto import AutoTower", "AutoTower.from_pretrained('tower')",
                           "vendor.auto.AutoTower.from_pretrained"),
    "a class that gives others": ("from vendor.auto import Finder", "Finder.from_finetuned('tower')",
                                  "vendor.auto.Finder.from_finetuned"),
    "one's own function around it": (
        "from vendor import create\n\n\ndef load_it():\n    return create('tower_small').eval()\n", "load_it()",
        "vendor.create",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", UNKNOWN)
def test_what_only_a_run_tells_is_said_not_to_be_followed(vendor: Path, way: str) -> None:
    imports, made, name = UNKNOWN[way]
    source = module(imports, f"self.tower = {made}")
    assert not gradient_arrives(source)
    session = scanned(source)
    assert calls(session) == []
    told = f"What {name} gives was not followed: the source does not show of which class it is."
    assert session.remarks == [told]
    step = f"{HEAD}{imports}\n\n\nmodel = {made}\n" + STEP.format(call="model.encode(x)")
    assert scanned(step).remarks == [told]
    unused = source.replace("self.tower.encode(x)", "x")
    assert scanned(unused).remarks == []
    assert scanned(source, follow=False).remarks == []


def test_what_torch_loads_is_said_not_to_be_followed(vendor: Path) -> None:
    source = module("import vendor", "self.tower = torch.hub.load('user/towers', 'tower')")
    (remark,) = scanned(source).remarks
    assert remark.startswith("What torch.hub.load gives was not followed")


def test_what_a_function_computes_is_no_model(vendor: Path) -> None:
    source = module("from vendor import ask", "self.layer = nn.Linear(4, 4)", "self.layer(ask(x).mean(0))")
    session = scanned(source)
    assert session.remarks == []


def test_what_is_not_installed_and_gives_a_model_is_named(vendor: Path) -> None:
    session = scanned(module("import nowhere", "self.tower = nowhere.load_model('base')"))
    assert session.remarks == ["Not installed here, so what is called of it was not followed: nowhere."]
    assert scanned(module("import nowhere", "self.size = nowhere.width('base')")).remarks == []


def test_a_method_that_gives_the_mode_itself_is_a_switch(tmp_path: Path) -> None:
    source = dedent(
        """
        import torch
        from torch import nn


        class Pipe(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def context(self):
                return torch.no_grad

            def forward(self, x):
                context = self.context()
                with context():
                    x = self.layer(x)
                return x


        run = Pipe()
        """
    )
    assert not gradient_arrives(source)
    path = tmp_path / "pipe.py"
    path.write_text(source)
    (finding,) = calls(scan(str(path), cache=False))
    assert (finding.rule, finding.severity, finding.source) == ("GS106", "error", "with context():")


def test_a_second_scan_takes_it_from_the_cache(vendor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSCOPE_CACHE_DIR", str(tmp_path / "cache"))
    first = scanned(STOPPED["a table"], cache=True)
    source = STOPPED["a table"].replace("# here", "# there")
    second = scanned(source, cache=True)
    assert second.stats["cached"] > 0
    assert [each.message for each in calls(second)] == [each.message for each in calls(first)]
    path = vendor / "vendor" / "factory.py"
    path.write_text(path.read_text().replace('"tower": load', '"tower": Other'))
    assert calls(scanned(source, cache=True)) == []


def test_functions_that_make_each_other_end(vendor: Path) -> None:
    path = vendor / "vendor" / "factory.py"
    text = path.read_text().replace("return _build(4)", "return _build(4) if name else load_again(name)")
    path.write_text(text + "\n\ndef load_again(name):\n    return load(name)\n")
    assert len(calls(scanned(STOPPED["a function"]))) == 1
    path.write_text(path.read_text().replace("return _build(4) if name else load_again", "return load_again"))
    try:
        assert calls(scanned(STOPPED["a function"])) == []
    except GradscopeError as error:  # pragma: no cover
        pytest.fail(str(error))
