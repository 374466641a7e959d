"""The recorder by itself: what it hands to the mode of the run, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import gradscope
from gradscope.tracing.recorder import Recorder
from gradscope.tracing.recording import Operation, Recording, Value, Write


def test_questions_to_a_tensor_do_not_go_through_the_mode_of_the_run() -> None:
    ran: list[str] = []

    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ran.append(func.__name__)
        return func(*args, **kwargs)

    tensor = torch.ones(2, 3)
    with Recorder(run):
        tensor.requires_grad_()
        assert (tensor.size(), tensor.dim(), tensor.is_inference()) == ((2, 3), 2, False)
        room = torch.empty_like(tensor)
        room + tensor
    assert ran == ["empty_like", "add"]


class Noting(TorchFunctionMode):
    """A mode of the target's own, which sees what a layer computes and doubles it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is nn.functional.relu else result


def test_a_mode_of_the_targets_own_is_asked_before_the_recorder() -> None:
    inner = Noting()

    class Target(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with inner:
                return nn.functional.relu(x)

    x = torch.ones(2, requires_grad=True)
    results: list[torch.Tensor] = []

    def loss(y: torch.Tensor, results: list[torch.Tensor] = results) -> torch.Tensor:  # what closes over it is put back
        results.append(y)
        return y.sum()

    session = gradscope.trace(Target(), x, loss=loss, mode="real", verify=False)
    assert (session.verdict, inner.seen) == ("flows", ["relu"])
    assert results[0].tolist() == [2, 2]
    assert session.stats["operations"] == 5  # detach and to of the input; relu, mul, sum


# --- long passes ---------------------------------------------------------------------------------------


class ThroughPython(nn.Module):
    """Carry a number through Python at each step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.layer, self.steps = nn.Linear(2, 2), steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.steps):
            x = self.layer(x).tanh()
            x = x + torch.tensor(2 * x.sum().item())
        return x


def test_numbers_that_come_back_from_python_are_recorded_once_each() -> None:
    def operations(steps: int) -> int:
        session = gradscope.trace(ThroughPython(steps), torch.ones(2), mode="real")
        assert [each.rule for each in session.findings] == ["GS302"]
        return int(session.stats["operations"])

    once, twice, thrice = operations(20), operations(40), operations(60)
    assert thrice - twice == twice - once


def test_of_the_writes_into_one_memory_the_last_one_is_told_and_those_behind_autograds_back() -> None:
    recording = Recording(values=[Value(0, (), torch.float32, differentiable=True, memory=1)])
    recording.operations = [Operation(number, "add_", (0,), (0,), None, None) for number in range(5)]
    recording.writes = [Write(1, number, unseen=number == 2) for number in range(5)]
    after = recording.later_writes()
    assert after is not None
    assert [[write.operation for write in after(number)] for number in range(6)] == [[2, 4], [2, 4], [4], [4], [], []]
