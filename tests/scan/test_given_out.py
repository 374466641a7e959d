# ruff: noqa: E501 - sources under test stay on one line
"""What comes out of a stretch without gradients decides: arrays, text and indices carry none with or without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent, indent

import pytest

from gradscope.scanning.scanner import scan

HEAD = """
import numpy as np
import numpy.typing as npt
import torch
from typing import Any, Dict, List, Optional, Tuple
from torch import nn


def nearest(x):
    with torch.no_grad():
        distances = distance(x, x)
        _, index = torch.topk(-distances, k=2)
    return index


def distance(x, y):
    with torch.no_grad():
        return (x[:, None] - y[None]).square().sum(-1)


class Net(nn.Module):
    def __init__(self, frozen=0):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.frozen = frozen
        self.running_mean_std = nn.BatchNorm1d(4, affine=False)
        self.rms = nn.Linear(4, 4)

"""
Gravest = Callable[[str], str]


@pytest.fixture
def gravest(tmp_path: Path) -> Gravest:
    """Return how grave the gravest switch is in a class ``Net`` with these methods."""

    def find(body: str) -> str:
        (tmp_path / "net.py").write_text(HEAD + indent(dedent(body), "    "))
        found = scan(str(tmp_path / "net.py"), cache=False).findings
        return next(each.severity for each in found if each.rule.startswith("GS10"))

    return find


# --- what a function says that it gives --------------------------------------------------------------

NO_TENSORS = (
    "str", "list[str]", "np.ndarray", "List[Dict[str, np.ndarray]]", "list[list[int] | list[float]]", "list[tuple[str, float]]",
    "Optional[np.ndarray]", "list[PIL.Image.Image]", "npt.NDArray[np.float32]", "str | None",
)  # fmt: skip
PERHAPS_TENSORS = (
    "float", "Tuple[float, float]", "dict[str, float]", "Dict[str, Any]", "'torch.Tensor'", "torch.Tensor",
    "tuple[torch.Tensor, np.ndarray]", "tv_tensors.Image", "None", "list", "dict[str, torch.Tensor] | str",
)  # fmt: skip


@pytest.mark.parametrize("note", [*NO_TENSORS, *PERHAPS_TENSORS])
def test_a_forward_that_gives_arrays_or_text_is_none_to_train_with(gravest: Gravest, note: str) -> None:
    expected = "warning" if note in NO_TENSORS else "error"
    assert (
        gravest(f"@torch.no_grad()\ndef forward(self, x) -> {note}:\n    return self.read(self.layer(x))") == expected
    )


def test_what_another_forward_gets_as_text_is_no_error(gravest: Gravest) -> None:
    body = """
        @torch.no_grad()
        def {}(self, x){}:
            return self.read(self.layer(x))

        def forward(self, x):
            return self.layer(x), self.{}(x)
        """
    assert gravest(body.format("spell", " -> list[str]", "spell")) == "warning"
    assert gravest(body.format("transcribe_batch", "", "transcribe_batch")) == "warning"
    assert gravest(body.format("spell", "", "spell")) == "error"


def test_words_that_a_block_decodes_are_no_error(gravest: Gravest) -> None:
    body = """
        def decode(self, x):
            with torch.no_grad():
                {names} = self.read(self.layer(x))
            return {names}

        def forward(self, x):
            return self.decode(x)
        """
    assert gravest(body.format(names="predicted_words, predicted_tokens")) == "warning"
    assert gravest(body.format(names="hyps")) == "warning"
    assert gravest(body.format(names="words, scores")) == "error"


# --- what carries none anyway ------------------------------------------------------------------------

GIVES_NONE = {
    "arrays put together": "def forward(self, x):\n    found = []\n    with torch.no_grad():\n        for each in x:\n            found.append(self.layer(each).cpu().numpy())\n    return np.stack(found)",
    "an array beside the result": "def forward(self, x):\n    with torch.no_grad():\n        shown = self.layer(x).numpy()\n    return self.layer(x), np.round(shown)",
    "indices of a helper": "def forward(self, x):\n    return self.layer(x)[nearest(x)]",
    "regions that are looked at": "def forward(self, x):\n    y = self.layer(x)\n    with torch.no_grad():\n        rois = self.rms(y).sigmoid()\n    return y * rois",
}
GIVES_SOME = {
    "tensors put together": "def forward(self, x):\n    found = []\n    with torch.no_grad():\n        for each in x:\n            found.append(self.layer(each))\n    return torch.stack(found)",
    "a tensor and an array": "def forward(self, x):\n    with torch.no_grad():\n        y = self.layer(x)\n    return y, np.round(y.numpy())",
    "what the helper computes": "def forward(self, x):\n    return distance(self.layer(x), x)",
}


@pytest.mark.parametrize("case", [*GIVES_NONE, *GIVES_SOME])
def test_a_block_is_judged_by_what_is_made_of_it(gravest: Gravest, case: str) -> None:
    """torch is asked first: where only arrays and indices come out, the switch changes nothing."""
    torch = pytest.importorskip("torch")
    body = (GIVES_NONE | GIVES_SOME)[case]
    source = HEAD + indent(body, "    ")

    def grads(source: str) -> list[bool]:
        namespace: dict[str, object] = {}
        exec(compile(source.replace(".numpy()", ".detach().numpy()"), "net", "exec"), namespace)
        torch.manual_seed(0)
        net = namespace["Net"]()  # type: ignore[operator]
        result = net(torch.ones(3, 4))
        parts = result if isinstance(result, tuple) else (result,)
        return [isinstance(part, torch.Tensor) and part.requires_grad for part in parts]

    if case != "regions that are looked at":  # a gradient through them would be there, and is not asked for
        off_and_on = grads(source), grads(source.replace("torch.no_grad()", "torch.enable_grad()"))
        assert (off_and_on[0] == off_and_on[1]) == (case in GIVES_NONE)
    assert gravest(body) == ("note" if case in GIVES_NONE else "error")


def test_what_is_only_shown_beside_a_loss_is_no_part_of_it(gravest: Gravest) -> None:
    body = """
        def training_step(self, x):
            loss = self.layer(x).sum()
            with torch.no_grad():
                shown = self.layer(x).mean()
            self.log("shown", shown)
            return {}
        """
    assert gravest(body.format("{'loss': loss}")) == "note"
    assert gravest(body.format("{'loss': loss + shown}")) == "warning"


# --- what a subclass puts in, and what is run by another name ----------------------------------------

LEFT_OPEN = {
    "raises": ("raise NotImplementedError", "error"), "is abstract": ('"""Of x."""', "error"),
    "is there": ("return self.layer(x)", "error"), "gives a size": ("return x.shape[0]", "note"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OPEN)
def test_a_method_that_is_left_open_may_run_anything(gravest: Gravest, case: str) -> None:
    inside, severity = LEFT_OPEN[case]
    body = """
        def get_features(self, x):
            {}

        @torch.no_grad()
        def forward(self, x):
            return self.get_features(x)
        """
    assert gravest(body.format(inside)) == severity


def test_the_forward_pass_of_a_base_class_runs_a_module(gravest: Gravest) -> None:
    """The integers that it is given carry no gradient; what it makes of them does."""
    body = """
        def embed(self, x):
            return self.layer(x)


    class Child({}):
        def forward(self, input_ids):
            with torch.no_grad():
                states = super().{}(input_ids)
            return states
        """
    assert gravest(dedent(body).format("Net", "embed").lstrip()) == "error"
    assert gravest(dedent(body).format("elsewhere.PreTrainedModel", "forward").lstrip()) == "error"
    assert gravest(dedent(body).format("elsewhere.Settings", "forward").lstrip()) == "note"


def test_a_part_under_a_local_name_is_still_that_part(gravest: Gravest) -> None:
    body = """
        def embed(self, x):
            return x


    class Detector:
        def __init__(self, model, coarse):
            self.model = model
            self.coarse = coarse

        def __call__(self, image: np.ndarray, small=False):
            model = self.coarse if small else self.model
            {}
            with torch.no_grad():
                lines = model(torch.from_numpy(image))[0]
            return lines
        """
    assert gravest(dedent(body).format("").lstrip()) == "warning"
    assert gravest(dedent(body).format("model = len").lstrip()) == "note"


@pytest.mark.parametrize(("base", "severity"), [("lightning.LightningModule", "warning"), ("Engine", "note")])
def test_a_hook_around_the_backward_pass_is_no_backward_by_hand(tmp_path: Path, base: str, severity: str) -> None:
    source = f"""
        import lightning
        import torch
        from torch import nn

        class Engine(nn.Module):
            pass

        class Net({base}):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x):
                return self.layer(x)

            @torch.no_grad()
            def generate(self, x):
                return self.layer(x)

            def backward(self, *args, **kwargs):
                super().backward(*args, **kwargs)
        """
    (tmp_path / "net.py").write_text(dedent(source))
    assert [each.severity for each in scan(str(tmp_path / "net.py"), cache=False).findings] == [severity]


# --- loops, flags and statistics ---------------------------------------------------------------------

LOOP = """
    def forward(self, x):
        start = 0
        for number in {}:
            with torch.no_grad():
                x = self.layers[number](x)
                start = self.frozen
        for number in range(start, len(self.layers)):
            x = {}
        return x
    """


def test_layers_between_two_settings_may_be_none(gravest: Gravest) -> None:
    torch = pytest.importorskip("torch")
    body = LOOP.format("range(start, self.frozen)", "self.layers[number](x)")
    namespace: dict[str, object] = {}
    exec(compile(HEAD + indent(dedent(body), "    "), "net", "exec"), namespace)
    for frozen in (0, 1):
        net = namespace["Net"](frozen)  # type: ignore[operator]
        net(torch.ones(3, 4)).sum().backward()
        assert [each.weight.grad is not None for each in net.layers] == [frozen == 0, True]
    assert gravest(body) == "warning"
    assert gravest(LOOP.format("range(start, self.frozen)", "self.layer(x)")) == "error"
    assert gravest(LOOP.format("range(2)", "self.layers[number](x)")) == "error"


@pytest.mark.parametrize(
    ("flag", "severity"), [("training", "warning"), ("is_train", "warning"), ("is_large", "error")]
)
def test_a_call_that_only_one_mode_makes(gravest: Gravest, flag: str, severity: str) -> None:
    body = f"""
        @torch.no_grad()
        def scale(self, x):
            return self.layers[0](x)

        def forward(self, x, {flag}):
            y = self.layer(x)
            if {flag}:
                return y
            return y + self.scale(y)
        """
    expected = severity if flag == "is_large" else "warning"
    assert (
        gravest(
            body.replace(
                "            return y\n            return",
                "                return y\n            else:\n                return",
            )
        )
        == expected
    )


@pytest.mark.parametrize(("part", "severity"), [("running_mean_std", "note"), ("rms", "error")])
def test_statistics_that_are_counted_are_not_trained(gravest: Gravest, part: str, severity: str) -> None:
    body = f"""
        @torch.no_grad()
        def scaled(self, x):
            return self.{part}(x)

        def forward(self, input_dict):
            return self.layer(self.scaled(input_dict))
        """
    assert gravest(body) == severity


# --- classes inside of others ------------------------------------------------------------------------


def test_half_a_class_may_have_its_way_in_inside_another_class(tmp_path: Path) -> None:
    source = """
        import torch
        from torch import nn

        class Base(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(4)

            def normalise(self, x):
                with torch.no_grad():
                    return self.norm(x)

        class Builder:
            class Network(Base):
                def __init__(self):
                    super().__init__()
                    self.layer = nn.Linear(4, 4)

                def forward(self, x):
                    return self.layer(x) + self.normalise(x)
        """
    (tmp_path / "net.py").write_text(dedent(source))
    found = scan(str(tmp_path / "net.py"), cache=False).findings
    assert [(each.severity, each.chain) for each in found] == [("error", ("Builder.Network.forward", "Base.normalise"))]


def test_a_sinusoidal_table_may_be_kept_as_a_parameter(tmp_path: Path) -> None:
    source = """
        import torch
        from torch import nn

        class SinusoidalPositions(nn.Module):
            def __init__(self, table):
                super().__init__()
                self.weights = nn.Parameter(table)

            @torch.no_grad()
            def forward(self, ids):
                return self.weights.index_select(0, ids)
        """
    (tmp_path / "net.py").write_text(dedent(source))
    assert [each.severity for each in scan(str(tmp_path / "net.py"), cache=False).findings] == ["note"]
    (tmp_path / "net.py").write_text(dedent(source).replace("Sinusoidal", "Learned"))
    assert [each.severity for each in scan(str(tmp_path / "net.py"), cache=False).findings] == ["error"]


def test_what_is_got_from_indices_is_none_of_them(gravest: Gravest) -> None:
    body = """
        def get_codes_from_indices(self, ids):
            return self.layer(ids)

        def forward(self, ids):
            with torch.no_grad():
                found = self.get_codes_from_indices(ids)
            return found
        """
    assert gravest(body) == "error"
    assert gravest(body.replace("codes_from_indices", "code_indices")) == "note"


def test_who_asks_for_codes_takes_no_gradient(gravest: Gravest) -> None:
    body = """
        @torch.no_grad()
        def get_audio_codes(self, x):
            return self.layers[0](x)

        def forward(self, x):
            return self.layer(self.get_audio_codes(x))
        """
    assert gravest(body) == "warning"
    assert gravest(body.replace("codes", "states")) == "error"
