"""What people ask in threads, as they ask it: the line and the advice are those of the answers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradscope
from gradscope.errors import NotAnalysedError
from gradscope.findings import Finding
from gradscope.session import Session

MODES = pytest.mark.parametrize("mode", ["real", "auto"])
Step = Callable[[], Any]


def refused(step: Step, words: str) -> None:
    """Ask torch itself: the step raises, and says this."""
    with pytest.raises(RuntimeError, match=words):
        step()


def first(session: Session, rule: str) -> Finding:
    """Return the only finding that is no note."""
    (found,) = [each for each in session.findings if each.severity != "note"]
    assert found.rule == rule, found
    return found


def lines(function: Callable[..., Any], holding: str) -> int:
    """Return the line of a function that holds some text."""
    source, start = inspect.getsourcelines(function)
    return start + next(number for number, line in enumerate(source) if holding in line)


# --- backward passes inside a step of training -------------------------------------------------------------


class Gan:
    """https://github.com/pytorch/pytorch/issues/39141."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.g, self.d = nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.opt_g = torch.optim.Adam(self.g.parameters(), lr=0.1, **options)
        self.opt_d = torch.optim.Adam(self.d.parameters(), lr=0.1, **options)

    def step(self) -> None:
        fake = self.d(self.g(torch.randn(6, 5))).sigmoid()
        loss_d, loss_g = -(1 - fake).log().mean(), (1 - fake).log().mean()
        self.opt_d.zero_grad()
        loss_d.backward(retain_graph=True)
        self.opt_d.step()
        self.opt_g.zero_grad()
        loss_g.backward()

    def mended(self) -> None:
        fake = self.g(torch.randn(6, 5))
        loss_d = -(1 - self.d(fake.detach()).sigmoid()).log().mean()
        self.opt_d.zero_grad()
        loss_d.backward()
        self.opt_d.step()
        (1 - self.d(fake).sigmoid()).log().mean().backward()
        self.opt_g.step()


@MODES
@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}], ids=str)
def test_an_optimizer_that_steps_before_a_backward_pass_is_the_cause(mode: str, options: dict[str, bool]) -> None:
    refused(Gan(**options).step, "modified by an inplace operation")
    session = gradscope.trace(Gan(**options).step, mode=mode)
    cut = first(session, "GS603")
    assert (session.verdict, cut.line) == ("crashes", lines(Gan.step, "self.opt_d.step()"))
    assert cut.message.startswith("optimizer.step") and cut.fix.startswith("Step after the last backward pass")
    Gan().mended()
    session = gradscope.trace(Gan().mended, mode=mode)
    assert session.verdict == session.sources["self.g.weight"].status == "flows"
    assert [(each.rule, each.severity) for each in session.findings] == [("GS201", "note")]  # the discriminator's pass


def test_a_fused_optimizer_that_steps_before_a_backward_pass_makes_its_gradient_wrong() -> None:
    """Torch raises for the others, and not for this one: it moves no version counter (torch 2.14)."""
    right, spoiled = Gan(), Gan(fused=True)
    right.g.weight.grad = spoiled.g.weight.grad = None
    fake = right.d(right.g(torch.randn(6, 5))).sigmoid()
    (1 - fake).log().mean().backward()
    torch.manual_seed(0)
    spoiled = Gan(fused=True)
    spoiled.step()
    assert not torch.allclose(right.g.weight.grad, spoiled.g.weight.grad)
    session = gradscope.trace(Gan(fused=True).step, mode="real")
    cut = first(session, "GS603")
    assert cut.line == lines(Gan.step, "self.opt_d.step()") and "g.weight" in " ".join(cut.cuts)
    assert session.verdict != "flows"


class Recurrent(nn.Module):
    """https://github.com/pytorch/pytorch/issues/2769."""

    def __init__(self, before: Callable[[torch.Tensor], torch.Tensor] = lambda hidden: hidden) -> None:
        super().__init__()
        self.cell, self.hidden, self.before = nn.GRUCell(4, 4), torch.zeros(2, 4), before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hidden = self.cell(x, self.before(self.hidden))
        return self.hidden.sum()


def a_kept_state() -> Step:
    model = Recurrent()

    def step() -> None:
        for _ in range(2):
            model(torch.ones(2, 4)).backward()

    return step


