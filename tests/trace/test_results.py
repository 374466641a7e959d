"""Results that are no tensors: numpy arrays, floats, images, and objects of any class that hold tensors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import gradscope
from gradscope.errors import NotAnalysedError

X = torch.ones(2, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)

    @torch.no_grad()
    def to_numpy(self, x: torch.Tensor) -> Any:
        return {"embedding": self.layer(x).cpu().numpy()}

    def to_numpy_detached(self, x: torch.Tensor) -> Any:
        return self.layer(x).detach().numpy()

    def to_list(self, x: torch.Tensor) -> Any:
        return self.layer(x).tolist()

    def to_float(self, x: torch.Tensor) -> float:
        return float(self.layer(x).sum())

    def to_image(self, x: torch.Tensor) -> Any:
        pixels = self.layer(x).clamp(0, 1).mul(255).detach().numpy().astype(np.uint8)
        return [Image.fromarray(pixels)]

    def to_tokens(self, x: torch.Tensor) -> Any:
        return self.layer(x).argmax(-1).tolist()

    def to_ids(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).argmax(-1)


def line_of(method: str, text: str) -> int:
    code = getattr(Model, method).__wrapped__.__code__ if method == "to_numpy" else getattr(Model, method).__code__
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(number for number in range(code.co_firstlineno, len(lines)) if text in lines[number - 1])


@pytest.mark.parametrize(
    ("entry", "rule", "text"),
    [
        ("to_numpy_detached", "GS301", ".numpy()"),
        ("to_list", "GS302", ".tolist()"),
        ("to_float", "GS302", "return float(self"),
        ("to_image", "GS301", ".numpy()"),
    ],
)
def test_a_result_that_left_torch_has_no_gradient_and_the_line_is_named(entry: str, rule: str, text: str) -> None:
    session = gradscope.trace(Model(), X, entry=entry)
    assert session.verdict == "blocked"
    assert [(f.rule, f.line) for f in session.findings] == [(rule, line_of(entry, text))]
    assert session.sources["layer.weight"].status == "blocked"
    assert session.sources["head.weight"].status == "unused"
    assert not session.fix_verified


def test_what_lies_in_front_of_it_is_named_and_proved_as_well() -> None:
    session = gradscope.trace(Model(), X, entry="to_numpy")
    assert [f.rule for f in session.findings] == ["GS102", "GS301"]
    assert [f.verified for f in session.findings] == [True, False]
    assert not session.fix_verified


def test_tokens_never_had_a_gradient() -> None:
    with pytest.raises(NotAnalysedError, match="no floating-point tensor: "):
        gradscope.trace(Model(), X, entry="to_tokens")
    with pytest.raises(NotAnalysedError, match=r"Model\.to_ids returned no floating-point tensor, but 2 int64: "):
        gradscope.trace(Model(), X, entry="to_ids")


class Boxes:
    def __init__(self, data: torch.Tensor) -> None:
        self.data = data


class Detections:
    def __init__(self, boxes: torch.Tensor) -> None:
        self.names = {0: "page"}
        self.boxes = Boxes(boxes)


class Detector(Model):
    def forward(self, x: torch.Tensor) -> Any:
        return [Detections(super().forward(x))]


def test_tensors_deep_in_objects_are_results() -> None:
    session = gradscope.trace(Detector(), X)
    assert session.verdict == "flows"
    assert session.sources["layer.weight"].status == "flows"


class Copying(Model):
    def forward(self, x: torch.Tensor) -> Any:
        frozen = copy.deepcopy(self)
        return self.layer(x) + frozen.head(x)


def test_a_copy_of_one_parameter_is_not_made_of_the_others() -> None:
    session = gradscope.trace(Copying(), X)
    statuses = {name: source.status for name, source in session.sources.items()}
    assert statuses == {"layer.weight": "flows", "layer.bias": "flows", "head.weight": "blocked",
                        "head.bias": "blocked", "input.0": "flows"}  # fmt: skip


class Filling(Model):
    def forward(self, x: torch.Tensor) -> Any:
        return x + torch.full_like(self.head(x), 2.0) * self.layer(x)


def test_a_tensor_filled_with_a_constant_is_made_of_nothing() -> None:
    session = gradscope.trace(Filling(), X)
    assert session.findings == []
    assert session.sources["head.weight"].status == "unused"


class FillingWithItsOwn(Model):
    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x) + torch.full_like(x, self.head(x).sum().item())


def test_unless_the_constant_came_out_of_a_tensor() -> None:
    session = gradscope.trace(FillingWithItsOwn(), X)
    assert session.sources["head.weight"].status == "blocked"
    assert [f.rule for f in session.findings] == ["GS302"]


def test_asking_about_what_is_not_used_is_said() -> None:
    session = gradscope.trace(Model(), X, wrt="head")
    assert {source.status for source in session.sources.values()} == {"unused"}
    assert any("None of the sources" in remark for remark in session.remarks)


class Nested(Model):
    def forward(self, images: list[torch.Tensor], target: dict[str, torch.Tensor]) -> Any:
        return [self.layer(image) * target["scale"] for image in images]


def test_what_went_in_is_said_part_by_part() -> None:
    session = gradscope.trace(Nested(), [X] * 4, target={"scale": torch.ones(2, 1)})
    shape = "x".join(map(str, X.shape))
    assert session.target["inputs"] == [f"[{', '.join([f'{shape} float32'] * 3)}, ...]", "target={scale: 2x1 float32}"]


class Spectrum(nn.Module):
    """Gives out complex numbers, and takes some of them by their angle only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, dtype=torch.complex64)
        self.phase = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.fft.fft(x)) * torch.polar(torch.ones(2, 4), self.phase(x).detach())


