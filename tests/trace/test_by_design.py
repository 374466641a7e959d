"""What is left unrecorded on purpose and costs nothing: no finding, and no name beside the line at fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn.utils import parametrizations, prune
from two import Between, arriving, given, named, traced

import gradscope

Wrapped = Callable[[nn.Module], nn.Module]


def spectral(layer: nn.Module) -> nn.Module:
    return parametrizations.spectral_norm(layer)


def old_spectral(layer: nn.Module) -> nn.Module:
    return nn.utils.spectral_norm(layer)


def weight(layer: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(layer)


def orthogonal(layer: nn.Module) -> nn.Module:
    return parametrizations.orthogonal(layer)


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


class Normalised(nn.Module):
    def __init__(self, wrapped: Wrapped, *, quiet: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = wrapped(nn.Linear(4, 4))
        self.second = nn.Linear(4, 4)
        self.quiet = quiet

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(not self.quiet):
            hidden = self.first(x)
        return self.second(hidden)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"mode": "real"}, {"mode": "auto"}, {"mode": "real", "numeric": True}], ids=str)
@pytest.mark.parametrize("wrapped", [spectral, old_spectral, weight, orthogonal, pruned])
def test_a_normalised_layer_trains(wrapped: Wrapped, options: dict[str, object]) -> None:
    model = Normalised(wrapped)
    model(given()).square().sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in model.parameters())
    session = gradscope.trace(Normalised(wrapped), given(), **options)
    assert (session.verdict, session.findings) == ("flows", [])
    assert {source.status for source in session.sources.values()} == {"flows"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("wrapped", [spectral, old_spectral])
def test_so_does_one_among_modules_of_torch_alone(wrapped: Wrapped, mode: str) -> None:
    session = gradscope.trace(nn.Sequential(wrapped(nn.Linear(4, 4)), nn.Tanh()), given(), mode=mode)
    assert (session.verdict, session.findings) == ("flows", [])


class Quantised(nn.Module):
    """Quantises what it computes by a scale that is watched, or by one that is cut off by hand."""

    def __init__(self, *, by_hand: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.fake = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
        self.by_hand = by_hand

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(x)
        return hidden * hidden.detach().abs().amax() if self.by_hand else self.fake(hidden)


@pytest.mark.filterwarnings("ignore")
def test_what_an_observer_of_quantisation_sees_is_no_cut() -> None:
    session = gradscope.trace(Quantised(), given())
    assert (session.verdict, session.findings) == ("flows", [])
    session = gradscope.trace(Quantised(by_hand=True), given())
    assert [(each.rule, each.severity) for each in session.findings] == [("GS201", "warning")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("wrapped", [spectral, old_spectral])
def test_only_the_switch_at_fault_is_named_around_it(wrapped: Wrapped, mode: str) -> None:
    session = gradscope.trace(Normalised(wrapped, quiet=True), given(), mode=mode)
    assert [(each.rule, each.function) for each in session.findings] == [("GS105", "Normalised.forward")]
    assert session.fix_verified


# --- straight through: what is added and taken off again --------------------------------------------------------


def rounded_first(x: torch.Tensor) -> torch.Tensor:
    return x.round().detach() + x - x.detach()


def rounded_without_recording(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        error = x.round() - x
    return x + error


def scaled_by_what_is_cut_off(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().mean().detach()
    return x + (scale * x.sign() - x).detach()


def error_taken_off(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scale = x.abs().amax() / 7
    rest = (x - (x / scale).round() * scale).detach()
    return (x - rest).view(3, 4)


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize(
    "between", [rounded_first, rounded_without_recording, scaled_by_what_is_cut_off, error_taken_off]
)
def test_what_is_added_and_taken_off_again_goes_straight_through(between: Between, mode: str) -> None:
    straight = arriving(torch.clone)["input.0"]
    assert torch.allclose(arriving(between)["input.0"], straight)
    session = traced(between, mode)
    assert (session.verdict, session.findings) == ("flows", [])


def added_to_itself(x: torch.Tensor) -> torch.Tensor:
    return x + x.detach()


def residual(x: torch.Tensor) -> torch.Tensor:
    return x + (x + x.sin()).detach()


def scale_used_elsewhere(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().mean().detach()
    return (x + (scale * x.sign() - x).detach()) * scale


@pytest.mark.parametrize(("between", "line"), [(added_to_itself, 1), (residual, 1), (scale_used_elsewhere, 1)])
def test_what_is_only_added_stays_a_cut(between: Between, line: int) -> None:
    assert named(traced(between), between) == [("warning", "GS201", line)]
    session = traced(between, "auto", numeric=True)
    assert session.sources["first.weight"].status == "partial"


def scored(x: torch.Tensor) -> torch.Tensor:
    """Pyro's Trace_ELBO: the score function's surrogate has a gradient and, taken off again, no value."""
    reward, score = x.square(), x.log_softmax(-1)
    surrogate = score * reward.detach()
    return reward + (surrogate - surrogate.detach())


def scored_by_a_factor(x: torch.Tensor) -> torch.Tensor:
    score = x.log_softmax(-1) * x.sigmoid().detach()
    return (score - score.detach()).exp() * x.square()


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("between", [scored, scored_by_a_factor])
def test_what_a_surrogate_for_a_sample_is_made_of_is_not_missed(between: Between, mode: str) -> None:
    session = traced(between, mode)
    assert (session.verdict, session.findings) == ("flows", [])
    numeric = traced(between, mode, numeric=True)
    assert numeric.verdict == "flows" and any("surrogate" in words for words in numeric.remarks)


def reward_used_elsewhere(x: torch.Tensor) -> torch.Tensor:
    reward = x.square().detach()
    surrogate = x.log_softmax(-1) * reward
    return reward + (surrogate - surrogate.detach())


def test_a_reward_that_counts_by_itself_stays_a_cut() -> None:
    session = traced(reward_used_elsewhere)
    assert named(session, reward_used_elsewhere) == [("warning", "GS201", 1)]


def test_what_is_given_out_beside_a_straight_through_estimator_stays_a_cut() -> None:
    class Quantising(nn.Module):
        def __init__(self, gives_scale: bool) -> None:
            super().__init__()
            self.layer, self.gives_scale = nn.Linear(4, 4), gives_scale

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x = self.layer(x)
            scale = x.abs().mean().detach()
            out = x + (scale * x.sign() - x).detach()
            return (out, scale) if self.gives_scale else (out,)

    assert [gradscope.trace(Quantising(gives), given()).verdict for gives in (False, True)] == ["flows", "partial"]


# --- softmax: what is shifted by its largest value ------------------------------------------------------------


def shifted_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = (x - x.detach().amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def shifted_without_recording(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        largest = x.max(-1, keepdim=True).values
    weights = torch.exp(x - largest)
    return (weights @ torch.eye(4)) / weights.sum(-1, keepdim=True)


def logsumexp(x: torch.Tensor) -> torch.Tensor:
    largest = x.max(-1, keepdim=True)[0].detach()
    return x - ((x - largest).exp().sum(-1, keepdim=True).log() + largest)


def log_softmax_without_itself(x: torch.Tensor) -> torch.Tensor:
    """As contrastive losses do it."""
    logits = x - x.max(dim=1, keepdim=True)[0].detach()
    others = logits.masked_fill(torch.eye(3, 4).bool(), -1e9)
    return logits - (others.exp() * (1 - torch.eye(3, 4))).sum(1, keepdim=True).log()


def cross_entropy(x: torch.Tensor) -> torch.Tensor:
    shifted = x - x.max(-1, keepdim=True).values.detach()
    return (shifted.exp().sum(-1, keepdim=True).log() - shifted[:, :1]).expand(3, 4)


def largest_put_back(x: torch.Tensor) -> torch.Tensor:
    largest = x.amax(-1, keepdim=True).detach()
    return (largest + (x - largest).logsumexp(-1, keepdim=True)).expand(3, 4)


def softmax_over_neighbours(x: torch.Tensor) -> torch.Tensor:
    """As graph networks do it: each row belongs to a node."""
    node = torch.tensor([[0], [1], [0]]).expand(3, 4)
    largest = x.new_zeros(2, 4).scatter_reduce_(0, node, x.detach(), "amax", include_self=False)
    weights = (x - largest.index_select(0, node[:, 0])).exp()
    return weights / x.new_zeros(2, 4).scatter_add_(0, node, weights).index_select(0, node[:, 0])


def exact(between: Between) -> torch.Tensor:
    """Return the input's gradient where nothing is cut off: torch.softmax in the place of what is written out."""
    whole = {
        shifted_softmax: lambda x: x.softmax(-1),
        shifted_without_recording: lambda x: x.softmax(-1),
        logsumexp: lambda x: x.log_softmax(-1),
        log_softmax_without_itself: lambda x: (
            x - x.masked_fill(torch.eye(3, 4).bool(), -1e9).logsumexp(1, keepdim=True)
        ),
        cross_entropy: lambda x: -x.log_softmax(-1)[:, :1].expand(3, 4),
        largest_put_back: lambda x: x.logsumexp(-1, keepdim=True).expand(3, 4),
        softmax_over_neighbours: lambda x: torch.stack([*x[[0, 2]].softmax(0), torch.ones(4)])[[0, 2, 1]],
    }[between]
    gradient = arriving(whole)["input.0"]
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("between", [
    shifted_softmax, shifted_without_recording, logsumexp, log_softmax_without_itself, cross_entropy, largest_put_back,
    softmax_over_neighbours,
])  # fmt: skip
def test_a_softmax_shifted_by_its_largest_value_misses_nothing(between: Between, mode: str) -> None:
    assert torch.allclose(arriving(between)["input.0"], exact(between), atol=1e-6)
    session = traced(between, mode)
    assert (session.verdict, session.findings) == ("flows", [])


