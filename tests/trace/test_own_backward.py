"""Steps of training that go backward themselves: judged by what they go backward from, and undone afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradscope

Loss = Callable[[nn.Module], torch.Tensor]
MODES = pytest.mark.parametrize("mode", ["real", "auto"])


class Net(nn.Module):
    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.quiet = quiet

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(not self.quiet):
            hidden = self.body(x).relu()
        return self.head(hidden)


class Trainer:
    """An everyday loop: ``step`` and its variations give out different things."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.net = Net(quiet=quiet)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.1)
        torch.manual_seed(1)
        self.x, self.y = torch.randn(6, 4), torch.randint(0, 3, (6,))

    def loss(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.net(self.x), self.y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        return loss

    def number(self) -> float:
        return self.loss().item()

    def detached(self) -> torch.Tensor:
        return self.loss().detach()

    def nothing(self) -> None:
        self.loss()

    def in_parts(self) -> float:
        total = 0.0
        for x, y in zip(self.x.split(2), self.y.split(2), strict=True):
            loss = F.cross_entropy(self.net(x), y) / 3
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        return total

    def by_closure(self) -> float:
        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.net(self.x), self.y)
            loss.backward()
            return loss

        return self.optimizer.step(closure).item()


STEPS = ["loss", "number", "detached", "nothing", "in_parts", "by_closure"]


@MODES
@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_training_is_judged_by_what_it_goes_backward_from(step: str, mode: str) -> None:
    trainer = Trainer()
    getattr(trainer, step)()
    assert all(each.grad is not None and each.grad.any() for each in trainer.net.parameters())
    session = gradscope.trace(getattr(Trainer(), step), mode=mode)
    assert (session.verdict, session.findings) == ("flows", [])
    assert {source.status for source in session.sources.values()} == {"flows"}


@MODES
@pytest.mark.parametrize("step", STEPS)
def test_a_cut_in_a_step_of_training_is_named_and_the_fix_is_proved(step: str, mode: str) -> None:
    trainer = Trainer(quiet=True)
    getattr(trainer, step)()
    assert trainer.net.body.weight.grad is None and trainer.net.head.weight.grad.any()
    session = gradscope.trace(getattr(Trainer(quiet=True), step), mode=mode)
    assert [(each.severity, each.rule, each.function) for each in session.findings] == [
        ("error", "GS105", "Net.forward")
    ]
    assert {name for name, source in session.sources.items() if source.status == "blocked"} == {
        "self.net.body.weight", "self.net.body.bias"
    }  # fmt: skip
    assert session.fix_verified


@MODES
@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_training_leaves_nothing(step: str, mode: str) -> None:
    trainer = Trainer()
    trainer.loss()
    tensors = [*trainer.net.parameters()]
    tensors += [each for state in trainer.optimizer.state.values() for each in state.values()]
    before = [(each, each.clone(), each.grad) for each in tensors]
    gradients = [each.grad.clone() for each in trainer.net.parameters()]
    gradscope.trace(getattr(trainer, step), mode=mode)
    assert all(torch.equal(each, numbers) and each.grad is grad for each, numbers, grad in before)
    assert all(map(torch.equal, [each.grad for each in trainer.net.parameters()], gradients))


def test_a_gradient_scaler_counts_no_step_that_was_traced() -> None:
    trainer, scaler = Trainer(), torch.amp.GradScaler("cpu")

    def step() -> float:
        loss = F.cross_entropy(trainer.net(trainer.x), trainer.y)
        scaler.scale(loss).backward()
        scaler.step(trainer.optimizer)
        scaler.update()
        return loss.item()

    step()
    before = scaler.state_dict()
    assert gradscope.trace(step).verdict == "flows"
    assert scaler.state_dict() == before != (step(), scaler.state_dict())[1]


@MODES
def test_a_result_with_a_gradient_counts_before_a_backward_pass_on_the_way(mode: str) -> None:
    """An adversarial example is made by a backward pass of its own: what is trained on is the result."""

    class Attacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, x: torch.Tensor) -> torch.Tensor:
            nudge = torch.zeros_like(x, requires_grad=True)
            self.net(x + nudge).sum().backward()
            with torch.no_grad():
                features = self.net.body(x + nudge.grad.sign())
            return self.net.head(features).sum()

    session = gradscope.trace(Attacked(), torch.randn(2, 4), entry="training_step", mode=mode)
    assert session.sources["net.body.weight"].status == "blocked"
    assert [(each.severity, each.rule) for each in session.findings] == [("error", "GS104")]


@MODES
def test_a_gradient_penalty_is_no_finding(mode: str) -> None:
    net, data = Net(), torch.randn(6, 4)

    def penalised() -> torch.Tensor:
        x = data.clone().requires_grad_(True)
        y = net(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.mean() + (slope.norm(2, -1) - 1).square().mean()

    assert gradscope.trace(penalised, mode=mode).findings == []