@pytest.mark.parametrize("mode", ["real", "auto"])
def test_a_complex_result_can_be_asked_a_gradient_of(mode: str) -> None:
    session = gradscope.trace(Spectrum(), torch.randn(2, 4), mode=mode)
    assert {name: source.status for name, source in session.sources.items()} == {
        "layer.weight": "flows", "layer.bias": "flows", "phase.weight": "blocked", "phase.bias": "blocked",
        "input.0": "partial",
    }  # fmt: skip
    assert [each.rule for each in session.findings] == ["GS201"]


class FreezesTheDiscriminator(nn.Module):
    """The loss of a generator: its critic is frozen in the call, as is a layer that is not used at all."""

    def __init__(self, *, cut: bool = False) -> None:
        super().__init__()
        self.generator, self.critic, self.spare = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 4)
        self.cut = cut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.critic.requires_grad_(False)
        self.spare.requires_grad_(False)
        score = self.critic(self.generator(x))
        return score.detach() * self.generator(x) if self.cut else score


@pytest.mark.parametrize("mode", ["real", "auto"])
def test_a_parameter_that_the_call_freezes_is_frozen_and_not_unused(mode: str) -> None:
    model = FreezesTheDiscriminator()
    session = gradscope.trace(model, torch.randn(2, 4), mode=mode)
    assert session.verdict == "flows" and session.findings == []
    critic, spare = session.sources["critic.weight"], session.sources["spare.weight"]
    assert (critic.status, critic.frozen, spare.status, spare.frozen) == ("flows", True, "unused", True)
    assert "The call itself freezes critic (2), spare (2): no gradient comes there." in session.remarks
    assert all(parameter.requires_grad for parameter in model.parameters())
    session = gradscope.trace(FreezesTheDiscriminator(cut=True), torch.randn(2, 4), mode=mode)
    assert session.sources["critic.weight"].status == "blocked"


class FreezesForAWhile(nn.Module):
    """Freezes a layer while it uses it, or while it does not, or one that is used with a constant only."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how
        self.register_buffer("constant", torch.ones(2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.first.requires_grad_(False)
        if self.how == "before":
            for parameter in self.first.parameters():
                parameter.requires_grad = True
        hidden = self.first(self.constant if self.how == "constant" else x)
        self.first.requires_grad_(self.how != "for good")
        if self.how == "twice":
            hidden = hidden + self.first(x)
        return self.second(x + (hidden.detach() if self.how == "before" else hidden))


FROZEN_MEANWHILE = {
    "while used": ("flows", True),
    "constant": ("flows", True),
    "for good": ("flows", True),
    "before": ("blocked", False),
    "twice": ("flows", False),
}


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("how", FROZEN_MEANWHILE)
def test_a_parameter_that_is_frozen_while_it_is_used_is_frozen(how: str, mode: str) -> None:
    status, frozen = FROZEN_MEANWHILE[how]
    model = FreezesForAWhile(how)
    model(torch.ones(2, 4)).sum().backward()
    assert (model.first.weight.grad is None) == (frozen or status == "blocked")
    session = gradscope.trace(FreezesForAWhile(how), torch.ones(2, 4), mode=mode)
    found = session.sources["first.weight"]
    assert (session.verdict, found.status, found.frozen) == (status, status, frozen)
    assert any("The call itself freezes first (2)" in each for each in session.remarks) == frozen
    assert not any("does not depend" in each for each in session.remarks)


def test_so_is_one_that_a_step_freezes_for_its_backward_pass() -> None:
    generator, critic = nn.Linear(4, 4), nn.Linear(4, 1)

    def step() -> None:
        critic.requires_grad_(False)
        critic(generator(torch.ones(2, 4))).mean().backward()
        critic.requires_grad_(True)

    session = gradscope.trace(step)
    found = session.sources["critic.weight"]
    assert (session.verdict, found.status, found.frozen) == ("flows", "flows", True)
    step()
    assert critic.weight.grad is None and generator.weight.grad is not None


@pytest.mark.parametrize("used", [False, True])
def test_it_is_said_where_nothing_that_trains_is_used(used: bool) -> None:
    """As where an adapter is merged into the frozen weights that it was made for."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.adapter = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.adapter(x) if used else self.base(x)

    model = Adapted()
    assert model(torch.ones(2, 4)).requires_grad == used
    session = gradscope.trace(model, torch.ones(2, 4))
    assert any("None of what trains is used" in words for words in session.remarks) != used