def shifted_only(x: torch.Tensor) -> torch.Tensor:
    return (x - x.amax(-1, keepdim=True).detach()).exp()


def shifted_for_a_square(x: torch.Tensor) -> torch.Tensor:
    return (x - x.amax(-1, keepdim=True).detach()).square()


def shift_used_elsewhere(x: torch.Tensor) -> torch.Tensor:
    largest = x.amax(-1, keepdim=True).detach()
    return (x - largest).exp() / (x - largest).exp().sum(-1, keepdim=True) * largest


def test_a_shift_that_is_given_out_stays_a_cut() -> None:
    class Shifting(nn.Module):
        def __init__(self, out: str) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(4, 4), out

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden = self.layer(x)
            largest = hidden.detach().amax(-1, keepdim=True)
            shifted = hidden - largest
            return shifted.softmax(-1), {"shift": largest, "shifted": shifted, "none": torch.ones(1)}[self.out]

    verdicts = [gradscope.trace(Shifting(out), given()).verdict for out in ("none", "shift", "shifted")]
    assert verdicts == ["flows", "partial", "partial"]


def shifted_and_given_on(x: torch.Tensor) -> torch.Tensor:
    shifted = x - x.amax(-1, keepdim=True).detach()
    return shifted * shifted.softmax(-1)


