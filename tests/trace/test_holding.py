"""What is traced need not be a module: pipelines, predictors, bound methods and functions hold theirs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import gradscope
from gradscope.errors import UsageError


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out

    @torch.no_grad()
    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x)


class Pipeline:
    """Two towers and what a call leaves behind, as pipelines have it."""

    def __init__(self) -> None:
        self.text = Tower()
        self.parts: dict[str, Any] = {"image": Tower()}
        self.last: torch.Tensor | None = None
        self.history: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.differentiable(x)

    def differentiable(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.parts["image"](self.text(x))
        self.history.append(self.last)
        return self.last


NAMES = {"text.layer.weight", "text.layer.bias", "parts.image.layer.weight", "parts.image.layer.bias"}
X = torch.ones(2, 4)


def test_a_pipeline_is_traced_through_its_call() -> None:
    session = gradscope.trace(Pipeline(), X)
    assert (session.target["name"], session.target["entry"]) == ("Pipeline", "__call__")
    assert [(f.rule, f.function) for f in session.findings] == [("GS102", "Pipeline.__call__")]
    assert session.fix_verified
    assert {name: source.status for name, source in session.sources.items() if name in NAMES} == dict.fromkeys(
        NAMES, "blocked"
    )


def test_another_method_of_it_keeps_the_gradient() -> None:
    assert gradscope.trace(Pipeline(), X, entry="differentiable").verdict == "flows"
    session = gradscope.trace(Pipeline().differentiable, X)
    assert session.verdict == "flows"
    assert (session.target["name"], session.target["entry"]) == ("Pipeline", "differentiable")


@pytest.mark.parametrize("mode", ["structural", "real"])
def test_what_a_call_leaves_in_the_objects_around_is_taken_out_again(mode: Any) -> None:
    pipeline = Pipeline()
    gradscope.trace(pipeline, X, mode=mode)
    assert pipeline.last is None
    assert pipeline.history == []


def test_a_bound_method_of_a_module_is_the_module_entered_there() -> None:
    session = gradscope.trace(Tower().embed, X)
    assert (session.target["name"], session.target["entry"]) == ("Tower", "embed")
    assert [(f.rule, f.function) for f in session.findings] == [("GS102", "Tower.embed")]


def test_functions_are_searched_for_the_modules_they_use() -> None:
    tower, pipeline = Tower(), Pipeline()

    def both(x: torch.Tensor) -> torch.Tensor:
        return tower(x) + pipeline(x)

    session = gradscope.trace(both, X)
    assert session.sources["tower.layer.weight"].status == "flows"
    assert session.sources["pipeline.text.layer.weight"].status == "blocked"
    assert gradscope.trace(functools.partial(both), X).verdict == "blocked"
    assert pipeline.history == []


def test_what_holds_no_module_is_refused_in_a_sentence() -> None:
    with pytest.raises(UsageError, match="holds none"):
        gradscope.trace(lambda x: x, X)
    with pytest.raises(UsageError, match="neither a module nor callable"):
        gradscope.trace(3, X)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no method 'nothing'"):
        gradscope.trace(Pipeline(), X, entry="nothing")


class Caching(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, torch.Tensor] = {}
        self.seen: dict[str, list[torch.Tensor]] = {"all": []}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache.setdefault("sum", self.layer.weight.sum())
        self.seen["all"].append(x)
        return super().forward(x) * self.cache["sum"]


class Session:
    def __init__(self) -> None:
        self.frames: dict[int, dict[str, torch.Tensor]] = {0: {}}


def test_a_cache_of_the_model_and_an_argument_that_is_an_object_stay_as_they_were() -> None:
    class Streaming(Tower):
        def forward(self, x: torch.Tensor, session: Session | None = None) -> torch.Tensor:
            assert session is not None
            session.frames[0]["features"] = super().forward(x)
            return session.frames[0]["features"]

    model, session = Caching(), Session()
    gradscope.trace(model, X)
    assert (model.cache, model.seen) == ({}, {"all": []})
    gradscope.trace(Streaming(), X, session=session)
    assert session.frames == {0: {}}


COUNT = 0


def test_what_a_function_leaves_in_its_variables_is_taken_out_again() -> None:
    model, losses, last = nn.Linear(4, 4), [torch.ones(())], {"loss": torch.ones(())}
    average, steps = torch.zeros(()), 0

    def step(x: torch.Tensor) -> torch.Tensor:
        global COUNT
        nonlocal average, steps
        loss = model(x).square().mean()
        COUNT, steps, average = COUNT + 1, steps + 1, 0.9 * average + loss
        losses.append(loss)
        last["loss"] = loss
        return loss

    before = [*losses, *last.values(), average]
    assert gradscope.trace(step, X, numeric=True).verdict == "flows"
    after = [*losses, *last.values(), average]
    assert list(map(id, after)) == list(map(id, before)) and (steps, COUNT) == (0, 0)


def test_tensors_beside_the_modules_have_the_names_of_their_variables() -> None:
    """monai's DiceMetric over a closure: the labels were said to be "objects", an attribute of gradscope's own."""
    net, unused = nn.Linear(4, 4), nn.Linear(4, 4)
    scale, settings, _shift = torch.ones(4, requires_grad=True), {"bias": torch.ones(4, requires_grad=True)}, X
    merged = (2 * unused.weight).detach()

    def forward(x: torch.Tensor) -> torch.Tensor:
        return (net(x) * scale + settings["bias"]) @ merged + unused.bias + _shift

    session = gradscope.trace(forward, X)
    assert session.findings[0].message.startswith("scale, settings.bias: used here, and no parameter of the model")
    assert session.unseen == [
        "The result uses merged, which was computed before the run and kept: whether unused.weight is in it is not "
        "known."
    ]


class Counted(nn.Module):
    """Keeps a count on its parameters, as opacus and megatron do, and names them by a method of its own (torchrl)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.layer.weight.uses = 0  # type: ignore[assignment]

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Any:
        return super().named_parameters(prefix, recurse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layer.weight.uses += 1  # type: ignore[operator]
        self.layer.bias.seen = True  # type: ignore[assignment]
        out: torch.Tensor = self.layer(x)
        return out


@pytest.mark.parametrize("asked", [{"mode": "structural"}, {"mode": "real"}, {"numeric": True}])
def test_attributes_of_parameters_are_there_in_the_run_and_as_before_after_it(asked: Any) -> None:
    model = Counted()
    session = gradscope.trace(model, X, **asked)
    assert session.verdict == "flows" and not any("could not be taken" in words for words in session.remarks)
    assert model.layer.weight.uses == 0 and not hasattr(model.layer.bias, "seen")
