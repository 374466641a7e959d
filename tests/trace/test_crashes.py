"""What autograd refuses in a forward pass, mapped to the call or to what made it so; and as the user runs it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from two import Between, arriving, given, named, traced

import gradscope
from gradscope.errors import NotAnalysedError


def numpy_of_a_grad_tensor(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.numpy())


def into_out(x: torch.Tensor) -> torch.Tensor:
    return torch.add(x, x, out=torch.empty(3, 4))


def deep_copy(x: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(x)


def in_place_on_a_leaf(x: torch.Tensor) -> torch.Tensor:
    weight = torch.ones(3, 4, requires_grad=True)
    weight.mul_(x)
    return weight


def in_place_on_a_view_of_a_leaf(x: torch.Tensor) -> torch.Tensor:
    weight = torch.ones(3, 4, requires_grad=True)
    weight[0].mul_(x[0])
    return weight


def in_place_on_one_of_many_views(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    first, _ = y.split(2, dim=1)
    first.add_(1)
    return y


def flag_off(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.requires_grad = False
    return y


def hook_behind_a_cut(x: torch.Tensor) -> torch.Tensor:
    y = x.detach()
    y.register_hook(print)
    return y


def gradient_behind_a_cut(x: torch.Tensor) -> torch.Tensor:
    y = x.detach()
    return torch.autograd.grad(y.sum(), y)[0]


def weights_of_a_loss(x: torch.Tensor) -> torch.Tensor:
    losses = F.binary_cross_entropy(x.sigmoid(), torch.ones(3, 4), weight=x.exp(), reduction="none")
    return losses


def resized(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).resize_(3, 4)


def function_of_each_number(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).apply_(float)


REFUSED = [
    (weights_of_a_loss, "GS502", 1),
    (resized, "GS603", 1),
    (function_of_each_number, "GS301", 1),
    (numpy_of_a_grad_tensor, "GS301", 1),
    (into_out, "GS603", 1),
    (deep_copy, "GS203", 1),
    (in_place_on_a_leaf, "GS603", 2),
    (in_place_on_a_view_of_a_leaf, "GS603", 2),
    (in_place_on_one_of_many_views, "GS603", 3),
    (flag_off, "GS204", 2),
    (hook_behind_a_cut, "GS201", 1),
    (gradient_behind_a_cut, "GS201", 1),
]


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize(("between", "rule", "line"), REFUSED, ids=lambda value: getattr(value, "__name__", None))
def test_a_call_that_autograd_refuses_is_named(between: Between, rule: str, line: int, mode: str) -> None:
    with pytest.raises(RuntimeError):
        arriving(between)
    session = traced(between, mode)
    assert session.verdict == "crashes"
    assert named(session, between)[0] == ("error", rule, line)
    assert session.crash["phase"] == "forward"


def numpy_after_detach(x: torch.Tensor) -> torch.Tensor:
    return x * float(x.detach().numpy().shape[0])


def fresh_copy(x: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(x.detach()).sum() * 0 + x


def in_place_on_a_clone(x: torch.Tensor) -> torch.Tensor:
    weight = torch.ones(3, 4, requires_grad=True).clone()
    weight.mul_(x)
    return weight


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("between", [numpy_after_detach, fresh_copy, in_place_on_a_clone])
def test_the_neighbours_are_no_crash(between: Between, mode: str) -> None:
    assert arriving(between)["first.weight"].any()
    session = traced(between, mode)
    assert session.verdict in ("flows", "partial") and not any(row[0] == "error" for row in named(session, between))


def written_after_a_switch(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = x.exp()
    return y.mul_(2)


@pytest.mark.parametrize("mode", ["real", "auto"])
def test_what_would_raise_once_a_cut_is_gone_is_no_crash_as_given(mode: str) -> None:
    assert arriving(written_after_a_switch)["first.weight"] is None
    session = traced(written_after_a_switch, mode)
    assert session.verdict == "blocked" and session.crash is None
    assert [(each.rule, each.behind) for each in session.findings] == [("GS104", None), ("GS603", "F1")]


def copied_behind_a_cut(x: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy((x * 2).detach())


@pytest.mark.parametrize("mode", ["real", "auto"])
def test_a_call_that_autograd_would_refuse_lies_behind_the_cut_that_spares_it(mode: str) -> None:
    assert arriving(copied_behind_a_cut)["first.weight"] is None
    session = traced(copied_behind_a_cut, mode)
    assert [(each.rule, each.behind) for each in session.findings] == [("GS201", None), ("GS203", "F1")]
    assert session.fix_verified and session.fix_set == ["F1", "F2"]


def test_a_crash_that_is_not_autograds_is_not_analysed() -> None:
    with pytest.raises(NotAnalysedError, match="shapes cannot be multiplied"):
        traced(lambda x: x @ x)


# --- inference tensors -----------------------------------------------------------------------------------


class Cache(nn.Module):
    """A table that is made once, under inference_mode, and used with autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.tables: dict[int, torch.Tensor] = {}

    @torch.inference_mode()
    def table(self, size: int) -> torch.Tensor:
        if size not in self.tables:
            self.tables[size] = torch.arange(size).float().repeat(3, 1)
        return self.tables[size]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.table(4)


