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


# --- what real libraries showed ------------------------------------------------------------------------------


class Initialising(nn.Module):
    """Gives its parameters their values in the first call, as an ActNorm does (normflows) and a variational posterior
    (gpytorch)."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.is_done, self.always = False, always

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        if self.always or not self.is_done:
            self.is_done = True
            self.scale.data.copy_(self.scale.data / self.scale.data.norm() if self.always else 1 / x.std(0).detach())
        return x * self.scale


def test_a_parameter_that_the_first_call_gives_its_value_is_judged_by_the_next_one() -> None:
    model = Initialising()
    session = gradscope.trace(model, torch.rand(3, 4), wrt="*", numeric=True)
    assert {source.status for source in session.sources.values()} == {"flows"} and session.verdict == "flows"
    assert not model.is_done and model.scale.tolist() == [1] * 4


def test_of_a_parameter_that_every_call_writes_anew_nothing_is_claimed() -> None:
    session = gradscope.trace(Initialising(always=True), torch.rand(3, 4), numeric=True)
    assert session.sources["scale"].status == "flows"
    assert any(words.startswith("Finite differences were not taken for scale") for words in session.remarks)


@pytest.mark.parametrize("gives", [True, False])
def test_a_step_is_judged_by_what_it_goes_backward_from(gives: bool) -> None:
    net = nn.Linear(4, 4)
    x, optimizer = torch.rand(3, 4), torch.optim.Adam(net.parameters())

    def step(weigh: Any) -> Any:
        optimizer.zero_grad()
        out = net(x)
        loss = (out.square() * weigh(out)).mean()
        loss.backward()
        optimizer.step()
        return loss if gives else None

    for weigh, status in ((torch.Tensor.detach, "partial"), (torch.sigmoid, "flows")):
        session = gradscope.trace(step, weigh, numeric=True)
        assert session.sources["net.weight"].status == status and session.verdict == status
        assert any(words.startswith("Finite differences in float64: 2 sources") for words in session.remarks)
    assert not optimizer.state


def test_of_steps_between_backward_passes_nothing_is_claimed() -> None:
    net, x = nn.Linear(4, 4), torch.rand(3, 4)

    def steps() -> None:
        for _ in range(2):
            net(x).square().mean().backward()
            with torch.no_grad():
                net.weight -= 0.1 * net.weight.grad  # type: ignore[operator]

    session = gradscope.trace(steps, numeric=True)
    assert session.verdict == "flows"
    assert any("It makes a step between its backward passes" in words for words in session.remarks)


def test_a_source_that_may_not_be_moved_leaves_the_others_their_answers() -> None:
    """An exact Gaussian process of gpytorch refuses all inputs but those that it was given."""
    x, layer = torch.rand(3, 4), nn.Linear(4, 4)

    def forward(given: torch.Tensor) -> torch.Tensor:
        if not torch.equal(given, x):
            raise RuntimeError("not {what} it was trained on")
        return layer(given).exp() / layer(given).exp().sum().detach()

    session = gradscope.trace(forward, x.clone(), wrt="*", numeric=True)
    assert session.sources["layer.weight"].status == "partial"
    assert any("for input.0. Where that is moved: It does not run" in words for words in session.remarks)


class Unbreakable(nn.Module):
    """Cannot be copied: encodec and others keep a weight that was computed beforehand (weight_norm of old)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.utils.weight_norm(nn.Linear(4, 4))
        self.layer(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x).exp()
        return x / x.sum(-1, keepdim=True).detach()


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_cannot_be_copied_is_lent_other_tensors() -> None:
    model = Unbreakable()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    session = gradscope.trace(model, torch.rand(3, 4), numeric=True)
    assert session.sources["layer.weight_v"].status == "partial"
    assert any(words.startswith("Finite differences in float64") for words in session.remarks)
    assert all(torch.equal(before[name], each) for name, each in model.named_parameters())
    assert model.layer.weight.dtype is torch.float32 and model.layer.weight.grad_fn is not None


