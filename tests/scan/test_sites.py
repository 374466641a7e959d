# ruff: noqa: E501 - the sources under test stay on one line
"""Every way of writing a site, and the look-alikes beside it, on small sources that are never imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from gradscope.findings import Finding
from gradscope.scanning.scanner import scan

HEAD = "import torch\nfrom torch import nn\nimport functools\nfrom contextlib import nullcontext, ExitStack\n"
MODULE = """
class Net(nn.Module):
    def __init__(self, flag=True):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.flag = flag

"""


@pytest.fixture
def findings(tmp_path: Path) -> Callable[[str], list[Finding]]:
    def run(source: str) -> list[Finding]:
        path = tmp_path / "net.py"
        path.write_text(source)
        return scan(str(path), cache=False).findings

    return run


def method(body: str, decorator: str = "", head: str = HEAD, name: str = "forward") -> str:
    """Return a module class with one compute method."""
    text = dedent(body).strip("\n")
    lines = [
        *([decorator] if decorator else []),
        f"def {name}(self, x):",
        *(f"    {line}" for line in text.split("\n")),
    ]
    return head + MODULE + "\n".join(f"    {line}" for line in lines) + "\n"


RUN = "return self.layer(x)"
UNDER = """
with {}:
    y = self.layer(x)
return y
"""

DECORATORS = {
    "called": ("@torch.no_grad()", "GS102"),
    "bare": ("@torch.no_grad", "GS102"),
    "inference": ("@torch.inference_mode()", "GS101"),
    "inference bare": ("@torch.inference_mode", "GS101"),
    "autograd": ("@torch.autograd.no_grad()", "GS102"),
    "grad_mode": ("@torch.autograd.grad_mode.no_grad()", "GS102"),
    "set false": ("@torch.set_grad_enabled(False)", "GS105"),
    "partial": ("@functools.partial(torch.inference_mode, mode=True)()", "GS101"),
    "chosen": ("@(torch.inference_mode() if hasattr(torch, 'inference_mode') else torch.no_grad())", "GS101"),
    "getattr": ("@getattr(torch, 'no_grad')()", "GS102"),
    "over enable, which inference_mode outlasts": ("@torch.inference_mode()\n    @torch.enable_grad()", "GS101"),
}


@pytest.mark.parametrize("case", DECORATORS)
def test_a_decorator_is_found_at_its_line(case: str, findings: Callable[[str], list[Finding]]) -> None:
    decorator, rule = DECORATORS[case]
    source = method(RUN, decorator)
    errors = [finding for finding in findings(source) if finding.severity == "error"]
    line = next(n for n, text in enumerate(source.split("\n"), 1) if text.strip().startswith("@"))
    assert [(each.rule, each.line, each.function) for each in errors] == [(rule, line, "Net.forward")]
    assert errors[0].source == decorator.split("\n")[0]


ALIASES = {
    "as": ("import torch as th\nfrom torch import nn\n", "@th.no_grad()", "GS102"),
    "from": ("from torch import nn, no_grad\n", "@no_grad()", "GS102"),
    "renamed": ("from torch import nn, inference_mode as fast\n", "@fast()", "GS101"),
    "module": ("import torch.autograd.grad_mode as gm\nfrom torch import nn\n", "@gm.no_grad()", "GS102"),
    "assigned": (HEAD + "infer = torch.inference_mode\n", "@infer()", "GS101"),
    "fallback": (HEAD + "try:\n"
                 "    from torch import inference_mode as mode\nexcept ImportError:\n    mode = torch.no_grad\n",
                 "@mode()", "GS101"),
}  # fmt: skip


@pytest.mark.parametrize("case", ALIASES)
def test_another_name_is_followed(case: str, findings: Callable[[str], list[Finding]]) -> None:
    head, decorator, rule = ALIASES[case]
    errors = [finding for finding in findings(method(RUN, decorator, head)) if finding.severity == "error"]
    # An alias of a switch is the package's own name for it, and so a wrapper.
    assert [each.rule for each in errors] in ([rule], ["GS106"])


BLOCKS = {
    "plain": ("torch.no_grad()", "GS104", "error"),
    "inference": ("torch.inference_mode()", "GS103", "error"),
    "inference true": ("torch.inference_mode(mode=True)", "GS103", "error"),
    "set false": ("torch.set_grad_enabled(False)", "GS105", "error"),
    "set keyword": ("torch.set_grad_enabled(mode=False)", "GS105", "error"),
    "combined": ("torch.autocast('cpu'), torch.no_grad()", "GS104", "error"),
    "no_grad inside inference_mode(False)": ("torch.inference_mode(False), torch.no_grad()", "GS104", "error"),
    "conditional": ("torch.no_grad() if self.flag else nullcontext()", "GS104", "warning"),
    "set by a flag": ("torch.set_grad_enabled(self.flag)", "GS105", "warning"),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_a_block_is_found(case: str, findings: Callable[[str], list[Finding]]) -> None:
    switch, rule, severity = BLOCKS[case]
    found = findings(method(UNDER.format(switch)))
    assert [(each.rule, each.severity) for each in found] == [(rule, severity)]


OTHER_FORMS = {
    "exit stack": (
        "with ExitStack() as stack:\n    stack.enter_context(torch.no_grad())\n    return self.layer(x)",
        "GS104",
    ),
    "alias": ("guard = torch.no_grad()\nwith guard:\n    return self.layer(x)", "GS104"),
    "alias of the class": ("guard = torch.no_grad\nwith guard():\n    return self.layer(x)", "GS104"),
    "bare call": ("torch.set_grad_enabled(False)\nreturn self.layer(x)", "GS105"),
    "private call": ("torch._C._set_grad_enabled(False)\nreturn self.layer(x)", "GS105"),
    "return inside": ("with torch.no_grad():\n    return self.layer(x)", "GS104"),
    "tuple": ("with torch.no_grad():\n    y, z = self.layer(x), 1\nreturn y", "GS104"),
    "list": ("out = []\nwith torch.no_grad():\n    out.append(self.layer(x))\nreturn out", "GS104"),
    "loop": ("for _ in range(3):\n    with torch.no_grad():\n        x = self.layer(x)\nreturn x", "GS104"),
}


@pytest.mark.parametrize("case", OTHER_FORMS)
def test_other_forms(case: str, findings: Callable[[str], list[Finding]]) -> None:
    body, rule = OTHER_FORMS[case]
    assert [(each.rule, each.severity) for each in findings(method(body))] == [(rule, "error")]


LOOK_ALIKES = {
    "inference off": UNDER.format("torch.inference_mode(False)"),
    "enabled": UNDER.format("torch.enable_grad()"),
    "set true": UNDER.format("torch.set_grad_enabled(True)"),
    "undone": UNDER.format("torch.no_grad(), torch.enable_grad()"),
    "a name of its own": UNDER.format("self.no_grad()"),
    "a string": "note = 'torch.no_grad()'\nreturn self.layer(x)",
    "a comment": "# with torch.no_grad():\nreturn self.layer(x)",
    "an attribute": "if self.config.inference_mode:\n    pass\nreturn self.layer(x)",
    "never entered": "torch.no_grad()\nreturn self.layer(x)",
    "only shapes": "with torch.no_grad():\n    n = x.shape[0]\nreturn self.layer(x) * n",
    "only an index": "with torch.no_grad():\n    best = x.argmax(-1)\nreturn self.layer(x)[best]",
    "not used": "with torch.no_grad():\n    y = self.layer(x)\nreturn self.layer(x)",
    "fresh numbers": "with torch.no_grad():\n    noise = torch.randn_like(x)\nreturn self.layer(x + noise)",
    "outside training": "if not self.training:\n    with torch.no_grad():\n        return self.layer(x)\nreturn self.layer(x)",
    "targets": "with torch.no_grad():\n    targets = self.layer(x)\nreturn self.layer(x) - targets",
}


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_a_look_alike_is_no_error_and_no_warning(case: str, findings: Callable[[str], list[Finding]]) -> None:
    assert [each for each in findings(method(LOOK_ALIKES[case])) if each.severity != "note"] == []


def test_stacking_the_innermost_decides(findings: Callable[[str], list[Finding]]) -> None:
    on = method(RUN, "@torch.no_grad()\n    @torch.enable_grad()")
    off = method(RUN, "@torch.enable_grad()\n    @torch.no_grad()")
    assert findings(on) == []
    assert [each.rule for each in findings(off)] == ["GS102"]


def test_async_and_class_decorators_do_less_than_they_seem(findings: Callable[[str], list[Finding]]) -> None:
    coroutine = HEAD + MODULE + "    @torch.no_grad()\n    async def forward(self, x):\n        return self.layer(x)\n"
    whole = HEAD + "@torch.no_grad()" + MODULE + "    def forward(self, x):\n        return self.layer(x)\n"
    poisoned = whole.replace("no_grad", "inference_mode")
    assert [each.severity for each in findings(coroutine)] == ["note"]
    assert [each.severity for each in findings(whole)] == ["note"]
    assert [each.severity for each in findings(poisoned)] == ["warning"]


def test_a_region_that_yields_leaks(findings: Callable[[str], list[Finding]]) -> None:
    body = "with torch.no_grad():\n    for part in x:\n        yield self.layer(part)"
    assert "GS107" in {each.rule for each in findings(method(body, name="stream"))}
    decorated = method("for part in x:\n    yield self.layer(part)", "@torch.no_grad()", name="stream")
    assert "GS107" not in {each.rule for each in findings(decorated)}


def test_switched_off_at_import(findings: Callable[[str], list[Finding]]) -> None:
    off = findings("import torch\ntorch.set_grad_enabled(False)\n")
    assert [(each.rule, each.severity, each.line) for each in off] == [("GS105", "error", 2)]
    guarded = "import torch\nif __name__ == '__main__':\n    torch.set_grad_enabled(False)\n"
    in_a_string = 'import torch\nEXAMPLE = """\ntorch.set_grad_enabled(False)\n"""\n'
    assert findings(guarded) == findings(in_a_string) == []


WRAPPERS = {
    "factory": (
        "def quiet(on=True):\n    def decorate(fn):\n        return (torch.inference_mode if on else torch.no_grad)()(fn)\n"
        "    return decorate\n", "@quiet()"),
    "by hand": (
        "def quiet(fn):\n    @functools.wraps(fn)\n    def inner(*args, **kwargs):\n        with torch.no_grad():\n"
        "            return fn(*args, **kwargs)\n    return inner\n", "@quiet"),
    "subclass": ("class quiet(torch.no_grad):\n    pass\n", "@quiet()"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPERS)
def test_a_wrapper_counts_where_it_is_used(case: str, findings: Callable[[str], list[Finding]]) -> None:
    definition, decorator = WRAPPERS[case]
    source = method(RUN, decorator, HEAD + definition)
    found = [each for each in findings(source) if each.severity != "note"]
    assert [(each.rule, each.severity) for each in found] == [("GS106", "error")]
    assert found[0].source == decorator


NO_WRAPPERS = {
    "a hook that is made": "def quiet(layer):\n    @torch.no_grad()\n    def hook(module, inputs, output):\n        return layer.weight * output\n    return hook\n",
    "a sampler that is made": "def quiet(layer):\n    def sample(z):\n        x = z * 2\n        with torch.no_grad():\n            y = layer(x)\n        return y\n    return sample\n",
    "a server one can enter": "class quiet:\n    def __enter__(self):\n        return self\n\n    @torch.no_grad()\n    def run(self, x):\n        return self.policy(x)\n",
}


@pytest.mark.parametrize("case", NO_WRAPPERS)
def test_what_only_holds_a_switch_is_no_wrapper(case: str, findings: Callable[[str], list[Finding]]) -> None:
    source = method("quiet(self.layer)\nreturn self.layer(x)", head=HEAD + NO_WRAPPERS[case])
    assert [each.rule for each in findings(source)] == ["GS104" if "with" in NO_WRAPPERS[case] else "GS102"]


def test_a_manager_that_enters_a_switch_by_hand(findings: Callable[[str], list[Finding]]) -> None:
    head = HEAD + (
        "class quiet:\n    def __enter__(self):\n        self.mode = torch.no_grad()\n        self.mode.__enter__()\n\n"
        "    def __exit__(self, *error):\n        self.mode.__exit__(*error)\n"
    )
    found = findings(method(UNDER.format("quiet()"), head=head))
    assert [(each.rule, each.severity) for each in found] == [("GS106", "error")]


@pytest.mark.parametrize(
    "body",
    [
        "with torch.no_grad():\n        yield",
        "with ExitStack() as stack:\n        stack.enter_context(mode())\n        stack.enter_context(torch.no_grad())\n        yield",
    ],
)
def test_a_context_manager_of_the_package(findings: Callable[[str], list[Finding]], body: str) -> None:
    head = HEAD + f"from contextlib import ExitStack, contextmanager\n\n@contextmanager\ndef quiet():\n    {body}\n"
    found = findings(method(UNDER.format("quiet()"), head=head))
    assert [(each.rule, each.severity) for each in found] == [("GS106", "error")]


OPERATIONS = {
    "detach": ("return self.layer(x).detach()", "GS201", "warning"),
    "data": ("y = self.layer(x)\nreturn y.data", "GS202", "warning"),
    "rewrapped": ("y = self.layer(x)\nreturn torch.tensor(y)", "GS203", "warning"),
    "force": ("e = self.layer(x).sum()\nreturn torch.autograd.grad(e, x)[0]", "GS207", "warning"),
    "force, said so": (
        "e = self.layer(x).sum()\nreturn torch.autograd.grad(e, x, create_graph=False)[0]",
        "GS207",
        "warning",
    ),
    "jacobian": ("return torch.autograd.functional.jacobian(self.layer, x)", "GS207", "warning"),
    "saliency": ("y = self.layer(x)\nself.log('s', torch.autograd.grad(y.sum(), x)[0])\nreturn y", "GS207", "note"),
    "numpy": ("y = self.layer(x)\nreturn torch.from_numpy(y.numpy())", "GS301", "warning"),
    "detach for the log": ("y = self.layer(x)\nself.log('m', y.detach())\nreturn y", "GS201", "note"),
    "straight through": ("q = self.layer(x)\nreturn x + (q - x).detach()", "GS201", "note"),
    "item": ("y = self.layer(x)\nprint(y.item())\nreturn y", "GS302", "note"),
    "argmax": ("y = self.layer(x)\nreturn y, y.argmax(-1)", "GS401", "note"),
    "frozen": ("self.layer.requires_grad_(False)\nreturn self.layer(x)", "GS901", "note"),
}


@pytest.mark.parametrize("case", OPERATIONS)
def test_operations_on_tensors(case: str, findings: Callable[[str], list[Finding]]) -> None:
    body, rule, severity = OPERATIONS[case]
    found = {each.rule: each.severity for each in findings(method(body))}
    assert found[rule] == severity
    assert [level for level in found.values() if level == "error"] == []


@pytest.mark.parametrize("kept", ["create_graph=True", "create_graph=self.training", "**options"])
def test_a_derivative_with_a_graph_is_not_reported(kept: str, findings: Callable[[str], list[Finding]]) -> None:
    body = f"e = self.layer(x).sum()\nreturn torch.autograd.grad(e, x, {kept})[0]"
    assert findings(method(body, head=HEAD + "options = dict(create_graph=True)\n\n")) == []


def test_a_derivative_imported_by_its_name(findings: Callable[[str], list[Finding]]) -> None:
    body = "e = self.layer(x).sum()\nforces = grad(e, x)\nreturn forces[0]"
    (found,) = findings(method(body, head=HEAD + "from torch.autograd import grad\n\n"))
    assert (found.rule, found.source) == ("GS207", "forces = grad(e, x)")


def test_what_only_looks_like_a_tensor_is_not_reported(findings: Callable[[str], list[Finding]]) -> None:
    source = HEAD + dedent("""
        import numpy as np
        import pandas as pd

        def load(path, batch):
            table = pd.read_csv(path)
            array = np.asarray(table.data)
            first = array.item(), array.tolist(), table["a"].round(2), batch.data
            return {key: value for key, value in dict(first=first).items()}, path.data, path.item()

        def capped(x: torch.Tensor):
            return x.clamp(max=torch.tensor(6, dtype=dtype_of(x), device=torch.get_device(x)))
        """)
    assert findings(source) == []


def test_an_autograd_function_without_backward(findings: Callable[[str], list[Finding]]) -> None:
    source = HEAD + dedent("""
        class Quiet(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, grad):
                return None

        class Fine(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, n):
                return x * n

            @staticmethod
            def backward(ctx, grad):
                return grad, None
        """)
    assert [(each.rule, each.function) for each in findings(source)] == [("GS501", "Quiet")]


def test_a_parameter_is_one_where_nothing_else_of_its_class_is_read(findings: Callable[[str], list[Finding]]) -> None:
    source = HEAD + dedent("""
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(2))
                self.shift: nn.Parameter = torch.nn.Parameter(torch.zeros(2))
                self.step = torch.ones(2)

            def forward(self, x):
                kept = x * self.step.detach()
                angles = torch.tensor([self.shift.cos(), self.shift.sin()])
                return kept * self.scale.detach() + angles
        """)
    found = [(each.rule, each.severity, each.source[:7]) for each in findings(source) if each.severity != "note"]
    assert found == [("GS203", "warning", "angles "), ("GS201", "warning", "return ")]


def test_a_parameter_made_in_passing_is_found_though_nothing_else_of_the_file_is_looked_for(
    findings: Callable[[str], list[Finding]],
) -> None:
    source = HEAD + dedent("""
        class Normalizer(nn.Module):
            def __init__(self, size: int):
                super().__init__()
                self.mean = nn.Parameter(torch.zeros(size))

            def moved(self, device):
                self.mean = nn.Parameter(self.mean.to(device))
                return self
        """)
    assert [(each.rule, each.function) for each in findings(source)] == [("GS203", "Normalizer.moved")]
    assert findings(source.replace("moved", "load_weights")) == []


def test_of_a_constructor_only_what_stops_a_gradient_and_what_it_keeps_are_looked_at(
    findings: Callable[[str], list[Finding]],
) -> None:
    source = HEAD + dedent("""
        class Scaled(nn.Module):
            def __init__(self, start, gain: torch.Tensor, size: int):
                super().__init__()
                self.gamma = nn.Parameter(start * gain)
                self.layer = nn.Linear(size, size)
                {}

            @torch.no_grad()
            def encode(self, x):
                return self.layer(x) * self.gamma
        """)
    bare = findings(source.format("pass"))
    assert [(each.rule, each.severity) for each in bare] == [("GS102", "error")]
    for more, rule in {
        "self.layer.requires_grad_(False)": "GS901",
        "with torch.no_grad(): self.start = self.layer(gain)": "GS104",
    }.items():
        assert rule in [each.rule for each in findings(source.format(more)) if each.function == "Scaled.__init__"]


def test_a_function_made_in_a_constructor_and_kept_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    source = HEAD + dedent("""
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)
                def run(x):
                    return self.encode(x)
                self.run = run

            @torch.no_grad()
            def encode(self, x):
                return self.layer(x)

            def forward(self, x):
                return self.run(x)
        """)
    path.write_text(source)
    found = scan(str(path), cache=False)
    assert [(each.rule, each.severity) for each in found.findings] == [("GS102", "error")]
    assert [step["function"] for entry in found.entries if entry["function"] == "Net.forward" for step in entry["chain"]] == [
        "Net.forward", "Net.__init__.run", "Net.encode"
    ]  # fmt: skip


def test_what_is_shown_in_an_error_or_only_checked_is_no_site(findings: Callable[[str], list[Finding]]) -> None:
    body = """
        y = self.layer(x)
        assert y.max().item() < 9, y.tolist()
        if self.flag:
            raise ValueError(f"{y.detach()} is {float(y.sum())}")
        return y
        """
    assert findings(method(body)) == []
    assert [each.rule for each in findings(method(body.replace("return y", "return y * y.max().item()")))] == ["GS302"]


def test_tensors_and_parameters_made_anew_in_passing(findings: Callable[[str], list[Finding]]) -> None:
    body = "y = self.layer(x)\nboth = torch.as_tensor([y.mean(), y.sum()])\nweight = nn.Parameter(y)\nreturn both.sum() * weight"
    assert [(each.rule, each.severity) for each in findings(method(body))] == [("GS203", "warning")] * 2
    fine = "return torch.as_tensor(self.layer(x)), torch.as_tensor([x.shape[0]])"
    assert findings(method(fine)) == []


@pytest.mark.parametrize(
    "given", ["[0.5, y.mean()]", "\n    [1, 2, y.sum()]", "[[1.0, -2e-3], [y[0, 0], 1]]", "y, dtype=torch.float32"]
)
def test_a_tensor_of_numbers_and_of_a_tensor(findings: Callable[[str], list[Finding]], given: str) -> None:
    assert [each.rule for each in findings(method(f"y = self.layer(x)\nreturn torch.tensor({given})"))] == ["GS203"]
