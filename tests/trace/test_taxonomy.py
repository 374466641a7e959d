"""Every way a gradient stops at run time, each with a neighbour that looks alike and is fine.

Each case is what happens to a tensor between two layers. Real autograd is the judge: what it gives no
gradient must not be called ``flows``, and the rule and the line must be those of the case.
"""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from two import Between, Doubled, Two

import gradscope
from gradscope.session import Session


@dataclass(frozen=True)
class Case:
    """A function, the rule it is named by, the status of the layer before it, and the line (from its def)."""

    between: Between
    rule: str
    status: str = "blocked"
    line: int = 1


# --- recording is off ------------------------------------------------------------------------------


def no_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x * 2


def inference_mode(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        y = x * 2
    return y.clone()


def chosen_at_run_time(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad() if x.dim() else torch.enable_grad():
        return x * 2


def set_grad_enabled(x: torch.Tensor) -> torch.Tensor:
    with torch.set_grad_enabled(x.dim() == 0):
        return x * 2


def left_off(x: torch.Tensor) -> torch.Tensor:
    torch.set_grad_enabled(False)
    y = x * 2
    torch.set_grad_enabled(True)
    return y


@torch.no_grad()
def decorated(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.inference_mode()
def decorated_inference(x: torch.Tensor) -> torch.Tensor:
    return x + 2


def cleaned(x: torch.Tensor) -> torch.Tensor:
    return decorated_inference(x).clone()


def view_under_no_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x.view(-1, 4)


# --- history is dropped ----------------------------------------------------------------------------


def detach(x: torch.Tensor) -> torch.Tensor:
    return x.detach() * 2


def detach_in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    return y.detach_()


def data(x: torch.Tensor) -> torch.Tensor:
    return x.data * 2


def new_leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_() * 2


def rewrapped(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x) * 2


def new_tensor(x: torch.Tensor) -> torch.Tensor:
    return x.new_tensor(x) * 2


def parameter(x: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(x) * 2


def data_written(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y.data.copy_(x)
    return y * 2


def written_under_no_grad(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    with torch.no_grad():
        y.copy_(x)
    return y * 2


# --- values leave torch ----------------------------------------------------------------------------


def through_numpy(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.detach().numpy()) * 2


def through_numpy_arithmetic(x: torch.Tensor) -> torch.Tensor:
    array = x.detach().numpy()
    return torch.from_numpy(np.tanh(array))


def through_a_list(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x.tolist()) * 2


def through_item(x: torch.Tensor) -> torch.Tensor:
    scale = x.mean().item()
    return torch.ones(3, 4) * scale


def through_pickle(x: torch.Tensor) -> torch.Tensor:
    buffer = io.BytesIO(pickle.dumps(x.detach()))
    return pickle.load(buffer) * 2


def through_an_image(x: torch.Tensor) -> torch.Tensor:
    image = Image.fromarray((x.detach().numpy() * 255).astype(np.uint8))
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)


# --- no useful derivative --------------------------------------------------------------------------


def argmax(x: torch.Tensor) -> torch.Tensor:
    return F.one_hot(x.argmax(-1), 4).float()


def top_indices(x: torch.Tensor) -> torch.Tensor:
    return x.topk(4).indices.float()


def sorted_indices(x: torch.Tensor) -> torch.Tensor:
    return x.argsort(-1).float()


def compared(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).float()


def integers(x: torch.Tensor) -> torch.Tensor:
    return x.long().float()


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.round() * 2


def sign(x: torch.Tensor) -> torch.Tensor:
    return torch.sign(x)


def floored(x: torch.Tensor) -> torch.Tensor:
    return torch.div(x, 2, rounding_mode="floor")


def bucketed(x: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(x, torch.linspace(-1, 1, 8)).float()


def where_constants(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, torch.ones(3, 4), torch.zeros(3, 4))


# --- opaque to autograd ----------------------------------------------------------------------------


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        ctx.mark_non_differentiable(y)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> None:
        return None


def non_differentiable_function(x: torch.Tensor) -> torch.Tensor:
    return Opaque.apply(x)


CUTS = [
    Case(no_grad, "GS104"), Case(inference_mode, "GS103"), Case(chosen_at_run_time, "GS104"),
    Case(set_grad_enabled, "GS105"), Case(left_off, "GS105"), Case(cleaned, "GS101", line=-5),
    Case(view_under_no_grad, "GS104"),
    Case(detach, "GS201"), Case(detach_in_place, "GS201", line=2), Case(data, "GS202"), Case(new_leaf, "GS201"),
    Case(rewrapped, "GS203"), Case(new_tensor, "GS203"), Case(parameter, "GS203"), Case(data_written, "GS202", line=2),
    Case(written_under_no_grad, "GS104", line=2),
    Case(through_numpy, "GS201"), Case(through_numpy_arithmetic, "GS201"), Case(through_a_list, "GS302"),
    Case(through_item, "GS302"), Case(through_pickle, "GS201", line=1), Case(through_an_image, "GS201"),
    Case(argmax, "GS401", "nondifferentiable"), Case(top_indices, "GS401", "nondifferentiable"),
    Case(sorted_indices, "GS401", "nondifferentiable"), Case(compared, "GS402", "nondifferentiable"),
    Case(integers, "GS403", "nondifferentiable"), Case(rounded, "GS402", "nondifferentiable"),
    Case(sign, "GS402", "nondifferentiable"), Case(floored, "GS402", "nondifferentiable"),
    Case(bucketed, "GS402", "nondifferentiable"), Case(where_constants, "GS402", "nondifferentiable"),
    Case(non_differentiable_function, "GS501"),
]  # fmt: skip


# --- look-alikes -----------------------------------------------------------------------------------


def enabled_inside(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.enable_grad():
        return x * 2


def inference_off_inside(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.inference_mode(False):
        return x * 2


def passed_through(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = x.contiguous()
    return y * 2


def unused_under_no_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x.norm()
    return x * 2


def straight_through(x: torch.Tensor) -> torch.Tensor:
    return x + (x.round() - x).detach()


def straight_through_soft(x: torch.Tensor) -> torch.Tensor:
    soft = x.softmax(-1)
    hard = F.one_hot(soft.argmax(-1), 4).float()
    return hard - soft.detach() + soft


def gumbel(x: torch.Tensor) -> torch.Tensor:
    return F.gumbel_softmax(x, hard=True)


def as_tensor(x: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(x) * 2


def written_into_zeros(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(3, 4)
    y[:] = x
    return y


def written_into_a_view(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(6, 4)
    part = y[:3]
    part.copy_(x)
    return y[:3] + y[3:]


def half_and_back(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).float()


def masked(x: torch.Tensor) -> torch.Tensor:
    return x * (x > 0)


def indexed(x: torch.Tensor) -> torch.Tensor:
    return x.gather(1, x.argsort(-1))


def logged(x: torch.Tensor) -> torch.Tensor:
    assert math.isfinite(x.sum().item())
    return x * 2


def checkpointed(x: torch.Tensor) -> torch.Tensor:
    return checkpoint(torch.tanh, x, use_reentrant=True)


def checkpointed_new(x: torch.Tensor) -> torch.Tensor:
    return checkpoint(torch.tanh, x, use_reentrant=False)


def own_noise(x: torch.Tensor) -> torch.Tensor:
    return x * x.new_empty(3, 1).bernoulli_(0.9)


def sampled_with_gradient(x: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Normal(x, 1.0).rsample()


def custom_function(x: torch.Tensor) -> torch.Tensor:
    return Doubled.apply(x)


def scripted(x: torch.Tensor) -> torch.Tensor:
    return SCRIPTED(x)


SCRIPTED = torch.jit.script(nn.Sequential(nn.Tanh()))

LOOK_ALIKES = [
    enabled_inside, inference_off_inside, passed_through, unused_under_no_grad, straight_through, straight_through_soft,
    gumbel, as_tensor, written_into_zeros, written_into_a_view, half_and_back, masked, indexed, logged, checkpointed,
    checkpointed_new, own_noise, sampled_with_gradient, custom_function, scripted,
]  # fmt: skip


# --- the judge -------------------------------------------------------------------------------------


def reached(between: Between) -> dict[str, bool]:
    """Ask torch itself: who gets a gradient that is not zero throughout?"""
    model, x = Two(between), torch.randn(3, 4, requires_grad=True)
    model(x).sum().backward()
    named = {**dict(model.named_parameters()), "input.0": x}
    return {name: tensor.grad is not None and bool(tensor.grad.any()) for name, tensor in named.items()}


def traced(between: Between, mode: str) -> Session:
    model, x = Two(between), torch.randn(3, 4, requires_grad=True)
    return gradscope.trace(model, x, mode=mode)


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("case", CUTS, ids=lambda case: case.between.__name__)
@pytest.mark.filterwarnings("ignore")
def test_a_cut_is_named(case: Case, mode: str) -> None:
    session = traced(case.between, mode)
    truth = reached(case.between)
    assert not truth["first.weight"] and not truth["input.0"] and truth["second.weight"]
    assert session.sources["first.weight"].status == session.sources["input.0"].status == case.status
    assert session.sources["second.weight"].status == "flows"
    errors = [each for each in session.findings if each.severity != "note" and each.behind is None]
    line = case.between.__code__.co_firstlineno + case.line
    assert (errors[0].rule, errors[0].line) == (case.rule, line)
    assert len(errors) == 1
    assert session.verdict == "blocked"


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("between", LOOK_ALIKES, ids=lambda between: between.__name__)
@pytest.mark.filterwarnings("ignore")
def test_a_look_alike_is_no_cut(between: Between, mode: str) -> None:
    session = traced(between, mode)
    assert all(reached(between).values())
    assert [finding for finding in session.findings if finding.severity != "note"] == []
    assert session.verdict == "flows"
    assert all(source.status == "flows" for source in session.sources.values())


# --- what stops the gradient beside an operation that has no derivative --------------------------------------


def off_before_a_step(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = x * 3
    return y.round()


def off_after_a_step(x: torch.Tensor) -> torch.Tensor:
    y = x.round()
    with torch.no_grad():
        return y * 3


def detached_before_an_index(x: torch.Tensor) -> torch.Tensor:
    scores = x.detach().sigmoid()
    return nn.functional.one_hot(scores.argmax(-1), 4).float()


def only_the_step_is_off(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        index = x.argmax(-1)
    return nn.functional.one_hot(index, 4).float()


def with_surrogates(between: Between, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Return which tensors autograd reaches once every step has a differentiable surrogate in its place."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "round", lambda x: x * 1.0)
        patch.setattr(torch.Tensor, "argmax", lambda x, dim: x.softmax(dim))
        patch.setattr(nn.functional, "one_hot", lambda x, classes: x)
        return reached(between)


@pytest.mark.parametrize(
    ("between", "rules"),
    [
        (off_before_a_step, [("GS402", 3, None), ("GS104", 1, "F1")]),
        (off_after_a_step, [("GS402", 1, None), ("GS104", 2, None)]),
        (detached_before_an_index, [("GS401", 2, None), ("GS201", 1, "F1")]),
        (only_the_step_is_off, [("GS401", 2, None)]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("mode", ["real", "auto"])
def test_what_a_surrogate_would_not_help_against_is_told(
    between: Between, rules: list[Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = traced(between, mode)
    first = between.__code__.co_firstlineno
    assert [(each.rule, each.line - first, each.behind) for each in session.findings] == rules
    if between is not only_the_step_is_off:  # there the switch holds nothing but the step, and goes with it
        assert not with_surrogates(between, monkeypatch)["first.weight"]
    assert session.sources["first.weight"].status == "nondifferentiable"
