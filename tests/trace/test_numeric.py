"""Finite differences: they settle what autograd alone cannot tell, and they agree where nothing is wrong."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from two import Between, Doubled, Straight, ZeroBackward, named, traced

import gradscope

# --- silently wrong ------------------------------------------------------------------------------------


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return -2 * grad


def reversed_gradient(x: torch.Tensor) -> torch.Tensor:
    return Reversed.apply(x)


def forgotten_gradient(x: torch.Tensor) -> torch.Tensor:
    return ZeroBackward.apply(x)


def scaled_by_a_hook(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.register_hook(lambda grad: grad * 3)
    return y


def changed_through_numpy(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    y.detach().numpy()[:] += 1
    return y


def changed_through_data(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    y.data.add_(1)
    return y


WRONG = [
    (reversed_gradient, "GS501", 1),
    (forgotten_gradient, "GS501", 1),
    (scaled_by_a_hook, "GS606", 2),
    (changed_through_numpy, "GS603", 2),
    (changed_through_data, "GS603", 2),
]


@pytest.mark.parametrize(("between", "rule", "line"), WRONG, ids=lambda value: getattr(value, "__name__", None))
def test_a_gradient_that_is_not_the_derivative_is_wrong_and_its_cause_is_named(
    between: Between, rule: str, line: int
) -> None:
    session = traced(between, "auto", numeric=True)
    assert session.sources["first.weight"].status == session.sources["input.0"].status == "wrong"
    assert session.sources["second.weight"].status == "flows"
    assert named(session, between)[0] == ("error", rule, line)
    assert session.verdict == "blocked"


# --- what agrees -----------------------------------------------------------------------------------------


def custom(x: torch.Tensor) -> torch.Tensor:
    return Doubled.apply(x)


def with_dropout(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x, 0.5)


def with_numpy_noise(x: torch.Tensor) -> torch.Tensor:
    return x * float(np.random.rand())


def normalised_over_the_batch(x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True)


def attention(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x[None], x[None], x[None])[0]


def constant_made_inside(x: torch.Tensor) -> torch.Tensor:
    return x * torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.zeros(3, 4)


def logged_only(x: torch.Tensor) -> torch.Tensor:
    float(x.norm())
    return x * 2


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_weights_that_a_module_lists_beside_its_table_are_moved_like_others(kind: type[nn.RNNBase]) -> None:
    session = gradscope.trace(kind(4, 4, 2), torch.randn(3, 2, 4), mode="real", numeric=True)
    assert session.verdict == "flows"
    assert {source.status for source in session.sources.values()} == {"flows"}


@pytest.mark.parametrize(
    "between",
    [
        custom, with_dropout, with_numpy_noise, normalised_over_the_batch, attention, constant_made_inside,
        logged_only, torch.relu, torch.tanh,
    ],
)  # fmt: skip
def test_what_is_right_is_not_called_wrong(between: Between) -> None:
    session = traced(between, "auto", numeric=True)
    assert session.verdict == "flows"
    assert all(source.status == "flows" for source in session.sources.values())
    assert any("5 sources" in words for words in session.remarks)


def entropy(x: torch.Tensor) -> torch.Tensor:
    """That the shift falls out takes to know that weights add up to one."""
    shifted = x - x.amax(-1, keepdim=True).detach()
    total = shifted.exp().sum(-1, keepdim=True)
    return (total.log() - (shifted.exp() * shifted).sum(-1, keepdim=True) / total).expand(3, 4)


def changed_without_harm(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    y.data.mul_(2)  # what backward multiplies with is by chance what it has to be
    return y


def stopped_norm(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm().detach()


def test_a_partial_cut_that_adds_nothing_is_taken_back() -> None:
    assert traced(entropy).sources["first.weight"].status == "partial"
    session = traced(entropy, "auto", numeric=True)
    assert session.sources["first.weight"].status == "flows" and session.verdict == "flows"
    assert named(session, entropy) == [] and session.findings[0].rule == "GS201"


def test_a_change_behind_autograds_back_that_does_no_harm_is_a_note() -> None:
    assert ("warning", "GS603", 2) in named(traced(changed_without_harm), changed_without_harm)
    session = traced(changed_without_harm, "auto", numeric=True)
    assert session.verdict == "flows" and named(session, changed_without_harm) == []


def test_a_partial_cut_that_matters_stays() -> None:
    session = traced(stopped_norm, "auto", numeric=True)
    assert session.sources["first.weight"].status == "partial" and session.verdict == "partial"


# --- lost, in steps, without influence ---------------------------------------------------------------------


def through_python(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[math.sin(value) for value in row] for row in x])


def through_pixels(x: torch.Tensor) -> torch.Tensor:
    pixels = (x.detach().sigmoid().numpy() * 255).astype(np.uint8)
    return torch.from_numpy(np.asarray(Image.fromarray(pixels)) / 255.0).to(x.dtype)


def printed(x: torch.Tensor) -> torch.Tensor:
    str(x.mean().item())
    return torch.ones(3, 4)


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.round()


def test_lost_in_steps_and_without_influence_are_told_apart() -> None:
    assert status_of(through_python) == "blocked"
    assert status_of(through_pixels) == "nondifferentiable"
    assert status_of(printed) == "unused"
    assert status_of(rounded) == "nondifferentiable"
    assert status_of(lambda x: x.detach() * 2) == "blocked"


def through_foreign_memory(x: torch.Tensor) -> torch.Tensor:
    size = x.numel() * x.element_size()
    foreign = (ctypes.c_byte * size).from_address(x.data_ptr())
    return torch.frombuffer(bytearray(foreign), dtype=x.dtype).view(x.shape) + 0


def test_what_passes_unseen_is_blamed_on_the_last_call_that_was_seen() -> None:
    session = traced(through_foreign_memory, "auto", numeric=True)
    assert session.sources["first.weight"].status == "blocked"
    assert session.verdict == "blocked"
    finding = session.findings[0]
    assert (finding.rule, finding.severity, finding.mechanism) == ("GS503", "error", "linear")
    assert "first.weight" in finding.cuts


def status_of(between: Between) -> str:
    return traced(between, "auto", numeric=True).sources["first.weight"].status


# --- surrogates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [Straight.apply, lambda x: x + (x.round() - x).detach()])
def test_a_surrogate_is_said_to_be_one_and_is_no_error(between: Between) -> None:
    session = traced(between, "auto", numeric=True)
    assert session.sources["first.weight"].status == "flows" and session.verdict == "flows"
    assert any("surrogate" in words for words in session.remarks)


class Quantised(torch.autograd.Function):
    """Rounds to steps of a size that it gives no gradient: straight-through for the one, and none for the other."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        return torch.round(x / size) * size

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def test_each_operand_of_a_function_is_judged_by_itself() -> None:
    class Layer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.size = nn.Parameter(torch.tensor(0.1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, Quantised.apply(self.weight, self.size))

    session = gradscope.trace(Layer(), torch.randn(3, 4), wrt=["weight", "size"], numeric=True)
    assert {name: source.status for name, source in session.sources.items()} == {"weight": "flows", "size": "blocked"}
    assert any(words.startswith("weight: the gradient is a surrogate") for words in session.remarks)


# --- the check itself ----------------------------------------------------------------------------------------


def test_it_is_deterministic_and_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    x = torch.randn(8, 4)
    torch.set_rng_state(state)
    first = gradscope.trace(model, x, numeric=True).to_dict()
    second = gradscope.trace(model, x, numeric=True).to_dict()
    assert first["sources"] == second["sources"] and first["remarks"] == second["remarks"]
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() is dtype
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype is before[name].dtype for name in before)