class AddedCache(Cache):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.table(4)


@pytest.mark.parametrize("mode", ["real", "structural"])
def test_a_table_made_for_inference_is_mapped_to_the_decorator_and_the_cache_is_put_back(mode: str) -> None:
    model = Cache()
    session = gradscope.trace(model, given(), mode=mode)
    assert session.verdict == "crashes" and session.fix_verified
    assert [(each.rule, each.function) for each in session.findings] == [("GS101", "Cache.table")]
    assert model.tables == {}


@pytest.mark.parametrize("mode", ["real", "structural"])
def test_a_cache_poisoned_before_is_mapped_to_its_use(mode: str) -> None:
    model = Cache()
    model.table(4)
    session = gradscope.trace(model, given(), mode=mode)
    assert session.verdict == "crashes"
    assert [each.rule for each in session.findings] == ["GS602"]


class Handed(nn.Module):
    """A head on what somebody else's encoder gives out, which two layers of decorators make for inference."""

    def __init__(self, hand_on: Between) -> None:
        super().__init__()
        self.encoder, self.head, self.hand_on = nn.Linear(4, 4), nn.Linear(4, 2), hand_on

    @torch.inference_mode()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)

    @torch.inference_mode()
    def run(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.hand_on(self.encode(x)))


@pytest.mark.parametrize("mode", ["real", "structural"])
@pytest.mark.parametrize(
    "hand_on",
    [lambda y: y[:2], torch.as_tensor, lambda y: y.float(), lambda y: torch.reshape(y, (-1, 4))],
    ids=["slice", "as_tensor", "cast", "reshape"],
)
def test_what_hands_an_inference_tensor_on_is_not_to_blame(mode: str, hand_on: Between) -> None:
    session = gradscope.trace(Handed(hand_on), given(), mode=mode)
    assert session.verdict == "crashes" and session.fix_verified
    first, second = session.findings
    assert (first.rule, first.function, first.behind) == ("GS101", "Handed.encode", None)
    assert (second.rule, second.function, second.behind) == ("GS101", "Handed.run", first.id)


@pytest.mark.parametrize("mode", ["real", "structural"])
def test_a_poisoned_cache_that_is_only_added_is_no_finding(mode: str) -> None:
    model = AddedCache()
    model.table(4)
    model(given()).sum().backward()
    assert gradscope.trace(model, given(), mode=mode).findings == []


@pytest.mark.parametrize("mode", ["real", "structural"])
def test_parameters_made_under_inference_mode_are_named(mode: str) -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    session = gradscope.trace(model, given(), mode=mode)
    assert session.verdict == "crashes"
    assert [each.rule for each in session.findings] == ["GS601"]


