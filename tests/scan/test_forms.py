# ruff: noqa: E501 - the sources under test stay on one line
"""Switches put to work in a roundabout way, and code that only looks switched off; judged as autograd would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import indent

import pytest

from gradscope.findings import SEVERITIES, Finding
from gradscope.scanning.scanner import scan

HEAD = (
    "import torch, contextlib, functools\nfrom torch import nn\nfrom contextlib import ExitStack, nullcontext\n"
    "from torch.utils.checkpoint import checkpoint\n"
)
INIT = "class Net(nn.Module):\n    def __init__(self, flag=True):\n        super().__init__()\n        self.layer = nn.Linear(4, 4)\n"
CONTEXT = "        self.guard = torch.no_grad()\n"
RUN = "def forward(self, x):\n    return self.layer(x)"
QUIET = "def _quiet(self, x):\n    return self.layer(x)\n"


@pytest.fixture
def findings(tmp_path: Path) -> Callable[[str], list[Finding]]:
    def run(source: str) -> list[Finding]:
        path = tmp_path / "net.py"
        compile(source, "net.py", "exec")
        path.write_text(source)
        return scan(str(path), cache=False).findings

    return run


def net(methods: str, head: str = "", init: str = "") -> str:
    return f"{HEAD}{head}{INIT}{init}{indent(methods, '    ')}\n"


STOPPED = {
    "a lambda": net(f"@quiet()\n{RUN}", "quiet = lambda: torch.no_grad()\n"),
    "a partial": net(f"@quiet()\n{RUN}", "quiet = functools.partial(torch.set_grad_enabled, False)\n"),
    "all of torch": net(f"@no_grad()\n{RUN}", "from torch import *\n"),
    "a name in the class": net(f"quiet = torch.no_grad\n@quiet()\n{RUN}"),
    "a context on self": net("def forward(self, x):\n    with self.guard:\n        return self.layer(x)", init=CONTEXT),
    "applied in the constructor": net(RUN, init="        self.forward = torch.no_grad()(self.forward)\n"),
    "applied bare": net(RUN, init="        self.forward = torch.no_grad(self.forward)\n"),
    "applied at module level": net(RUN) + "Net.forward = torch.inference_mode()(Net.forward)\n",
    "applied and called": net("def forward(self, x):\n    return torch.no_grad()(self.layer)(x)"),
    "applied to a local name": net("def forward(self, x):\n    quiet = torch.no_grad()(self.layer)\n    return quiet(x)"),
    "entered by hand": net("def forward(self, x):\n    guard = torch.no_grad()\n    guard.__enter__()\n    y = self.layer(x)\n    guard.__exit__(None, None, None)\n    return y"),
    "an exit stack": net("def forward(self, x):\n    with ExitStack() as stack:\n        stack.enter_context(torch.no_grad())\n        y = self.layer(x)\n    return y"),
    "an exit stack of its own": net("def forward(self, x):\n    stack = ExitStack()\n    with nullcontext():\n        stack.enter_context(torch.no_grad())\n    y = self.layer(x)\n    stack.close()\n    return y"),
    "off and on again": net("def forward(self, x):\n    torch._C._set_grad_enabled(False)\n    y = self.layer(x)\n    torch._C._set_grad_enabled(True)\n    return y"),
    "off and back to what it was": net("def forward(self, x):\n    before = torch.is_grad_enabled()\n    torch.set_grad_enabled(False)\n    y = self.layer(x)\n    torch.set_grad_enabled(before)\n    return y"),
    "bound on the way": net("def forward(self, x):\n    with torch.no_grad():\n        print(y := self.layer(x))\n    return y"),
    "a property": net("@property\n@torch.no_grad()\ndef scaled(self):\n    return self.layer.weight * 2\ndef forward(self, x):\n    return x @ self.scaled"),
    "a callable on self": net(f"@torch.no_grad()\n{QUIET}def forward(self, x):\n    return self.run(x)", init="        self.run = self._quiet\n"),
    "a function on self": net("def forward(self, x):\n    return self.run(self.layer, x)", "@torch.no_grad()\ndef helper(layer, x):\n    return layer(x)\n", "        self.run = helper\n"),
    "a callback": net(f"@torch.no_grad()\n{QUIET}def forward(self, x):\n    return checkpoint(self._quiet, x, use_reentrant=False)"),
    "one of two methods": net(f"@torch.no_grad()\n{QUIET}def _loud(self, x):\n    return x\ndef forward(self, x):\n    run = self._quiet if len(x) > 2 else self._loud\n    return run(x)"),
    "mapped": net(f"@torch.no_grad()\n{QUIET}def forward(self, xs):\n    return torch.stack(list(map(self._quiet, xs)))"),
    "a function inside": net("def forward(self, x):\n    @torch.no_grad()\n    def go(z):\n        return self.layer(z)\n    return go(x)"),
    "a function inside, handed on": net("def forward(self, x):\n    def go(z):\n        with torch.no_grad():\n            return self.layer(z)\n    return checkpoint(go, x, use_reentrant=False)"),
    "a manager of its own": net("def forward(self, x):\n    with quiet():\n        return self.layer(x)", "@contextlib.contextmanager\ndef quiet():\n    before = torch.is_grad_enabled()\n    torch.set_grad_enabled(False)\n    try:\n        yield\n    finally:\n        torch.set_grad_enabled(before)\n"),
    "a wrapper of a wrapper": net(f"@quieter\n{RUN}", "def quiet(fn):\n    return torch.no_grad()(fn)\ndef quieter(fn):\n    return quiet(fn)\n"),
    "a class made in a function": HEAD + "def make():\n" + indent(net(f"@torch.no_grad()\n{RUN}").removeprefix(HEAD), "    ") + "    return Net\n",
    "whatever it is given": net("@torch.no_grad()\ndef forward(self, *args):\n    return torch.cat(args)"),
    "inputs beside sizes": net("@torch.no_grad()\ndef forward(self, feats: list[torch.Tensor], strides: list[int]):\n    return torch.cat([feat * stride for stride, (at, feat) in zip(strides, enumerate(feats))])"),
    "cast like another": net("@torch.no_grad()\ndef forward(self, x, like):\n    return x.to(like)"),
    "numbers of a tensor": net("@torch.no_grad()\ndef forward(self, x):\n    return self.score(self.layer(x)).tolist()"),
    "a dictionary of tensors": net("@torch.no_grad()\ndef forward(self, batch: dict[str, torch.Tensor]):\n    return batch['x'] * 2"),
    "a tensor or a number": net("@torch.no_grad()\ndef forward(self, x: torch.Tensor | float = 1.0):\n    return x * 2"),
    "a part called by a method": HEAD + "class Net(nn.Module):\n    def __init__(self, vae):\n        super().__init__()\n        self.vae = vae\n    @torch.no_grad()\n    def forward(self, ids):\n        return self.vae.decode(ids)[0]\n",
    "a class under with": HEAD + "with nullcontext():\n" + indent(net(f"@torch.no_grad()\n{RUN}").removeprefix(HEAD), "    "),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPPED)
def test_a_stopped_forward_is_an_error(case: str, findings: Callable[[str], list[Finding]]) -> None:
    worst = min((SEVERITIES.index(each.severity) for each in findings(STOPPED[case])), default=None)
    assert worst == 0


FLOWING = {
    "a closure handed out": net("@torch.no_grad()\ndef make(self):\n    def run(x):\n        return self.layer(x)\n    return run\ndef forward(self, x):\n    return self.make()(x)"),
    "a lambda handed out": net("@torch.no_grad()\ndef make(self):\n    return lambda x: self.layer(x)\ndef forward(self, x):\n    return self.make()(x)"),
    "a function never called": net("def forward(self, x):\n    def go(z):\n        with torch.no_grad():\n            return self.layer(z)\n    return self.layer(x)"),
    "the mode that is on": net("def forward(self, x):\n    with torch.set_grad_enabled(torch.is_grad_enabled()):\n        return self.layer(x)"),
    "the mode of training": net("def forward(self, x):\n    with torch.set_grad_enabled(self.training):\n        return self.layer(x)"),
    "what requires it": net("def forward(self, x):\n    with nullcontext() if x.requires_grad else torch.no_grad():\n        return self.layer(x)"),
    "off and on for an index": net("def forward(self, x):\n    torch.set_grad_enabled(False)\n    best = x.argmax()\n    torch.set_grad_enabled(True)\n    return self.layer(x)[best]"),
    "a table of settings": net("def forward(self, x, scale: float, sigma=1.0):\n    with torch.no_grad():\n        table = torch.linspace(0, 1, 4) * scale / sigma\n    return self.layer(x) * table"),
    "a table cast like the input": net("def forward(self, x):\n    with torch.no_grad():\n        table = torch.arange(4.0).to(x).expand_as(x)\n    return self.layer(x) * table"),
    "sizes that are gathered": net("@torch.no_grad()\ndef forward(self, *args: int):\n    return torch.cat(args)"),
    "sizes beside inputs": net("@torch.no_grad()\ndef anchors(self, feats: tuple[torch.Tensor, ...], strides: tuple[int, ...]):\n    return torch.cat([torch.arange(feat.shape[-1]) * stride for feat, stride in zip(feats, strides)])\ndef forward(self, feats, strides):\n    return self.layer(feats[0]) + self.anchors(feats, strides)"),
    "the number of an input": net("@torch.no_grad()\ndef places(self, feats: list[torch.Tensor]):\n    out = []\n    for at, feat in enumerate(feats):\n        out.append(torch.ones(4) * at)\n    return torch.cat(out)\ndef forward(self, feats):\n    return self.layer(feats[0]) + self.places(feats)"),
    "a number in a tensor": net("def forward(self, x):\n    with torch.no_grad():\n        most = bound(self.layer(x)).item()\n        table = torch.clamp(torch.ones(4), max=most)\n    return self.layer(x) * table"),
    "a number or infinity": net("def forward(self, x):\n    if self.training:\n        most = torch.inf\n    else:\n        most = bound(self.layer(x)).item()\n    with torch.no_grad():\n        table = torch.clamp(torch.ones(4), max=most)\n    return self.layer(x) * table"),
    "a stack that is closed": net("def forward(self, x):\n    with ExitStack() as stack:\n        stack.enter_context(torch.no_grad())\n        n = x.shape\n    return self.layer(x)"),
}  # fmt: skip


@pytest.mark.parametrize("case", FLOWING)
def test_a_flowing_forward_is_neither_error_nor_warning(case: str, findings: Callable[[str], list[Finding]]) -> None:
    assert [each for each in findings(FLOWING[case]) if each.severity != "note"] == []


GETS_PAST = {
    "a scale": "with torch.no_grad():\n    scale = self.layer(x)\nreturn self.layer(x) * scale",
    "alone if a setting says so": "with torch.no_grad():\n    root = x.exp()\nif not self.polish:\n    return root, 1\nreturn root - (root * x - 1) / x",
    "values matched anew": "with torch.no_grad():\n    best = x.topk(2).values\nif x.requires_grad:\n    best = x.gather(0, best.sort().values)\nreturn best * 2",
}
LOST = {
    "a layer of its own": "with torch.no_grad():\n    y = self.layer(x)\nreturn x + y",
    "an item of a dictionary": "logits = self.layer(x)\nwith torch.no_grad():\n    score = logits.softmax(-1)\nreturn {'logits': logits, 'score': score}",
    "an item set": "out = {}\nout['logits'] = self.layer(x)\nwith torch.no_grad():\n    score = out['logits'].softmax(-1)\nout['score'] = score\nreturn out",
    "one of two": "logits = self.layer(x)\nwith torch.no_grad():\n    score = logits.softmax(-1)\nreturn logits, score",
    "alone on both ways": "with torch.no_grad():\n    y = x.exp()\nif self.fine:\n    out = {'x': x * 2, 'y': y}\nelif self.coarse:\n    out = {'x': x, 'y': y}\nelse:\n    raise ValueError\nreturn out",
    "a field": "logits = self.layer(x)\nwith torch.no_grad():\n    score = logits.softmax(-1)\nreturn Output(logits=logits, score=score)",
}


def test_what_gets_past_a_region_in_part_is_a_warning(findings: Callable[[str], list[Finding]]) -> None:
    """As in a trace, where such a source is partial; a part of the result that is lost whole is an error."""
    for cases, severity in ((GETS_PAST, "warning"), (LOST, "error")):
        for case, body in cases.items():
            found = findings(net("def forward(self, x):\n" + indent(body, "    ")))
            assert (case, [each.severity for each in found]) == (case, [severity])


def test_what_is_kept_on_self_may_come_back(findings: Callable[[str], list[Finding]]) -> None:
    body = "def forward(self, x):\n    self.kept = []\n    for _ in range(2):\n        with torch.no_grad():\n            y = self.layer(x)\n        self.kept.append([y, 1])\n    return self.layer(self.kept[0][0])"
    assert [each.severity for each in findings(net(body))] == ["error"]


def test_a_forward_that_generates_under_a_condition_may_train_otherwise(
    findings: Callable[[str], list[Finding]],
) -> None:
    body = "@torch.no_grad()\ndef generate_step(self, x):\n    return self.layer(x)\ndef forward(self, x, config=None):\n    if config is not None:\n        return self.generate_step(x)\n    return self.layer(x)"
    assert [each.severity for each in findings(net(body))] == ["warning"]


def test_a_loss_may_prepare_without_gradients_but_not_consist_of_it(findings: Callable[[str], list[Finding]]) -> None:
    matched = "def compute_loss(self, x, y):\n    with torch.no_grad():\n        weight = self.layer(x)\n    return (self.layer(x) - y) * weight\n"
    stopped = "def forward(self, x, y):\n    with torch.no_grad():\n        a, b = self.layer(x), self.layer(y)\n    return (a - b).abs()\n"
    assert {
        each.severity
        for each in findings(net(matched + "def forward(self, x, y):\n    return self.compute_loss(x, y)"))
    } == {"note"}
    assert {each.severity for each in findings(net(stopped).replace("Net", "PerceptualLoss"))} == {"error"}


def test_the_other_way_round_training_is_stopped(findings: Callable[[str], list[Finding]]) -> None:
    body = "def forward(self, x):\n    with torch.no_grad() if self.training else nullcontext():\n        return self.layer(x)"
    assert [each.severity for each in findings(net(body))] == ["warning"]


SUSPENDED = {
    "a value is taken back": "def stream(self, x):\n    with torch.no_grad():\n        while True:\n            x = yield self.layer(x)\n",
    "awaited for a value": "async def run(self, x):\n    with torch.no_grad():\n        y = await self.fetch(x)\n    return y\n",
    "awaited in a loop": "async def run(self, x):\n    with torch.no_grad():\n        async for y in x:\n            self.y = y\n",
}


@pytest.mark.parametrize("case", SUSPENDED)
def test_a_region_that_is_suspended_leaks_once(case: str, findings: Callable[[str], list[Finding]]) -> None:
    assert [each.rule for each in findings(net(SUSPENDED[case]))].count("GS107") == 1


OPERATIONS = {
    "torch.detach": ("return torch.detach(self.layer(x))", "GS201", "warning"),
    "new_tensor": ("return x.new_tensor(self.layer(x))", "GS203", "warning"),
    "float of a tensor": ("return x * float(self.layer(x).sum())", "GS302", "note"),
    "to an integer type": ("return self.layer(x).to(torch.int64)", "GS403", "note"),
    "type of an integer": ("return self.layer(x).type(torch.long)", "GS403", "note"),
    "a hard mask": ("return (self.layer(x) > 0).float()", "GS402", "note"),
    "checkpoint, imported": ("return checkpoint(self.layer, x, use_reentrant=True)", "GS604", "note"),
    "checkpoint, by default": ("return checkpoint(self.layer, x)", "GS604", "note"),
    "frozen by keyword": ("self.layer.requires_grad_(requires_grad=False)\nreturn self.layer(x)", "GS901", "note"),
    "frozen whole": ("self.requires_grad_(False)\nreturn self.layer(x)", "GS901", "note"),
}


@pytest.mark.parametrize("case", OPERATIONS)
def test_operations_without_a_switch_in_the_file(case: str, findings: Callable[[str], list[Finding]]) -> None:
    body, rule, severity = OPERATIONS[case]
    found = findings(net("def forward(self, x):\n" + indent(body, "    ")))
    assert [(each.rule, each.severity) for each in found] == [(rule, severity)]


def test_a_cache_filled_in_inference_mode_is_named_where_forward_reads_it(
    findings: Callable[[str], list[Finding]],
) -> None:
    warm = "@torch.inference_mode()\ndef warm(self, x):\n    self.cache[0] = self.layer(x)\n"
    read = "def forward(self, x):\n    return self.layer(x) * self.cache[0]"
    used = [each for each in findings(net(warm + read)) if each.rule == "GS602"]
    unused = [each for each in findings(net(warm + RUN)) if each.rule == "GS602"]
    assert [(each.severity, each.line) for each in used] == [("warning", 11)]
    assert [each.severity for each in unused] == ["note"]
    off = read.replace("def", "@torch.inference_mode()\ndef", 1)
    assert [each.severity for each in findings(net(warm + off)) if each.rule == "GS602"] == ["note"]
    no_grad = findings(net((warm + read).replace("inference_mode", "no_grad")))
    assert "GS602" not in {each.rule for each in no_grad}


CUSTOM = "{}\ndef op(x: torch.Tensor) -> torch.Tensor:\n    return x.clone()\n"


def test_custom_operators(findings: Callable[[str], list[Finding]]) -> None:
    bare = "import torch\nfrom torch.library import custom_op\n" + CUSTOM.format("@custom_op('a::b', mutates_args=())")
    guarded = "import torch\nif True:\n" + indent(
        CUSTOM.format("@torch.library.custom_op('a::b', mutates_args=())"), "    "
    )
    assert [each.rule for each in findings(bare)] == [each.rule for each in findings(guarded)] == ["GS502"]
    assert findings(bare + "torch.library.register_autograd(\n    'a::b', lambda c, g: g)\n") == []
    assert findings(bare + "op.register_autograd(lambda c, g: g)\n") == []


def test_an_imported_function_class_is_read_with_its_backward(findings: Callable[[str], list[Finding]]) -> None:
    head = "import torch\nfrom torch.autograd import Function\nclass Q(Function):\n    @staticmethod\n    def forward(ctx, x):\n        return x.floor()\n"
    backward = "    @staticmethod\n    def backward(ctx, g):\n        return g\n"
    assert [each.rule for each in findings(head)] == ["GS501"]
    assert [each.rule for each in findings(head + backward) if each.rule == "GS501"] == []


IGNORES = {
    "in a statement over lines": (
        "with (  # gradscope: ignore[GS104]\n        nullcontext(),\n        torch.no_grad(),\n    ):",
        True,
    ),
    "above it": (
        "# gradscope: ignore[GS104]\n    with (\n        nullcontext(),\n        torch.no_grad(),\n    ):",
        True,
    ),
    "behind the line before": ("y = 1  # gradscope: ignore[GS104]\n    with torch.no_grad():", False),
    "with an empty line between": ("# gradscope: ignore[GS104]\n\n    with torch.no_grad():", False),
}


@pytest.mark.parametrize("case", IGNORES)
def test_an_ignore_comment_is_about_one_statement(case: str, findings: Callable[[str], list[Finding]]) -> None:
    text, hides = IGNORES[case]
    found = findings(net(f"def forward(self, x):\n    {text}\n        return self.layer(x)"))
    assert [each.rule for each in found] == ([] if hides else ["GS104"])


def test_a_method_picked_under_a_switch_is_called(findings: Callable[[str], list[Finding]]) -> None:
    body = f"@torch.no_grad()\ndef sample(self):\n    run = self._quiet if self.flag else self._loud\n    return run(4)\ndef _loud(self, n):\n    return self.layer(torch.randn(n, 4))\n{QUIET}{RUN}"
    assert [(each.function, each.severity) for each in findings(net(body))] == [("Net.sample", "warning")]


ANOTHER_WAY = {
    "a switch that a flag decides": "def forward(self, x):\n    if self.flag:\n        with torch.no_grad():\n            return self.layer(x)\n    return self.layer(x)",
    "a side result": "def forward(self, x):\n    with torch.no_grad():\n        scale = self.layer(x)\n    return self.layer(x) * scale",
    "an abstract forward": "def forward(self, x):\n    raise NotImplementedError",
}


@pytest.mark.parametrize("case", ANOTHER_WAY)
def test_an_inference_method_is_no_error_beside_a_forward_that_lets_a_gradient_past(
    case: str, findings: Callable[[str], list[Finding]]
) -> None:
    generate = "@torch.no_grad()\ndef generate(self, x):\n    return self.layer(x)\n"
    found = {each.function: each.severity for each in findings(net(generate + ANOTHER_WAY[case]))}
    assert found["Net.generate"] == "warning"
    shut = findings(net(generate + "@torch.no_grad()\ndef forward(self, x):\n    return self.layer(x)"))
    assert {each.severity for each in shut} == {"error"}


def test_atoms_do_not_grow_with_the_calls(findings: Callable[[str], list[Finding]]) -> None:
    steps = "\n".join(f"    x, y = self.f{n}(x, y), self.g{n}(y, x)" for n in range(40))
    found = findings(net(f"@torch.no_grad()\ndef forward(self, x, y):\n{steps}\n    return x"))
    assert [each.severity for each in found] == ["error"]