def test_a_model_that_does_not_run_in_float64_is_said_to_be_one() -> None:
    session = traced(lambda x: F.linear(x.float(), torch.eye(4, dtype=torch.float32)), numeric=True)
    assert any("Finite differences could not be taken" in words for words in session.remarks)
    assert session.verdict == "flows"


def test_many_sources_cost_few_passes_where_they_agree() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(20)])
    session = gradscope.trace(model, torch.randn(3, 4), numeric=True)
    said = next(words for words in session.remarks if words.startswith("Finite differences"))
    assert "40 sources" in said and int(said.split(", ")[1].split()[0]) < 12


class Counting(nn.Module):
    """Add up what it has seen in a plain attribute, as a metric does, and go backward in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.seen = torch.zeros(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layer(x).square().sum().backward()
        with torch.no_grad():
            self.seen += x.mean(0)
        return self.layer(x) * self.seen


def test_a_state_in_a_plain_attribute_is_the_same_in_every_evaluation() -> None:
    model = Counting()
    session = gradscope.trace(model, torch.ones(3, 4), numeric=True)
    assert session.sources["layer.weight"].status == session.sources["layer.bias"].status == "flows"
    assert model.seen.tolist() == [0, 0, 0, 0] and model.layer.weight.grad is None


def hard_sample(x: torch.Tensor) -> torch.Tensor:
    return F.gumbel_softmax(x, hard=True)


def test_torchs_own_straight_through_estimator_is_not_called_wrong() -> None:
    session = traced(hard_sample, "auto", numeric=True)
    assert session.verdict == "flows" and named(session, hard_sample) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_is_asked_with_the_modules_and_tensors_of_its_closure_in_float64(dtype: torch.dtype) -> None:
    """pytorch-metric-learning and piq, called as losses: a function is not copied, and its modules were float32."""
    torch.manual_seed(0)
    net, masks = nn.Linear(4, 4).to(dtype), {"last": torch.rand(4).to(dtype)}
    kept = [(each, each.dtype, each.detach().clone()) for each in (*net.parameters(), *masks.values())]

    def loss(x: torch.Tensor) -> torch.Tensor:
        shifted = net(x).exp()
        return torch.dot(masks["last"], (shifted / shifted.sum(-1, keepdim=True).detach()).mean(0))

    session = gradscope.trace(loss, torch.rand(3, 4, dtype=dtype), numeric=True)
    assert session.sources["net.weight"].status == "partial"
    assert any(words.startswith("Finite differences in float64: 2 sources") for words in session.remarks)
    assert all(each.dtype is before and torch.equal(each, value) for each, before, value in kept)


def test_the_tensors_of_a_losss_closure_are_in_float64_too() -> None:
    net, target = nn.Linear(4, 4), torch.rand(4)
    session = gradscope.trace(net, torch.rand(4), loss=lambda y: torch.dot(y, target), numeric=True)
    assert any(words.startswith("Finite differences in float64") for words in session.remarks)
    assert target.dtype is torch.float32
