"""A trace leaves nothing behind: model, torch and random state are as before, however it ends."""

from __future__ import annotations

import concurrent.futures
import gc
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.grad_mode import enable_grad, inference_mode, no_grad, set_grad_enabled
from torch.nn.modules import module as module_hooks
from two import Doubled, Two, given

import gradscope
from gradscope.errors import NotAnalysedError

double = Doubled.apply


class Model(nn.Module):
    """Everything a run may change: statistics, a cache, an attribute, noise, a hook, a frozen and a tied weight."""

    def __init__(self, ending: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.last.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.cache: dict[str, list[torch.Tensor]] = {"seen": []}
        self.ending = ending
        self.first.register_forward_hook(lambda module, args, output: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.latest = x
        self.cache["seen"].append(x)
        with torch.no_grad():
            y = self.drop(self.norm(self.first(x))) * float(np.random.rand()) * random.random()
        self.ending()
        return self.last(double(y) + x)


def state(model: Model) -> list[Any]:
    """Return all that has to be the same afterwards, by identity where identity counts."""
    patched = [
        *(getattr(switch, name) for switch in (no_grad, enable_grad, inference_mode, set_grad_enabled)
          for name in ("__init__", "__enter__", "__exit__")),
        torch.autograd.Function.__dict__["apply"], Doubled.__dict__["forward"], "forward" in vars(type(Doubled)),
        nn.Parameter.__new__, nn.functional.handle_torch_function,
        torch.Tensor.__reduce_ex__, torch._utils._rebuild_tensor, nn.Module.register_parameter, nn.Module._call_impl,
        threading.Thread.start, concurrent.futures.ThreadPoolExecutor.submit, nn.init.normal_,
    ]  # fmt: skip
    hooks = [dict(module_hooks._global_forward_hooks), dict(module_hooks._global_forward_pre_hooks)]
    modules = [
        {name: id(value) for name, value in vars(module).items()} | {"keys": list(vars(module))}
        for module in model.modules()
    ]
    tables = [
        {name: id(value) for name, value in vars(module)[table].items()}
        for module in model.modules()
        for table in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    ]
    tensors = [
        (name, tensor.tolist(), tensor.requires_grad)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]
    random_states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    modes = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
             torch.overrides._get_current_function_mode_stack()]  # fmt: skip
    return [patched, hooks, modules, tables, len(model.cache["seen"]), hasattr(model, "latest"),
            [module.training for module in model.modules()], random_states, modes,
            tensors]  # fmt: skip


def fail() -> None:
    raise ValueError("not today")


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("options", [{"mode": "real"}, {"mode": "structural"}, {"numeric": True}], ids=str)
@pytest.mark.parametrize(
    ("ending", "expected"),
    [(lambda: None, None), (fail, NotAnalysedError), (interrupt, KeyboardInterrupt)],
    ids=["return", "exception", "interrupt"],
)
def test_everything_is_as_before(ending: Any, expected: Any, options: dict[str, Any]) -> None:
    model, x = Model(ending), torch.randn(8, 4, requires_grad=True)
    before = state(model)
    if expected is None:
        assert gradscope.trace(model, x, **options).verdict == "blocked"
    else:
        with pytest.raises(expected):
            gradscope.trace(model, x, **options)
    assert state(model) == before
    assert x.requires_grad and x.is_leaf and x.grad is None
    model.ending = lambda: None
    model(x).sum().backward()
    assert model.first.weight.grad is not None and x.grad is not None


def test_a_trace_inside_a_traced_forward_leaves_the_outer_one_its_patches() -> None:
    inner = Model()
    seen: list[str] = []

    def trace_inside() -> None:
        seen.append(gradscope.trace(inner, torch.randn(8, 4), mode="real").verdict)

    model, x = Model(trace_inside), torch.randn(8, 4)
    before = state(model), state(inner)
    session = gradscope.trace(model, x, mode="real", verify=False)
    assert (state(model), state(inner)) == before
    assert seen == ["blocked"]
    assert [each.rule for each in session.findings if each.severity != "note"] == ["GS104"]


def test_the_forward_of_a_custom_function_can_be_replaced_in_a_run() -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def replacing(x: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(Doubled, "forward", staticmethod(lambda ctx, x: x * 4)):
            seen.append((x, double(x)))
        return double(x)

    own = Doubled.__dict__["forward"]
    assert gradscope.trace(Two(replacing), given(), mode="real").verdict == "flows"
    assert Doubled.__dict__["forward"] is own
    assert all(torch.equal(y, x * 4) for x, y in seen) and torch.equal(double(torch.ones(2)), torch.tensor([2.0, 2.0]))


def test_a_foreign_patch_that_was_there_before_survives() -> None:
    original = nn.Parameter.__new__

    def foreign(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return original(cls, *args, **kwargs)

    nn.Parameter.__new__ = staticmethod(foreign)
    try:
        gradscope.trace(Model(), torch.randn(8, 4), mode="real")
        assert nn.Parameter.__new__ is foreign
    finally:
        nn.Parameter.__new__ = staticmethod(original)


def test_evaluation_mode_and_gradients_that_are_there_stay() -> None:
    model = Model().eval()
    model(torch.randn(8, 4)).sum().backward()
    kept = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradscope.trace(model, torch.randn(8, 4), mode="real")
    assert not model.training and all(parameter.grad is kept[name] for name, parameter in model.named_parameters())


@pytest.fixture
def usual_threshold() -> Iterator[tuple[int, int, int]]:
    """The threshold that Python starts with: the command line raises its own for good."""
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield gc.get_threshold()
    gc.set_threshold(*before)


def test_the_threshold_of_the_garbage_collector_is_put_back(usual_threshold: tuple[int, int, int]) -> None:
    seen: list[int] = []

    class Asks(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(gc.get_threshold()[0])
            return super().forward(x)

    gradscope.trace(Asks(2, 2), torch.randn(1, 2), mode="real", verify=False)
    assert seen[0] > usual_threshold[0]
    assert gc.get_threshold() == usual_threshold


class Training(nn.Module):
    """What a step of training may leave behind: gradients, weights, running sums with a history, another dtype."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("sum", torch.zeros(()))
        self.seen = {"in": [torch.zeros(4)]}
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        optimizer = torch.optim.Adam(self.first.parameters(), **self.options)
        loss = self.first(x).square().mean()
        loss.backward()
        optimizer.step()
        self.sum += self.first(x).mean()
        self.seen["in"][0] += self.first(x).sum(0)
        self.weight.data = self.weight.data.double() * 2
        return self.first(x) * self.weight.float() + self.sum


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("mode", ["real", "auto"])
def test_a_step_of_training_in_the_forward_pass_is_undone(options: dict[str, Any], mode: str) -> None:
    model, x = Training(**options), torch.randn(3, 4)
    model.first.weight.grad = torch.ones(4, 4)
    held = [*model.parameters(), model.sum, model.seen["in"][0]]
    before = [(each.tolist(), each.dtype, each.data_ptr(), each.grad_fn, each.grad) for each in held]
    gradscope.trace(model, x, mode=mode)
    after = [(each.tolist(), each.dtype, each.data_ptr(), each.grad_fn, each.grad) for each in held]
    assert after == before and after[0][4] is before[0][4]
    assert model.first.weight.grad.tolist() == torch.ones(4, 4).tolist()


class Meddling(nn.Module):
    """Changes what is not its own: an input, an object's tensor, memory by way of numpy, the hooks of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("zero", torch.zeros(()))
        self.meter = SimpleNamespace(total=torch.zeros(1))

    def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor]) -> torch.Tensor:
        x.sub_(0.5)
        more["seen"].add_(1)
        self.meter.total.add_(1)
        self.count.numpy()[0] += 1
        self.layer.register_forward_hook(lambda *_: None)
        self.zero.requires_grad_()
        return self.layer(x) + self.zero


@pytest.mark.parametrize("mode", ["real", "auto"])
def test_what_a_forward_pass_meddles_with_is_put_back(mode: str) -> None:
    model, x, more = Meddling(), torch.ones(2, 4), {"seen": torch.zeros(1)}
    gradscope.trace(model, x, more, mode=mode)
    assert torch.equal(x, torch.ones(2, 4)) and more["seen"] == 0
    assert model.meter.total == 0 and model.count == 0 and not model.zero.requires_grad
    assert not model.layer._forward_hooks
    model(x, more)
    assert x[0, 0] == 0.5 and more["seen"] == model.meter.total == model.count == len(model.layer._forward_hooks) == 1


class Observed(nn.Module):
    """Fits a buffer to its input, as the observers of quantisation-aware training do, and shrinks another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("largest", torch.zeros(0))
        self.register_buffer("seen", torch.arange(6.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.largest.resize_(4).copy_(x.detach().amax(0))
        self.seen.resize_(2).add_(1)
        return self.layer(x) * self.largest


def test_a_buffer_that_is_resized_has_its_size_again() -> None:
    model = Observed()
    session = gradscope.trace(model, torch.ones(2, 4), mode="real")
    assert session.sources["layer.weight"].status == "flows"
    assert (model.largest.shape, model.seen.tolist()) == ((0,), [0, 1, 2, 3, 4, 5])


class Mean(nn.Module):
    """A loss with a memory: the mean of what it has seen so far."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sum", torch.zeros(()))
        self.seen = torch.zeros(())

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        self.sum += y.detach().mean()
        self.seen += 1
        return (y * self.sum / self.seen).mean()


@pytest.mark.parametrize("options", [{"mode": "real"}, {"numeric": True}], ids=str)
def test_what_a_loss_remembers_is_put_back(options: dict[str, Any]) -> None:
    loss = Mean()
    loss(torch.ones(3))
    scale = torch.full((), 2.0)
    session = gradscope.trace(nn.Linear(4, 4), torch.randn(3, 4), loss=lambda y: scale * loss(y), **options)
    assert session.sources["weight"].status == "partial" and (loss.sum, loss.seen) == (1, 1)
    assert (loss.sum.dtype, session.unseen) == (torch.float32, [])  # what a loss holds comes from nowhere else


class Expanding(nn.Module):
    """Keep tensors of which elements show twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(1, 4).expand(3, 4))
        self.seen = torch.zeros(1).expand(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.table + self.seen


class Registered(nn.Module):
    """Share its weight with every copy of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def __deepcopy__(self, memo: dict[int, Any]) -> Registered:
        made = Registered()
        made.weight = self.weight
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_finite_differences_leave_expanded_and_shared_tensors_as_they_are() -> None:
    model, x = Expanding(), torch.randn(3, 4)
    assert gradscope.trace(model, x, numeric=True).verdict == "flows"
    assert model.table.tolist() == [[1] * 4] * 3 and model.seen.tolist() == [0] * 4
    shared = Registered()
    assert gradscope.trace(shared, x.double(), numeric=True).verdict == "flows"
    assert shared.weight.grad is None and shared.weight.tolist() == [1] * 4


DEEP = """
import threading, torch, gradscope
from torch import nn

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(2, 2)
    def forward(self, x):
        h = x
        for _ in range(500):
            h = self.cell(x, h)
        return h

def trace():
    print(gradscope.trace(Deep(), torch.ones(1, 2), mode="real").verdict)

threading.stack_size(1 << 19)
thread = threading.Thread(target=trace)
thread.start()
thread.join()
"""


def test_a_deep_graph_is_freed_without_overflowing_the_stack() -> None:
    done = subprocess.run([sys.executable, "-c", DEEP], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "flows"), done.stderr
