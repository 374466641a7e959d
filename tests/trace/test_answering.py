"""Objects that are no tensors and answer calls of torch: what they call for that is seen."""

from __future__ import annotations

import operator
from collections import UserDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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


class Named(dict[str, Any]):
    """A dict that is made with a name, and no items."""

    def __init__(self, name: str) -> None:
        self.name = name


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    name: str


def batches() -> Iterator[tuple[Any, Callable[[Any], str]]]:
    """Yield what holds an ``x`` and a ``y``, and what tells its name from it."""
    items = {"x": torch.ones(2, 4), "y": torch.ones(2, 4)}
    batch = Batch(items)
    batch.name = "first"
    yield batch, lambda given: str(given.name)
    named = Named("first")
    named.update(items)
    yield named, lambda given: str(given.name)
    yield defaultdict(lambda: "first", items), lambda given: str(given["no such item"])
    yield Pair(**items, name="first"), lambda given: str(given.name)


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize(("batch", "name_of"), [*batches()], ids=lambda value: type(value).__name__)
def test_tensors_in_whatever_holds_them_by_name_are_inputs(batch: Any, name_of: Any, mode: str) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, batch: Any) -> torch.Tensor:
            assert name_of(batch) == "first"
            x, y = batch[:2] if isinstance(batch, tuple) else (batch["x"], batch["y"])
            found: torch.Tensor = self.layer(x) + y.detach()
            return found

    given = list(batch) if isinstance(batch, tuple) else dict(batch)
    session = gradscope.trace(Reading(), batch, mode=mode)
    statuses = {name: session.sources[name].status for name in ("input.0.x", "input.0.y")}
    assert statuses == {"input.0.x": "flows", "input.0.y": "blocked"}
    assert session.unseen == []
    now = batch if isinstance(batch, tuple) else [batch[name] for name in given]
    assert all(map(operator.is_, now, given if isinstance(batch, tuple) else given.values()))