def test_a_cut_that_turns_out_to_cost_nothing_is_no_part_of_a_fix() -> None:
    def unheeded(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x.exp()
        return 0 * y

    session = traced(unheeded, "auto", numeric=True)
    assert session.sources["first.weight"].status == "unused"
    assert session.fix_set == [] and not session.fix_verified


def test_a_result_outside_torch_is_not_taken_for_one_that_depends_on_nothing() -> None:
    """skorch's predict_proba: every source was unused, and the session was not finished."""
    net = nn.Linear(4, 4)
    session = gradscope.trace(lambda x: net(x).detach().numpy(), torch.rand(3, 4), numeric=True)
    assert session.sources["net.weight"].status == "blocked"
    assert any("has left torch" in words for words in session.remarks)


class TakesAnOuterDerivative(torch.autograd.Function):
    """Needs the graph of what it is given: zuko's adjoint and the log-determinants of normflows do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        with torch.enable_grad():
            out = layer(x).exp()
            torch.autograd.grad(out.sum(), weight)
        ctx.save_for_backward(out.detach())
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad * ctx.saved_tensors[0], None, None


def test_a_custom_function_that_cannot_be_asked_alone_does_not_end_the_check() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return TakesAnOuterDerivative.apply(self.first(x), self.layer.weight, self.layer)

    session = gradscope.trace(Model(), torch.rand(3, 4), numeric=True)
    assert session.sources["first.weight"].status == "wrong"
    finding = next(each for each in session.findings if "first.weight" in each.cuts)
    assert any(words.startswith("A wrong gradient is off by") for words in session.remarks)
    assert finding.severity == "error"


class Adaptive(nn.Module):
    """Chooses the size of its steps by numbers that it takes out of torch, as torchsde does."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = 1 / (1 + self.rate(x).norm().item())
        out = x + step * self.rate(x).tanh()
        self.logged = out.norm().item()
        return out


def test_a_part_that_went_through_pythons_numbers_is_blamed_on_the_call_that_took_them_out() -> None:
    session = gradscope.trace(Adaptive(), torch.rand(3, 4), numeric=True)
    assert session.sources["rate.weight"].status == "partial" and session.verdict == "partial"
    found = [(each.rule, each.mechanism, each.severity) for each in session.findings]
    assert found == [("GS302", "item", "warning")]
    assert not any("surrogate" in words for words in session.remarks)


def test_differences_that_agree_by_chance_make_no_gradient_wrong() -> None:
    """A batch norm over two numbers is nearly a sign (segmentation_models_pytorch on small images)."""
    layer = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(layer.weight)

    def nearly_a_step(x: torch.Tensor) -> torch.Tensor:
        return x + 1e-8 * (x / 1e-8).tanh()

    session = gradscope.trace(lambda x: nearly_a_step(layer(x)), torch.ones(1, 4), numeric=True)
    assert session.sources["layer.weight"].status == "flows"
    assert any(words.startswith("Finite differences do not converge") for words in session.remarks)


def test_what_moves_in_one_direction_or_by_a_large_leap_only_is_in_steps_and_not_unused() -> None:
    """kornia's canny and monai's DiceMetric: a leap of half a weight's size changed nothing, and "flows" was said."""
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.25)
    for threshold in (-8.0, 8.0):
        session = gradscope.trace(lambda x, at=threshold: (layer(x) > at).double(), torch.ones(1, 4), numeric=True)
        assert session.sources["layer.weight"].status == "nondifferentiable" and session.verdict == "blocked"


def test_results_of_minus_infinity_do_not_hide_the_others() -> None:
    def masked(x: torch.Tensor) -> torch.Tensor:
        out = x * x.detach()
        return out.masked_fill(torch.eye(4).bool(), -math.inf)

    layer = nn.Linear(4, 4)
    for call, status in ((masked, "partial"), (lambda x: masked(x) * 0 + x, "flows")):
        session = gradscope.trace(lambda x, call=call: call(layer(x)), torch.rand(4, 4), numeric=True)
        assert session.sources["layer.weight"].status == status


def test_a_weight_that_is_a_tensor_of_several_is_left_out() -> None:
    """A weight quantised by torchao knows only the calls that a layer makes."""

    aten = torch.ops.aten

    class Pair(torch.Tensor):
        @staticmethod
        def __new__(cls, left: torch.Tensor) -> Pair:
            return torch.Tensor._make_wrapper_subclass(cls, left.shape, dtype=left.dtype)  # type: ignore[attr-defined, no-any-return]

        def __init__(self, left: torch.Tensor) -> None:
            self.left = left

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["left"], None

        @staticmethod
        def __tensor_unflatten__(inner: dict[str, torch.Tensor], meta: Any, size: Any, stride: Any) -> Pair:
            return Pair(inner["left"])

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (aten.detach.default, aten.clone.default, aten._to_copy.default):
                return cls(func(args[0].left, **(kwargs or {})))
            raise NotImplementedError(func)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.pair = nn.Parameter(Pair(torch.ones(4)), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * self.pair.left.sum()

    session = gradscope.trace(Model(), torch.rand(3, 4), wrt="layer.*", mode="real", numeric=True)
    assert session.sources["layer.weight"].status == "flows"
