"""What torch's own normalisations leave unrecorded on purpose: no finding, and no name beside the line at fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn.utils import parametrizations, prune
from two import given

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