def test_a_weight_that_was_kept_from_before_is_said_not_to_be_known() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.kept: torch.Tensor | None = None

        def weight(self) -> torch.Tensor:
            if self.kept is None:
                with torch.no_grad():
                    self.kept = self.layer.weight * 2
            return self.kept

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight())

    model = Kept()
    assert gradscope.trace(model, given()).sources["layer.weight"].status == "blocked"
    assert model.kept is None
    model.weight()
    session = gradscope.trace(model, given())
    assert session.sources["layer.weight"].status == "unused"
    assert any("kept" in words and "layer.weight" in words for words in session.unseen)


# --- as the user runs it -----------------------------------------------------------------------------------


class InPlaceOnInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.sub_(0.5)
        return self.layer(x)


@pytest.mark.parametrize("mode", ["real", "structural"])
def test_an_input_that_nobody_wants_a_gradient_for_may_be_written_into(mode: str) -> None:
    x = given().detach()
    session = gradscope.trace(InPlaceOnInput(), x, mode=mode)
    assert (session.verdict, session.findings) == ("flows", [])
    assert set(session.sources) == {"layer.weight", "layer.bias"}
    assert any("Only what is asked about" in words for words in session.remarks)
    wanted = gradscope.trace(InPlaceOnInput(), x, mode=mode, wrt="input.0")
    assert wanted.verdict == "crashes"


class Weighted(nn.Module):
    """A loss weighed by what nobody trains: torch refuses a gradient for it."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.classes = nn.Parameter(torch.ones(4), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.use = use

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y, labels = self.layer(x), torch.tensor([0, 1, 2])
        if self.use == "number":
            return y * torch.full((4,), self.scale)
        return F.cross_entropy(y, labels, weight=weight if self.use == "input" else self.classes)


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("use", ["input", "frozen", "number"])
def test_what_may_not_require_a_gradient_and_is_not_asked_for_does_not(use: str, mode: str) -> None:
    model, x, weight = Weighted(use), given().detach(), torch.ones(4)
    model(x, weight).sum().backward()
    assert model.layer.weight.grad is not None
    session = gradscope.trace(model, x, weight, mode=mode)
    assert (session.verdict, session.findings) == ("flows", [])
    assert {name for name, source in session.sources.items() if source.status == "flows"} == {
        "layer.weight", "layer.bias"
    }  # fmt: skip
    assert any("Only what is asked about" in words for words in session.remarks)


class Adapted(nn.Module):
    """A frozen embedding, and an adapter inside a checkpoint: the most asked question about LoRA."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4).requires_grad_(False)
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.adapter = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.reentrant = reentrant

    def block(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden) + self.adapter(hidden)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.block, self.embedding(ids), use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["real", "structural"])
def test_a_reentrant_checkpoint_without_a_grad_input_blocks_what_is_inside(mode: str) -> None:
    ids = torch.arange(6).view(2, 3)
    model = Adapted(reentrant=True)
    model(ids).sum().backward()
    assert model.adapter.weight.grad is None and model.head.weight.grad is not None
    session = gradscope.trace(model, ids, mode=mode)
    assert [(each.rule, each.severity) for each in session.findings] == [("GS604", "error")]
    assert session.sources["adapter.weight"].status == "blocked"
    assert session.sources["head.weight"].status == "flows"
    assert session.fix_verified


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["real", "structural"])
@pytest.mark.parametrize("grad_input", [True, False])
def test_its_neighbours_flow(mode: str, grad_input: bool) -> None:
    ids = torch.arange(6).view(2, 3)
    model = Adapted(reentrant=grad_input)
    if grad_input:  # what enable_input_require_grads does
        model.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    model(ids).sum().backward()
    assert model.adapter.weight.grad.any()
    session = gradscope.trace(model, ids, mode=mode)
    assert (session.verdict, session.findings) == ("flows", [])
