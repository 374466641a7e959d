"""What only a GPU shows: cuDNN, Triton, CUDA graphs, CuPy, streams, several devices. Skipped where there is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradscope
from gradscope.errors import NotAnalysedError
from gradscope.session import Session

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MODES = pytest.mark.parametrize("mode", ["real", "auto"])
Between = Callable[[torch.Tensor], torch.Tensor]


class Two(nn.Module):
    """``second(between(first(x)))`` on the GPU."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, device="cuda"), nn.Linear(4, 4, device="cuda")
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x)))


def given() -> torch.Tensor:
    return torch.randn(3, 4, device="cuda")


def arriving(model: nn.Module, *inputs: torch.Tensor) -> dict[str, bool]:
    """Ask torch itself which parameters get a gradient."""
    model(*inputs).square().sum().backward()
    found = {name: parameter.grad is not None for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def agrees(session: Session, arrives: dict[str, bool]) -> bool:
    return all((session.sources[name].status == "flows") == there for name, there in arrives.items())


# --- ways through the GPU ------------------------------------------------------------------------------


def over_the_cpu(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().mul(2).cuda()


def over_pinned_memory(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().pin_memory().to("cuda", non_blocking=True)


def on_another_stream(x: torch.Tensor) -> torch.Tensor:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
    torch.cuda.current_stream().wait_stream(side)
    return y


def saved_on_the_cpu(x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return x.exp() * x


def in_half_precision(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return F.linear(x, torch.eye(4, device="cuda")).float()


def numpy_and_back(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.detach().cpu().numpy()).cuda()


def no_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x * 2


@MODES
@pytest.mark.parametrize(
    "between", [over_the_cpu, over_pinned_memory, on_another_stream, saved_on_the_cpu, in_half_precision]
)
def test_ways_that_keep_the_gradient(between: Between, mode: str) -> None:
    model, x = Two(between), given()
    assert all(arriving(model, x).values())
    session = gradscope.trace(model, x, mode=mode)
    assert session.verdict == "flows" and session.findings == []


@MODES
@pytest.mark.parametrize(("between", "rule"), [(numpy_and_back, "GS201"), (no_grad, "GS104")])
def test_ways_that_lose_it(between: Between, rule: str, mode: str) -> None:
    model, x = Two(between), given()
    session = gradscope.trace(model, x, mode=mode)
    assert agrees(session, arriving(model, x))
    assert session.verdict == "blocked" and session.findings[0].rule == rule
    assert session.target["device"] == "cuda"


# --- kernels -------------------------------------------------------------------------------------------


def doubled_by_triton(x: torch.Tensor) -> torch.Tensor:
    import gpu_kernels

    return gpu_kernels.doubled(x)


def doubled_by_cupy(x: torch.Tensor) -> torch.Tensor:
    import cupy

    return torch.as_tensor(cupy.asarray(x.detach()) * 2, device="cuda")


def seen_by_cupy(x: torch.Tensor) -> torch.Tensor:
    import cupy

    return torch.as_tensor(cupy.asarray(x.detach()), device="cuda")


@MODES
@pytest.mark.parametrize(
    ("between", "needs", "rule"),
    [(doubled_by_triton, "triton", "GS503"), (doubled_by_cupy, "cupy", "GS201"), (seen_by_cupy, "cupy", "GS201")],
)
def test_a_kernel_without_a_backward_is_named(between: Between, needs: str, rule: str, mode: str) -> None:
    pytest.importorskip(needs)
    model, x = Two(between), given()
    arrives = arriving(model, x)
    session = gradscope.trace(model, x, mode=mode)
    assert not arrives["first.weight"] and agrees(session, arrives)
    assert (session.verdict, session.sources["first.weight"].status) == ("blocked", "blocked")
    assert session.findings[0].rule == rule


@MODES
def test_a_kernel_in_a_custom_function_is_fine(mode: str) -> None:
    pytest.importorskip("triton")
    import gpu_kernels

    session = gradscope.trace(Two(gpu_kernels.Doubled.apply), given(), mode=mode)
    assert session.verdict == "flows" and session.findings == []


# --- CUDA graphs ---------------------------------------------------------------------------------------


class Captured(nn.Module):
    """Runs its middle layer as a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.second = (nn.Linear(4, 4, device="cuda") for _ in range(3))
        self._given = torch.zeros(3, 4, device="cuda")
        side = torch.cuda.Stream()
        with torch.cuda.stream(side), torch.no_grad():
            self.middle(self._given)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph):
            self._made = self.middle(self._given)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self._given.copy_(self.first(x))
        self._graph.replay()
        return self.second(self._made)


@MODES
def test_the_replay_of_a_graph_is_named_and_undone(mode: str) -> None:
    model, x = Captured(), given()
    arrives = arriving(model, x)
    before = model._given.clone(), model._made.clone()
    session = gradscope.trace(model, given(), mode=mode)
    assert agrees(session, arrives) and session.sources["middle.weight"].status == "blocked"
    assert "GS503" in {each.rule for each in session.findings}
    assert torch.equal(model._given, before[0]) and torch.equal(model._made, before[1])


@MODES
def test_a_graph_with_a_backward_pass_flows(mode: str) -> None:
    model = Two(nn.Identity())
    layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).cuda()
    model.between = torch.cuda.make_graphed_callables(layer, (given().requires_grad_(),))
    assert all(arriving(model, given()).values())
    assert gradscope.trace(model, given(), mode=mode).verdict == "flows"


# --- cuDNN, devices, state -------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_weights_of_a_cudnn_network_share_memory_and_not_their_gradient(kind: Any, mode: str) -> None:
    class Net(nn.Module):
        def __init__(self, quiet: bool) -> None:
            super().__init__()
            self.rnn, self.head, self.quiet = kind(4, 4, 2), nn.Linear(4, 2), quiet

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.set_grad_enabled(not self.quiet):
                hidden = self.rnn(x)[0]
            return self.head(hidden[-1])

    for quiet in (False, True):
        model, x = Net(quiet).cuda(), torch.randn(5, 2, 4, device="cuda")
        session = gradscope.trace(model, x, mode=mode)
        assert agrees(session, arriving(model, x))
        assert session.verdict == ("blocked" if quiet else "flows")


def test_cudnn_refuses_a_backward_pass_in_eval_mode() -> None:
    session = gradscope.trace(nn.LSTM(4, 4).cuda().eval(), torch.randn(5, 2, 4, device="cuda"), mode="real")
    assert session.verdict == "crashes" and "training mode" in session.crash["message"]


class Spread(nn.Module):
    """Begins on the CPU and goes on on the GPU, as a model does that is too big for it."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.low, self.high, self.broken = nn.Linear(4, 4), nn.Linear(4, 4, device="cuda"), broken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.low(x)
        return self.high(hidden.detach().cuda() if self.broken else hidden.cuda())


@MODES
@pytest.mark.parametrize("broken", [False, True])
def test_a_model_on_several_devices_stays_there(broken: bool, mode: str) -> None:
    model, x = Spread(broken), torch.randn(3, 4)
    arrives = arriving(model, x)
    session = gradscope.trace(model, x, mode=mode)
    assert session.target["mode"] == ("real" if mode == "real" else "structural")
    assert agrees(session, arrives) and session.verdict == ("blocked" if broken else "flows")
    assert [each.device.type for each in model.parameters()] == ["cpu", "cpu", "cuda", "cuda"]


@MODES
def test_an_input_on_the_wrong_device_is_said_to_be(mode: str) -> None:
    with pytest.raises(NotAnalysedError, match=r"(?s)mixes devices|same device"):
        gradscope.trace(Two(torch.tanh), torch.randn(3, 4), mode=mode)


@MODES
def test_a_step_with_a_gradient_scaler_is_judged_and_undone(mode: str) -> None:
    model = Two(torch.tanh)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cuda")

    def step(x: torch.Tensor) -> float:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    step(given())
    before = [each.clone() for each in model.parameters()], scaler.state_dict()
    assert gradscope.trace(step, given(), mode=mode).verdict == "flows"
    assert all(map(torch.equal, before[0], model.parameters()))
    assert scaler.state_dict() == before[1]


def test_random_states_are_put_back() -> None:
    model, x = Two(nn.Dropout(0.5)), given()
    before = torch.cuda.get_rng_state()
    gradscope.trace(model, x, mode="real")
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("times", [1, 2])
def test_numeric_goes_where_the_kernels_are(times: int) -> None:
    pytest.importorskip("triton")
    import gpu_kernels

    class Scaled(gpu_kernels.Doubled):
        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return gpu_kernels.doubled(grad) * times

    session = gradscope.trace(Two(Scaled.apply), given(), mode="real", numeric=True)
    assert session.sources["first.weight"].status == ("flows" if times == 1 else "wrong")
    assert any("Finite differences in float64" in words for words in session.remarks)


def test_numeric_says_the_same() -> None:
    session = gradscope.trace(Two(torch.tanh), given(), numeric=True)
    assert session.verdict == "flows" and {source.status for source in session.sources.values()} == {"flows"}


def test_a_trace_on_the_gpu_keeps_no_memory_there() -> None:
    model, x = nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)]).cuda(), torch.randn(64, 512, device="cuda")
    gradscope.trace(model, x, mode="real")
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        gradscope.trace(model, x, mode="real")
    assert torch.cuda.memory_allocated() == before


def test_a_model_on_the_cpu_starts_no_gpu() -> None:
    script = (
        "import torch, gradscope\n"
        "for mode in ('structural', 'real'):\n"
        "    gradscope.trace(torch.nn.Linear(4, 4), torch.ones(2, 4), mode=mode)\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
