# ruff: noqa: E501 - each way stays on few lines
"""Every way from ``forward`` to what stops it, and the look-alikes that do not lead there; torch itself is asked first.

Each source defines a module ``Net``. It is run, and whether a gradient arrives at its parameters is held against what
the scan says of ``Net.forward`` without running anything.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest

from gradscope.scanning.scanner import scan
from gradscope.session import Session

torch = pytest.importorskip("torch")

HEAD = """
import functools
from dataclasses import dataclass, field

import torch
from torch import nn


class Stopped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    @torch.no_grad()
    def forward(self, x):
        return self.layer(x)

    def fine(self, x):
        return self.layer(x)


def build():
    return Stopped()


"""


def net(init: str = "pass", forward: str = "return self.layer(x)", more: str = "") -> str:
    """Return a module with a linear layer, a clean method and one under ``no_grad``, and what is put into it."""
    parts = [
        "class Net(nn.Module):\n    def __init__(self, mode='encode'):\n        super().__init__()",
        "        self.layer = nn.Linear(4, 4)",
        indent(dedent(init), "        "),
        "    @torch.no_grad()\n    def encode(self, x):\n        return self.layer(x)",
        "    def plain(self, x):\n        return self.layer(x)",
        indent(dedent(more), "    "),
        "    def forward(self, x):",
        indent(dedent(forward), "        "),
    ]
    return HEAD + "\n".join(parts) + "\n"


STOPPED = {
    # methods, under whatever name
    "a method": net(forward="return self.encode(x)"),
    "a lambda that is kept": net("self.run = lambda x: self.encode(x)", "return self.run(x)"),
    "a function that is kept": net("def run(x):\n    return self.encode(x)\nself.run = run", "return self.run(x)"),
    "partly applied and kept": net("self.run = functools.partial(self.encode)", "return self.run(x)"),
    "compiled and kept": net("self.run = torch.compile(self.encode, backend='eager')", "return self.run(x)"),
    "setattr": net("setattr(self, 'run', self.encode)", "return self.run(x)"),
    "getattr": net(forward="return getattr(self, 'encode')(x)"),
    "a list that is kept": net("self.runs = [self.plain, self.encode]", "for run in self.runs:\n    x = run(x)\nreturn x"),
    "a dict that is kept": net("self.table = {'a': self.encode}", "return self.table['a'](x)"),
    "a dict on the spot": net(forward="return {'a': self.encode}['a'](x)"),
    "a tuple on the spot": net(forward="for run in (self.encode,):\n    x = run(x)\nreturn x"),
    "one of two": net(forward="return (self.encode or self.plain)(x)"),
    "a walrus": net(forward="return (run := self.encode)(x)"),
    "its class": net(forward="return type(self).encode(self, x)"),
    "its class again": net(forward="return self.__class__.encode(self, x)"),
    "its class by name": net(forward="return Net.encode(self, x)"),
    "the call of a call": net(forward="return self.encode.__call__(x)"),
    "given to map": net(forward="return torch.stack(list(map(self.encode, [x])))"),
    "given to a function": net(forward="return in_turn(self.encode, x)") + "def in_turn(run, x):\n    return run(x)\n",
    "given to a pool": net(forward="from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor() as pool:\n    return pool.submit(self.encode, x).result()"),
    "vmap": net(forward="return torch.vmap(self.encode)(x)"),
    "a comprehension": net(forward="return torch.stack([self.encode(each) for each in [x]])"),
    "a name of the class": net(forward="return self.run(x)", more="@torch.no_grad()\ndef stop(self, x):\n    return self.layer(x)\nrun = stop"),
    "a property that gives it": net(forward="return self.encoder(x)", more="@property\ndef encoder(self):\n    return self.encode"),
    "a property that calls it": net(forward="self.x = x\nreturn self.features", more="@property\ndef features(self):\n    return self.encode(self.x)"),
    "a static method": net(forward="return self.run(self, x)", more="@staticmethod\ndef run(self, x):\n    return self.encode(x)"),
    "match": net(forward="match x.ndim:\n    case 2:\n        return self.encode(x)\nreturn self.encode(x)"),
    "put in the place of forward": net("self.forward = self.encode"),
    # parts
    "a part": net("self.tower = Stopped()", "return self.tower(x)"),
    "Sequential": net("self.parts = nn.Sequential(Stopped(), nn.ReLU())", "return self.parts(x)"),
    "Sequential of a list": net("parts = []\nparts.append(Stopped())\nself.parts = nn.Sequential(*parts)", "return self.parts(x)"),
    "Sequential of a comprehension": net("self.parts = nn.Sequential(*[Stopped() for _ in range(2)])", "return self.parts(x)"),
    "ModuleList": net("self.parts = nn.ModuleList([nn.ReLU(), Stopped()])", "for part in self.parts:\n    x = part(x)\nreturn x"),
    "ModuleList with numbers": net("self.parts = nn.ModuleList([Stopped()])", "for i, part in enumerate(self.parts):\n    x = part(x)\nreturn x"),
    "ModuleList that grows": net("self.parts = nn.ModuleList()\nself.parts.append(Stopped())", "for part in self.parts:\n    x = part(x)\nreturn x"),
    "ModuleList by number": net("self.parts = nn.ModuleList([Stopped()])", "return self.parts[0](x)"),
    "ModuleList, a method": net("self.parts = nn.ModuleList([Other()])", "for part in self.parts:\n    x = part.code(x)\nreturn x").replace("class Net", "class Other(Stopped):\n    @torch.no_grad()\n    def code(self, x):\n        return self.layer(x)\n\n\nclass Net"),
    "ModuleDict": net("self.parts = nn.ModuleDict({'a': Stopped()})", "return self.parts['a'](x)"),
    "add_module": net("self.add_module('tower', Stopped())", "return self.tower(x)"),
    "DataParallel": net("self.tower = nn.DataParallel(Stopped())", "return self.tower(x)"),
    "compiled": net("self.tower = torch.compile(Stopped(), backend='eager')", "return self.tower(x)"),
    "a local name first": net("tower = Stopped()\nself.tower = tower.eval()", "return self.tower(x)"),
    "side by side": net("self.tower, self.size = Stopped(), 1", "return self.tower(x)"),
    "a class as attribute": net("self.tower = self.kind()", "return self.tower(x)", "kind = Stopped"),
    "built by a method": net("self.build_parts()", "return self.tower(x)", "def build_parts(self):\n    self.tower = Stopped()"),
    "made on the spot": net(forward="return Stopped()(x)"),
    "inherited": HEAD + "class Net(Stopped):\n    pass\n",
    "inherited and called": HEAD + "class Net(Stopped):\n    def forward(self, x):\n        return super().forward(x) * 2\n",
    "overridden": HEAD + "class Frame(Stopped):\n    def forward(self, x):\n        return self.run(x)\n    def run(self, x):\n        return self.layer(x)\n\n\nclass Net(Frame):\n    @torch.no_grad()\n    def run(self, x):\n        return self.layer(x)\n",
    "another name of forward": net(forward="pass").replace("def forward(self, x):\n        pass", "forward = encode"),
}  # fmt: skip
LOCAL = {
    "an instance made here": net(forward="tower = Stopped()\nreturn tower(self.layer(x))"),
    "its method by another name": net(forward="tower = Net()\nother = tower\nreturn other.encode(self.layer(x))"),
    "moved and set to eval": net(forward="tower = Stopped().to('cpu').eval()\nreturn tower(self.layer(x))"),
    "one that is taken": net(
        forward="return self.through(Stopped(), self.layer(x))",
        more="def through(self, tower: Stopped, x):\n    return tower(x)",
    ),
    "one that may be None": net(
        forward="return self.through(Net(), self.layer(x))",
        more="def through(self, tower: 'Net | None', x):\n    return tower.encode(x)",
    ),
    "a method of a base class": net(forward="tower = Lower()\nreturn tower(self.layer(x))")
    + "class Lower(Stopped):\n    pass\n",
    "one with a call of its own": net(forward="tower = Called()\nreturn tower(self.layer(x))")
    + "class Called:\n    @torch.no_grad()\n    def __call__(self, x):\n        return x * 2\n",
}
STOPPED |= LOCAL
FLOWS = {
    "a clean method": net("self.run = self.plain", "return self.run(x)"),
    "a clean lambda": net("self.run = lambda x: self.plain(x)", "return self.run(x)"),
    "a clean list": net("self.runs = [self.plain]", "for run in self.runs:\n    x = run(x)\nreturn x"),
    "clean by getattr": net(forward="return getattr(self, 'plain')(x)"),
    "getattr of nothing": net(forward="run = getattr(self, 'nothing', None)\nreturn self.plain(x)"),
    "undecorated": net(forward="return self.encode.__wrapped__(self, x)"),
    "undecorated, by its class": net(forward="return type(self).encode.__wrapped__(self, x)"),
    "looked for": net(forward="if hasattr(self, 'encode') and callable(self.encode):\n    return self.layer(x)\nreturn x"),
    "compared": net(forward="if self.encode is not None:\n    return self.layer(x)\nreturn x"),
    "kept for later": net(forward="self.later = self.encode\nreturn self.layer(x)"),
    "appended": net("self.hooks = []", "self.hooks.append(self.encode)\nreturn self.layer(x)"),
    "a hook": net(forward="y = self.layer(x)\nhandle = y.register_hook(self.seen)\nreturn y", more="@torch.no_grad()\ndef seen(self, grad):\n    return grad * 2"),
    "its name": net(forward="text = repr(self.encode)\nself.text = text\nreturn self.layer(x)"),
    "a part that is not called": net("self.teacher = nn.Sequential(Stopped())"),
    "another method of a part": net("self.parts = nn.ModuleList([Stopped()])", "return self.parts[0].fine(x)"),
    "a clean container": net("self.parts = nn.Sequential(nn.Linear(4, 4))", "return self.parts(x)"),
    "a number of the class": net(forward="return self.layer(x) * self.scale", more="scale = 3.0"),
    "a clean method in the place of forward": net("self.forward = self.plain", "return self.encode(x)"),
}  # fmt: skip

FLOWS |= {
    "the name holds another by now": net(
        forward="tower = Stopped()\ntower = nn.Linear(4, 4)\nreturn tower(self.layer(x))"
    ),
    "another method of an instance": net(forward="tower = Stopped()\nreturn tower.fine(self.layer(x))"),
    "what an instance gave": net(forward="tower = Kind()\ny = tower(self.layer(x))\nreturn y.encode")
    + "class Kind:\n    def __call__(self, x):\n        self.encode = x\n        return self\n",
}

QUIET = "import torch\n\n\n@torch.no_grad()\ndef encode(layer, x):\n    return layer(x)\n"


def over(head: str, init: str, forward: str = "return self.part(x)", base: str = "nn.Module") -> str:
    """Return the file of a package that has ``Net``, or what stands between it and what stops it."""
    parts = [
        f"from torch import nn\n{head}\n\n\nclass Net({base}):\n    def __init__(self):\n        super().__init__()"
    ]
    parts += [f"        {init}", "    def forward(self, x):", indent(dedent(forward), "        ")]
    return "\n".join(parts) + "\n"


PACKAGES = {
    "relative": {"net": over("from .tower import Stopped", "self.part = Stopped()")},
    "renamed": {"net": over("from .tower import Stopped as Other", "self.part = Other()")},
    "by its module": {"net": over("from . import tower as towers", "self.part = towers.Stopped()")},
    "star": {"net": over("from .tower import *", "self.part = Stopped()")},
    "exported": {"sub/__init__": "from ..tower import Stopped\n", "net": over("from .sub import Stopped", "self.part = Stopped()")},
    "imported inside": {"net": over("", "from .tower import Stopped; self.part = Stopped()")},
    "a container": {"net": over("from .tower import Stopped", "self.part = nn.Sequential(nn.ReLU(), Stopped())")},
    "a part of a part": {
        "middle": over("from .tower import Stopped", "self.part = nn.ModuleList([Stopped()])", "return self.part[0](x)").replace("Net", "Middle"),
        "net": over("from .middle import Middle", "self.part = nn.Sequential(Middle())"),
    },
    "a function that makes it": {
        "make": "from .tower import Stopped\n\n\ndef build_tower():\n    tower = Stopped()\n    return tower\n",
        "net": over("from .make import build_tower", "self.part = build_tower()"),
    },
    "a function": {"fn": QUIET, "net": over("from .fn import encode", "self.part = nn.Linear(4, 4)", "return encode(self.part, x)")},
    "a function that is kept": {"fn": QUIET, "net": over("from .fn import encode", "self.part = nn.Linear(4, 4); self.run = encode", "return self.run(self.part, x)")},
    "what a base class keeps": {
        "base": over("from .tower import Stopped", "self.parts = nn.ModuleList([Stopped()])", "return x").replace("Net", "Base"),
        "net": over("from .base import Base", "pass", "for part in self.parts:\n    x = part(x)\nreturn x", "Base"),
    },
}  # fmt: skip


def gradient_arrives(source: str) -> bool:
    """Tell whether one backward pass gives any parameter of ``Net`` a gradient."""
    names: dict[str, Any] = {"__name__": "net"}
    exec(compile(source, "net.py", "exec"), names)
    model = names["Net"]()
    result = model(torch.ones(2, 4))
    if result.requires_grad:
        result.sum().backward()
    return any(parameter.grad is not None for parameter in model.parameters())


def asked(folder: Path, source: str, entry: str = "Net.forward") -> Session:
    """Return the scan of a source that is asked about one entry."""
    path = folder / "net.py"
    path.write_text(source)
    return scan(str(path), entry=(entry,) if entry else (), cache=False)


@pytest.mark.parametrize("way", STOPPED)
def test_a_way_that_torch_finds_stopped_is_called_so(tmp_path: Path, way: str) -> None:
    assert not gradient_arrives(STOPPED[way])
    session = asked(tmp_path, STOPPED[way])
    assert [entry["status"] for entry in session.entries] == ["blocked"]
    assert session.verdict == "blocked"


@pytest.mark.parametrize("way", FLOWS)
def test_a_look_alike_that_torch_lets_through_is_clean(tmp_path: Path, way: str) -> None:
    assert gradient_arrives(FLOWS[way])
    session = asked(tmp_path, FLOWS[way])
    assert [entry["status"] for entry in session.entries] == ["clean"]
    assert session.findings == []


@pytest.mark.parametrize("way", PACKAGES)
def test_a_way_through_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    package = f"package_{list(PACKAGES).index(way)}"
    for name, source in {"__init__": "", "tower": HEAD, **PACKAGES[way]}.items():
        path = tmp_path / package / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = importlib.import_module(f"{package}.net").Net()
    assert not model(torch.ones(2, 4)).requires_grad
    session = scan(str(tmp_path / package), entry=("Net.forward",), cache=False)
    assert [entry["status"] for entry in session.entries] == ["blocked"]
    statuses = {entry["function"]: entry["status"] for entry in scan(str(tmp_path / package), cache=False).entries}
    assert statuses.get("Net.forward", "blocked") == "blocked"


def test_a_method_that_is_compiled_in_its_own_place_is_still_one_of_its_class(tmp_path: Path) -> None:
    source = net("self.forward = torch.compile(self.forward, backend='eager')", "return self.encode(x)")
    assert not gradient_arrives(source)
    statuses = {entry["function"]: entry["status"] for entry in asked(tmp_path, source, entry="").entries}
    assert statuses["Net.forward"] == "blocked"


def test_what_cannot_be_followed_is_said(tmp_path: Path) -> None:
    source = net("self.tower = TOWERS['stopped']()", "return self.tower(x)") + "TOWERS = {'stopped': Stopped}\n"
    assert not gradient_arrives(source)
    (remark,) = asked(tmp_path, source).remarks
    assert "Net.forward also runs self.tower" in remark
    assert asked(tmp_path, FLOWS["a clean container"]).remarks == []


def test_what_a_function_of_the_scan_makes_is_followed(tmp_path: Path) -> None:
    source = net("self.tower = build()", "return self.tower(x)")
    assert not gradient_arrives(source)
    assert [entry["status"] for entry in asked(tmp_path, source).entries] == ["blocked"]