def a_running_sum() -> Step:
    model = nn.Linear(4, 1)

    def step() -> None:
        total = torch.zeros(())
        for _ in range(2):
            total = total + model(torch.ones(2, 4)).square().sum()
            total.backward()

    return step


@MODES
@pytest.mark.parametrize(
    ("made", "function", "holding"),
    [(a_kept_state, Recurrent.forward, "self.cell("), (a_running_sum, a_running_sum, "total = total + ")],
)
def test_what_goes_on_with_a_freed_graph_is_the_cause(
    made: Callable[[], Step], function: Callable[..., Any], holding: str, mode: str
) -> None:
    refused(made(), "backward through the graph a second time")
    cut = first(gradscope.trace(made(), mode=mode), "GS608")
    assert cut.line == lines(function, holding)
    assert cut.fix.startswith("detach() what is kept")


@MODES
def test_one_call_says_that_a_state_is_kept_with_its_graph(mode: str) -> None:
    session = gradscope.trace(Recurrent(), torch.ones(2, 4), mode=mode)
    assert session.verdict == "flows" and session.unseen[0].startswith("hidden is kept with its graph")


@MODES
@pytest.mark.parametrize(
    "before", [torch.Tensor.detach, lambda h: h.clone().detach(), lambda h: h.data, torch.zeros_like]
)
def test_a_state_that_is_cut_off_before_it_is_used_is_fine(
    before: Callable[[torch.Tensor], torch.Tensor], mode: str
) -> None:
    model = Recurrent(before)
    for _ in range(2):
        model(torch.ones(2, 4)).backward()
    assert not gradscope.trace(Recurrent(before), torch.ones(2, 4), mode=mode).unseen


@MODES
def test_two_losses_over_one_graph_are_no_kept_state(mode: str) -> None:
    """https://discuss.pytorch.org/t/can-not-create-a-new-calculation-graph-after-the-backward-propagation/45026."""

    def step() -> None:
        hidden = body(torch.ones(2, 4))
        first_head(hidden).square().sum().backward()
        second_head(hidden).square().sum().backward()

    body, first_head, second_head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 1), nn.Linear(4, 1)
    refused(step, "backward through the graph a second time")
    cut = first(gradscope.trace(step, mode=mode), "GS608")
    assert cut.source.startswith("second_head") and cut.fix.startswith("Go backward once, from the sum")


