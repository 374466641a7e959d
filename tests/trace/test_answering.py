"""Objects that are no tensors and answer calls of torch: what they call for that is seen."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gradscope


class Holding:
    """Holds a tensor, and unit or name beside it."""

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [each.held if isinstance(each, cls) else each for each in args]
        return cls(func(*given, **(kwargs or {})))


class Declining:
    """Leaves every call to another class."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


class Held(nn.Module):
    def __init__(self, between: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.between = nn.Linear(4, 4), nn.Linear(4, 4), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.between(self.first(Holding(x)))).held
        return found


def quiet(x: Any) -> Any:
    with torch.no_grad():
        return torch.tanh(x)


def arriving(between: Callable[[Any], Any]) -> set[str]:
    model, x = Held(between), torch.ones(2, 4, requires_grad=True)
    model(x).sum().backward()
    named = {**dict(model.named_parameters()), "input.0": x}
    return {name for name, tensor in named.items() if tensor.grad is not None}


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize(("between", "rule"), [(torch.tanh, ""), (torch.detach, "GS201"), (quiet, "GS104")])
def test_what_an_object_answers_is_seen_at_the_line_that_asks_it(between: Any, rule: str, mode: str) -> None:
    session = gradscope.trace(Held(between), torch.ones(2, 4), mode=mode)
    assert {name for name, source in session.sources.items() if source.status == "flows"} == arriving(between)
    assert [(each.rule, each.severity) for each in session.findings] == ([(rule, "error")] if rule else [])
    function = "quiet" if between is quiet else "Held.forward"
    assert all(each.function == function and each.verified for each in session.findings)
    assert session.unseen == []


def test_what_no_object_answers_ends_as_it_does() -> None:
    with pytest.raises(TypeError):
        torch.tanh(Declining())  # type: ignore[arg-type]
    with pytest.raises(gradscope.errors.NotAnalysedError, match="Multiple dispatch failed"):
        gradscope.trace(Held(lambda x: torch.add(Declining(), x.held)), torch.ones(2, 4))


class Batch(UserDict[str, Any]):
    """As tokenisers give it out: a mapping, with a name beside its items."""

    name = ""


@pytest.mark.parametrize("mode", ["real", "auto"])
def test_tensors_in_any_mapping_are_inputs(mode: str) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, batch: Batch) -> torch.Tensor:
            assert batch.name == "first"
            found: torch.Tensor = self.layer(batch["x"]) + batch["y"].detach()
            return found

    batch = Batch(x=torch.ones(2, 4), y=torch.ones(2, 4), ids=[1, 2])
    batch.name = "first"
    given = dict(batch)
    session = gradscope.trace(Reading(), batch, mode=mode)
    statuses = {name: session.sources[name].status for name in ("input.0.x", "input.0.y")}
    assert statuses == {"input.0.x": "flows", "input.0.y": "blocked"}
    assert session.unseen == [] and session.target["inputs"] == ["{x: 2x4 float32, y: 2x4 float32, ids: [int, int]}"]
    assert all(batch[name] is given[name] for name in given) and not batch["x"].requires_grad