def log_of_a_sum(x: torch.Tensor) -> torch.Tensor:
    return (x - x.amax(-1, keepdim=True).detach()).exp().sum(-1, keepdim=True).log().expand(3, 4)


def log_of_a_sum_in_one(x: torch.Tensor) -> torch.Tensor:
    return (x - x.amax(-1, keepdim=True).detach()).logsumexp(-1, keepdim=True).expand(3, 4)


def log_less_the_largest(x: torch.Tensor) -> torch.Tensor:
    largest = x.amax(-1, keepdim=True).detach()
    return ((x - largest).exp().sum(-1, keepdim=True).log() - largest).expand(3, 4)


def log_taken_off_the_unshifted(x: torch.Tensor) -> torch.Tensor:
    return x - (x - x.amax(-1, keepdim=True).detach()).exp().sum(-1, keepdim=True).log()


def shifted_less_its_softmax(x: torch.Tensor) -> torch.Tensor:
    shifted = x - x.amax(-1, keepdim=True).detach()
    return shifted - shifted.softmax(-1)


@pytest.mark.parametrize("between", [
    shifted_only, shifted_for_a_square, shift_used_elsewhere, shifted_and_given_on, log_of_a_sum, log_of_a_sum_in_one,
    log_less_the_largest, log_taken_off_the_unshifted, shifted_less_its_softmax,
])  # fmt: skip
def test_a_shift_that_something_else_is_made_of_stays_a_cut(between: Between) -> None:
    assert [(severity, rule) for severity, rule, _ in named(traced(between), between)] == [("warning", "GS201")]