@MODES
def test_a_closure_for_an_optimizer_is_looked_into(mode: str) -> None:
    layer = nn.Linear(4, 1)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=2)

    def step() -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = layer(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    assert gradscope.trace(step, mode=mode).sources["layer.weight"].status == "flows"


def test_a_gradient_that_is_none_says_where_gradients_gather() -> None:
    def step() -> None:
        w = layer.weight
        for _ in range(2):
            w.square().sum().backward()
            w = w - 0.1 * w.grad

    layer = nn.Linear(4, 1)
    with pytest.raises(NotAnalysedError, match="uses a gradient that is None") as raised:
        gradscope.trace(step)
    assert raised.value.hint.startswith("Gradients gather at leaves")


@MODES
def test_two_backward_passes_from_one_loss_are_told_so(mode: str) -> None:
    def step() -> None:
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        loss.backward()

    model = nn.Linear(4, 1)
    refused(step, "backward through the graph a second time")
    cut = first(gradscope.trace(step, mode=mode), "GS608")
    assert "retain_graph=True" in cut.fix and cut.source == "loss.backward()"


@MODES
def test_a_graph_from_before_the_run_leads_to_the_weights(mode: str) -> None:
    """https://github.com/karpathy/nn-zero-to-hero/issues/31: the forward pass lies outside the loop."""

    model = nn.Linear(4, 2)
    logits = model(torch.ones(2, 4))

    def step() -> None:
        model.zero_grad()
        logits.exp().sum().backward()

    assert gradscope.trace(step, mode=mode).sources["model.weight"].status == "flows"
    refused(step, "backward through the graph a second time")  # the trace went backward through it, as it was asked to


# --- derivatives taken in a forward pass --------------------------------------------------------------------


class Meta(nn.Module):
    """https://github.com/pytorch/pytorch/issues/73697: which of the tensors was it?"""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.used(x).square().mean()
        return sum(each.square().sum() for each in torch.autograd.grad(inner, self.parameters(), create_graph=True))


@MODES
def test_a_parameter_that_no_derivative_depends_on_is_named(mode: str) -> None:
    refused(lambda: Meta()(torch.ones(2, 4)), "not have been used in the graph")
    cut = first(gradscope.trace(Meta(), torch.ones(2, 4), mode=mode), "GS702")
    assert "does not depend on spare.bias, spare.weight:" in cut.message and "allow_unused=True" in cut.fix


class Energy(nn.Module):
    """https://github.com/pytorch/pytorch/issues/181177: forces of an attention kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        energy = F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0].square().sum()


@MODES
def test_a_second_derivative_that_torch_does_not_have_is_no_step(mode: str) -> None:
    refused(lambda: Energy()(torch.ones(1, 2, 5, 8)).backward(), "is not implemented")
    session = gradscope.trace(Energy(), torch.ones(1, 2, 5, 8), mode=mode)
    assert first(session, "GS502").fix.startswith("Compute what is derived")
    assert {source.status for source in session.sources.values()} == {"blocked"} and not session.fix_verified


class Optimising(torch.autograd.Function):
    """https://github.com/pytorch/pytorch/issues/32091."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x).requires_grad_()
        (x * y).sum().backward()
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Optimising.apply(self.layer(x))


@MODES
def test_nothing_is_recorded_inside_a_custom_function(mode: str) -> None:
    refused(lambda: Inside()(torch.ones(2, 4)), "does not require grad")
    cut = first(gradscope.trace(Inside(), torch.ones(2, 4), mode=mode), "GS501")
    assert "enable_grad" in cut.fix and cut.line == lines(Optimising.forward, "backward()")


@MODES
def test_a_function_whose_refusal_was_caught_is_not_blamed_for_the_next_one(mode: str) -> None:
    class Tries(Inside):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with contextlib.suppress(RuntimeError):
                super().forward(x)
            hidden = self.layer(x).detach()
            hidden.register_hook(print)
            return hidden

    cut = first(gradscope.trace(Tries(), torch.ones(2, 4), mode=mode), "GS201")
    assert cut.mechanism == "detach"


# --- what does not connect -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor


class Checkpointed(nn.Module):
    """https://github.com/pytorch/pytorch/issues/124725."""

    def __init__(self, out: Callable[[torch.Tensor], Any], hidden: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.stem, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.out, self.hidden = out, hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hidden(checkpoint(lambda h: self.out(self.layer(h)), self.stem(x), use_reentrant=True)).sum()


@MODES
@pytest.mark.parametrize(
    ("out", "hidden", "status"),
    [
        (Output, lambda out: out.hidden, "blocked"),
        (lambda h: {"h": h}, lambda out: out["h"], "blocked"),
        (lambda h: (h, [h * 2]), lambda out: out[0] + out[1][0], "partial"),
        (lambda h: (h, h * 2), lambda out: out[0] + out[1], "flows"),
    ],
)
def test_a_reentrant_checkpoint_connects_tensors_and_not_what_holds_some(
    out: Callable[..., Any], hidden: Callable[..., Any], status: str, mode: str
) -> None:
    model = Checkpointed(out, hidden)
    result = model(torch.ones(2, 4))
    assert result.requires_grad == (status != "blocked")
    session = gradscope.trace(model, torch.ones(2, 4), mode=mode)
    assert session.sources["layer.weight"].status == status
    if status != "flows":
        cut = first(session, "GS604")
        assert "a list, a dict or an object" in cut.message and "tuple" in cut.fix
        assert session.fix_verified == (status == "blocked")  # a part that is lost is no cut to heal


class Normed(nn.Module):
    """https://github.com/pytorch/pytorch/issues/26596."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.weight = nn.Embedding(3, 5, max_norm=1.0), nn.Parameter(torch.ones(7, 5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        everything = self.table.weight @ self.weight.t()
        some = self.table(ids) @ self.weight.t()
        return everything.sum() + some.sum()


@MODES
def test_an_embedding_that_norms_its_weight_is_the_only_cause(mode: str) -> None:
    refused(lambda: Normed()(torch.tensor([1, 2])).backward(), "modified by an inplace operation")
    session = gradscope.trace(Normed(), torch.tensor([1, 2]), mode=mode)
    assert session.verdict == "crashes" and first(session, "GS603").line == lines(Normed.forward, "self.table(ids)")
    assert {source.status for source in session.sources.values()} == {"blocked"}


class Counted(nn.Module):
    """https://github.com/pytorch/pytorch/issues/95110."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, classes = torch.max(self.layer(x), 1)
        classes.requires_grad = True
        return classes.float().mean()


@MODES
def test_an_index_that_is_to_require_a_gradient_is_an_index(mode: str) -> None:
    refused(lambda: Counted()(torch.ones(2, 4)), "can require gradients")
    session = gradscope.trace(Counted(), torch.ones(2, 4), mode=mode)
    cut = first(session, "GS401")
    assert session.verdict == "crashes" and "no useful derivative" in cut.message
    assert cut.line == lines(Counted.forward, "torch.max")


class Stateful(nn.Module):
    """https://github.com/pytorch/pytorch/issues/10737."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(self.layer, self.layer.state_dict(), (x,))


@MODES
def test_a_detach_inside_torch_is_told_by_what_was_called(mode: str) -> None:
    assert not Stateful()(torch.ones(2, 4)).requires_grad
    cut = first(gradscope.trace(Stateful(), torch.ones(2, 4), mode=mode), "GS201")
    assert cut.message.startswith("state_dict (detach) in") and "keep_vars=True" in cut.fix


class Related(nn.Module):
    """https://github.com/pytorch/pytorch/issues/632 and, in a module, https://github.com/pytorch/pytorch/issues/22860."""

    def __init__(self, **kept: Any) -> None:
        super().__init__()
        self.head = nn.Linear(4, 1)
        for name, value in kept.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x) if hasattr(self, "layer") else self.use(x))

    def use(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers["a"][0](x) if hasattr(self, "layers") else x * self.scale.float()


@MODES
@pytest.mark.parametrize(
    ("kept", "names"),
    [
        (lambda: {"layers": {"a": [nn.Linear(4, 4)]}}, ["layers.a.0.bias", "layers.a.0.weight"]),
        (lambda: {"scale": nn.Parameter(torch.ones(4)).to(torch.float64)}, ["scale"]),
        (lambda: {"scale": torch.ones(4, requires_grad=True)}, ["scale"]),
        (lambda: {"layer": nn.Linear(4, 4), "other": [nn.Linear(4, 4)]}, []),
    ],
)
def test_weights_that_are_used_and_not_registered_are_noted(
    kept: Callable[[], dict[str, Any]], names: list[str], mode: str
) -> None:
    model = Related(**kept())
    session = gradscope.trace(model, torch.ones(2, 4), mode=mode)
    assert session.verdict == "flows" and not session.unseen
    notes = [each for each in session.findings if each.rule == "GS701"]
    assert [list(each.cuts) for each in notes] == ([names] if names else [])
    assert not set(names) & {name for name, _ in model.named_parameters()}


class Stale:
    """https://github.com/facebookresearch/mmf/issues/104: the optimizer was made before the head."""

    def __init__(self, *, returns: bool = False) -> None:
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.returns = returns

    def step(self) -> torch.Tensor | None:
        self.optimizer.zero_grad()
        loss = self.net(torch.ones(2, 4)).square().sum()
        loss.backward(retain_graph=True)
        self.optimizer.step()
        return loss if self.returns else None


@MODES
@pytest.mark.parametrize("returns", [True, False])
def test_what_no_optimizer_holds_is_noted_at_its_step(returns: bool, mode: str) -> None:
    trainer = Stale(returns=returns)
    assert not gradscope.trace(trainer.step, mode=mode).findings
    trainer.net[1] = nn.Linear(4, 3)
    before = trainer.net[1].weight.detach().clone()
    trainer.step()
    assert torch.equal(trainer.net[1].weight, before)
    session = gradscope.trace(trainer.step, mode=mode)
    (note,) = session.findings
    assert (session.verdict, note.rule, note.severity) == ("flows", "GS701", "note")
    assert note.cuts == ("self.net.1.bias", "self.net.1.weight") and note.source == "self.optimizer.step()"
    trainer.net[1].requires_grad_(False)
    assert not gradscope.trace(trainer.step, mode=mode).findings


class MakesItsOwn(nn.Module):
    """A step as in Lightning's manual optimization, with an optimizer that is made in it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        optimizer = torch.optim.Adam(self.parameters())
        loss = self.net(x).square().sum()
        loss.backward()
        optimizer.step()
        return loss


@MODES
def test_an_optimizer_that_is_made_in_the_step_holds_what_it_is_given(mode: str) -> None:
    session = gradscope.trace(MakesItsOwn(), torch.ones(2, 4), entry="step", mode=mode)
    assert session.verdict == "flows" and not session.findings


def test_a_layer_that_is_registered_under_another_name_is_not_noted() -> None:
    layer = nn.Linear(4, 4)
    model = Related(layer=layer, layers=[layer], weights=[layer.weight])
    for mode in ("real", "auto"):
        assert not gradscope.trace(model, torch.ones(2, 4), mode=mode).findings


@MODES
def test_a_refusal_in_a_model_of_torchs_modules_is_told_at_the_module(mode: str) -> None:
    """https://github.com/pytorch/pytorch/issues/61519."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    model[0].register_full_backward_hook(lambda module, before, after: None)
    refused(lambda: model(torch.ones(2, 4)), "modified inplace")
    cut = first(gradscope.trace(model, torch.ones(2, 4), mode=mode), "GS603")
    assert cut.path.endswith("activation.py") and cut.module == "1" and "inplace=True" in cut.fix


@MODES
def test_a_model_that_keeps_an_activation_is_not_copied(mode: str) -> None:
    """https://github.com/pytorch/pytorch/issues/54580."""

    def step() -> torch.Tensor:
        out = model(torch.ones(2, 4))
        copied = copy.deepcopy(model)
        with torch.no_grad():
            target = copied(torch.ones(2, 4))
        return (out - target).sum()

    model = Recurrent()
    refused(step, "support the deepcopy protocol")
    found = gradscope.trace(step, mode=mode).findings
    assert found[0].rule == "GS203" and "detach() it where it is kept" in found[0].fix
    assert not any("inference tensors" in each.message for each in found)


# --- what is said beside the verdict -------------------------------------------------------------------------


@MODES
def test_that_nothing_requires_a_gradient_is_said(mode: str) -> None:
    """https://github.com/jacobgil/pytorch-grad-cam/issues/80: the layers are frozen, and so is the image."""
    frozen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).requires_grad_(False)
    refused(lambda: frozen(torch.ones(2, 4)).sum().backward(), "does not require grad")

    def said(x: torch.Tensor) -> bool:
        remarks = gradscope.trace(frozen, x, mode=mode).remarks
        return any(each.startswith("As given, nothing requires a gradient") for each in remarks)

    assert said(torch.ones(2, 4)) and not said(torch.ones(2, 4, requires_grad=True))
    frozen[1].requires_grad_(True)
    assert not said(torch.ones(2, 4))


@MODES
def test_what_the_result_does_not_depend_on_is_named(mode: str) -> None:
    """https://github.com/pytorch/pytorch/issues/68862: which parameters does find_unused_parameters find?"""
    session = gradscope.trace(Spare(), torch.ones(2, 4), mode=mode)
    assert any("does not depend on spare (2)" in each and "find_unused_parameters" in each for each in session.remarks)


class Spare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    "loss", [lambda out: torch.tensor([out.sum()]), lambda out: torch.tensor(out.detach().numpy())]
)
def test_numbers_that_are_asked_for_are_the_reason_to_compute(loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
    session = gradscope.trace(nn.Linear(4, 2), torch.ones(2, 4), loss=loss)
    assert "it needs computed numbers" in session.remarks[0]


class SwitchedOff(nn.Module):
    """https://github.com/kuprel/min-dalle/pull/24."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.set_grad_enabled(False)
        return self.layer(x)


@MODES
def test_a_switch_that_is_never_set_back_leaks(mode: str) -> None:
    cut = first(gradscope.trace(SwitchedOff(), torch.ones(2, 4), mode=mode), "GS107")
    assert cut.fix.startswith("Switch it back") and cut.source == "torch.set_grad_enabled(False)"
