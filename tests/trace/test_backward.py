"""What one true backward pass shows: zeros, NaN, nothing, exceptions, hooks; and what is told without running one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from two import Between, Two, ZeroBackward, arriving, given, named, traced

import gradscope
from gradscope.errors import NotAnalysedError
from gradscope.tracing.backward import _look

# --- zero ------------------------------------------------------------------------------------------


def saturated(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(100, 200)


def dead(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x - 1000)


def nothing_of_it(x: torch.Tensor) -> torch.Tensor:
    return x * 0


def dropped(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x, 1.0)


def zero_backward(x: torch.Tensor) -> torch.Tensor:
    return ZeroBackward.apply(x)


@pytest.mark.parametrize("between", [saturated, dead, nothing_of_it, dropped, zero_backward])
def test_a_gradient_that_is_zero_throughout_is_said_to_be(between: Between) -> None:
    truth = arriving(between)
    session = traced(between)
    assert truth["first.weight"] is not None and not truth["first.weight"].any()
    assert session.sources["first.weight"].status == session.sources["input.0"].status == "zero"
    assert session.sources["second.bias"].status == "flows"
    assert named(session, between)[0] == ("warning", "GS404", 1)
    assert session.verdict == "flows"


def nearly_saturated(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-0.1, 0.1)


def half_dead(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x)


def softmaxed(x: torch.Tensor) -> torch.Tensor:
    return x.softmax(-1)


def square_root(x: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(x.abs() + 1e-6)


@pytest.mark.parametrize("between", [nearly_saturated, half_dead, softmaxed, square_root])
def test_a_gradient_that_is_small_or_partly_zero_is_no_finding(between: Between) -> None:
    session = traced(between)
    assert named(session, between) == []
    for name, grad in arriving(between).items():
        assert grad is not None and grad.any()
        assert session.sources[name].gradient.norm_l2 > 0


# --- NaN -------------------------------------------------------------------------------------------


def where_after(x: torch.Tensor) -> torch.Tensor:
    y = x * 0
    return torch.where(x < 1e9, x, torch.sqrt(y))


def test_a_gradient_of_nan_is_found_where_it_turns() -> None:
    assert arriving(where_after)["first.weight"].isnan().any()
    session = traced(where_after)
    assert named(session, where_after) == [("error", "GS607", 2)]
    assert session.sources["first.weight"].gradient.nonfinite > 0


def where_before(x: torch.Tensor) -> torch.Tensor:
    y = torch.where(x < 1e9, torch.ones_like(x), x * 0)
    return torch.where(x < 1e9, x, torch.sqrt(y))


def test_the_safe_way_to_write_it_is_no_finding() -> None:
    assert arriving(where_before)["first.weight"].isfinite().all()
    assert named(traced(where_before), where_before) == []


TINY = torch.finfo(torch.float64).tiny


@pytest.mark.parametrize(
    "grad",
    [
        torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([1.0, float("inf")]), torch.tensor([-float("inf"), 0.0]),
        torch.tensor([float("nan"), float("inf")], dtype=torch.bfloat16), torch.zeros(3, 2), -torch.zeros(2),
        torch.tensor([0.0, TINY], dtype=torch.float64), torch.tensor([0.0, -TINY], dtype=torch.float64),
        torch.ones(2, dtype=torch.float16), torch.tensor(2.0), torch.zeros(0), torch.ones(2, 2)[:, ::2].t(),
        torch.tensor([0j, 1j]).conj(), torch.tensor([complex(0, float("nan"))]), torch.zeros(2, dtype=torch.complex64),
        torch.eye(3).to_sparse(), torch.zeros(3, 3).to_sparse(), torch.eye(3).to_sparse_csr(),
    ],
)  # fmt: skip
def test_the_extremes_of_a_gradient_tell_what_all_its_numbers_do(grad: torch.Tensor) -> None:
    numbers = grad.to_dense() if grad.layout != torch.strided else grad
    found = _look(grad, measured=True)
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == [bool(numbers.isfinite().all()), bool(numbers.any())]


def test_outputs_that_are_not_finite_say_nothing_of_gradients() -> None:
    session = traced(lambda x: x / 0)
    assert any("not finite" in words for words in session.unseen)
    assert all(source.gradient is None for source in session.sources.values())


# --- nothing comes back ------------------------------------------------------------------------------


class NoneBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


def none_backward(x: torch.Tensor) -> torch.Tensor:
    return NoneBackward.apply(x)


@pytest.mark.parametrize("mode", ["real", "structural"])
def test_a_function_whose_backward_gives_none_blocks(mode: str) -> None:
    assert arriving(none_backward)["first.weight"] is None
    session = traced(none_backward, mode)
    assert named(session, none_backward) == [("error", "GS501", 1)]
    assert session.sources["first.weight"].status == "blocked"
    assert session.sources["second.weight"].status == "flows"


class InferenceInside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


def inference_inside(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(InferenceInside.apply(x))


@pytest.mark.parametrize("mode", ["real", "structural"])
def test_a_function_that_gives_out_an_inference_tensor_blocks(mode: str) -> None:
    assert arriving(inference_inside)["first.weight"] is None
    assert named(traced(inference_inside, mode), inference_inside) == [("error", "GS601", 1)]


def without_autograd(x: torch.Tensor) -> torch.Tensor:
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    return quantised(x)


@pytest.mark.filterwarnings("ignore")
def test_an_operator_without_autograd_blocks() -> None:
    assert arriving(without_autograd)["first.weight"] is None
    session = traced(without_autograd)
    assert [(each.rule, each.severity) for each in session.findings] == [("GS502", "error")]
    assert session.sources["first.weight"].status == "blocked"


# --- backward raises -----------------------------------------------------------------------------------


class RaisingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("not written yet")


@torch.library.custom_op("gradscope_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


twice.register_fake(torch.empty_like)


@torch.library.custom_op("gradscope_tests::thrice", mutates_args=())
def thrice(x: torch.Tensor) -> torch.Tensor:
    return x * 3


thrice.register_fake(torch.empty_like)
thrice.register_autograd(lambda ctx, grad: grad * 3)


# Without a formula for autograd: whether it gives a gradient depends on what its kernel is made of.
LIBRARY = torch.library.Library("gradscope_tests", "FRAGMENT")
LIBRARY.define("of_torch(Tensor x) -> Tensor")
LIBRARY.define("of_numpy(Tensor x) -> Tensor")
LIBRARY.impl("of_torch", lambda x: x * 2, "CPU")
LIBRARY.impl("of_numpy", lambda x: torch.from_numpy(2 * x.detach().numpy()), "CPU")
torch.library.register_fake("gradscope_tests::of_torch", torch.empty_like, lib=LIBRARY)
torch.library.register_fake("gradscope_tests::of_numpy", torch.empty_like, lib=LIBRARY)


def of_torch(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.gradscope_tests.of_torch(x)


def of_numpy(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.gradscope_tests.of_numpy(x)


@pytest.mark.filterwarnings("ignore:gradscope_tests")
@pytest.mark.parametrize("between", [of_torch, of_numpy])
def test_an_operator_without_a_formula_is_judged_by_its_kernel(between: Between) -> None:
    gradients = arriving(between)
    arrives = gradients["first.weight"] is not None
    assert arrives is (between is of_torch)
    session = traced(between, "auto")
    assert session.target["mode"] == "real" and "has no autograd formula" in session.remarks[0]
    assert session.sources["first.weight"].status == ("flows" if arrives else "blocked")
    assert [each.severity for each in session.findings] == ([] if arrives else ["error"])
    with pytest.raises(NotAnalysedError, match="only its kernel shows"):
        traced(between, "structural")


def raising_backward(x: torch.Tensor) -> torch.Tensor:
    return RaisingBackward.apply(x)


def custom_op(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.gradscope_tests.twice(x)


def changed_after_use(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    y.add_(1)
    return y


def changed_through_an_alias(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    z = y.detach()
    z.add_(1)
    return y


def changed_in_a_view(x: torch.Tensor) -> torch.Tensor:
    y = x.sigmoid()
    y[0].zero_()
    return y


RAISING = [
    (raising_backward, "GS501", 1),
    (custom_op, "GS502", 1),
    (changed_after_use, "GS603", 2),
    (changed_through_an_alias, "GS603", 3),
    (changed_in_a_view, "GS603", 2),
]


@pytest.mark.parametrize("mode", ["real", "structural"])
@pytest.mark.parametrize(("between", "rule", "line"), RAISING, ids=lambda value: getattr(value, "__name__", None))
def test_a_backward_that_raises_is_mapped_to_its_cause(between: Between, rule: str, line: int, mode: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        arriving(between)
    session = traced(between, mode)
    assert session.verdict == "crashes"
    assert named(session, between) == [("error", rule, line)]
    assert session.crash["phase"] == "backward" and session.crash["message"]
    assert session.sources["first.weight"].status == "blocked"


@pytest.mark.filterwarnings("ignore")
def test_a_derivative_that_torch_does_not_have_is_mapped_to_its_call() -> None:
    def floor_divided(x: torch.Tensor) -> torch.Tensor:
        return x // 2

    def unique(x: torch.Tensor) -> torch.Tensor:
        return torch.unique(x).view(3, 4)

    for between, rule in ((floor_divided, "GS402"), (unique, "GS502")):
        with pytest.raises(RuntimeError, match="is not implemented"):
            arriving(between)
        session = traced(between)
        assert session.verdict == "crashes"
        assert named(session, between) == [("error", rule, 1)]


def changed_where_that_is_allowed(x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        y = x.exp()
        z = y * 2
        y.mul_(2)
    return y + z


def test_what_cannot_be_unpacked_after_its_context_ends_no_trace() -> None:
    with pytest.raises(AssertionError, match="Trying to backward outside"):
        arriving(changed_where_that_is_allowed)
    assert traced(changed_where_that_is_allowed, "structural").verdict == "flows"  # backward may be called inside
    session = traced(changed_where_that_is_allowed)
    assert session.verdict == "crashes" and session.crash["exception"] == "AssertionError"


class Cached(nn.Module):
    """Embed without recording, and once more in a hook, with the gradient that the loss gave (GradCache)."""

    def __init__(self, *, only_looks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.only_looks = only_looks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            embedded = self.layer(x)
        embedded = embedded.detach().requires_grad_()
        loss = self.head(embedded).square().mean()
        loss.backward()

        def embed_again(_: torch.Tensor) -> None:
            with torch.enable_grad():
                self.layer(x).backward(embedded.grad)

        loss = loss.detach().requires_grad_()
        loss.register_hook((lambda grad: None) if self.only_looks else embed_again)
        return loss


@pytest.mark.parametrize("mode", ["real", "auto"])
def test_a_gradient_that_a_hook_on_the_result_computes_arrives(mode: str) -> None:
    model, x = Cached(), torch.randn(3, 4)
    model(x).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    session = gradscope.trace(model, x, mode=mode) if mode == "auto" else gradscope.trace(model, x, wrt=["layer.*"])
    assert (session.verdict, session.findings, session.target["mode"]) == ("flows", [], "real")
    assert session.sources["layer.weight"].gradient.norm_l2 > 0
    assert any("from a hook of the backward pass" in words for words in session.unseen)
    assert gradscope.trace(model, x, numeric=True).verdict == "flows"


@pytest.mark.parametrize("mode", ["real", "auto"])
def test_a_hook_that_only_looks_gives_no_gradient(mode: str) -> None:
    session = gradscope.trace(Cached(only_looks=True), torch.randn(3, 4), mode=mode, wrt=["layer.*"])
    assert session.verdict == "blocked" and session.sources["layer.weight"].status == "blocked"
    assert "GS104" in {each.rule for each in session.findings}


class HookedOutput(nn.Module):
    """Set a hook that raises on the output itself, as models in equilibrium do to solve for the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad.no_such_thing)
        return y


def test_a_hook_on_the_output_that_raises_is_a_crash() -> None:
    model, x = HookedOutput(), given()
    with pytest.raises(AttributeError):
        model(x).sum().backward()
    session = gradscope.trace(model, x, mode="real")
    assert session.verdict == "crashes" and session.crash["exception"] == "AttributeError"
    assert [(each.severity, each.rule) for each in session.findings] == [("error", "GS606")]
    assert session.findings[0].line == HookedOutput.forward.__code__.co_firstlineno + 3


def registered_op(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.gradscope_tests.thrice(x)


class WrittenUnchecked(torch.autograd.Function):
    """Write past the version counter into one slice, as torchdiffeq's Runge-Kutta solvers do."""

    @staticmethod
    def forward(ctx: Any, room: torch.Tensor, value: torch.Tensor, index: Any) -> torch.Tensor:
        ctx.index = index
        room.data[index] = value
        return room

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return grad, grad[ctx.index], None


def slice_by_slice(x: torch.Tensor) -> torch.Tensor:
    room = WrittenUnchecked.apply(torch.zeros(3, 4, 2), x, (..., 0))
    half = room[..., :1] * x[..., None]  # saved for backward: the first slice only
    room = WrittenUnchecked.apply(room, half[..., 0], (..., 1))
    return room.sum(-1)


def slice_over_slice(x: torch.Tensor) -> torch.Tensor:
    room = WrittenUnchecked.apply(torch.zeros(3, 4, 2), x, (..., 0))
    half = room[..., :1] * x[..., None]
    room = WrittenUnchecked.apply(room, half[..., 0], (..., 0))
    return room.sum(-1) * 2


@pytest.mark.parametrize("mode", ["real", "structural"])
def test_a_write_behind_autograds_back_counts_where_it_reaches_what_was_saved(mode: str) -> None:
    assert traced(slice_by_slice, mode).verdict == "flows"
    assert named(traced(slice_over_slice, mode), slice_over_slice) == [("warning", "GS603", 3)]


def test_finite_differences_agree_on_which_write_does_harm() -> None:
    assert traced(slice_by_slice, "auto", numeric=True).verdict == "flows"
    assert traced(slice_over_slice, "auto", numeric=True).sources["first.weight"].status == "wrong"


def changed_before_use(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.add_(1)
    return y.exp()


def changed_copy(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    z = y.clone()
    z.add_(1)
    return y


@pytest.mark.parametrize("mode", ["real", "structural"])
@pytest.mark.parametrize("between", [registered_op, changed_before_use, changed_copy])
def test_the_neighbours_of_what_raises_are_no_findings(between: Between, mode: str) -> None:
    assert arriving(between)["first.weight"].any()
    session = traced(between, mode)
    assert (session.verdict, named(session, between)) == ("flows", [])


class ExhaustedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, error: Exception) -> torch.Tensor:
        ctx.error = error
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        raise ctx.error


MACHINE = (
    torch.OutOfMemoryError("out of memory"), RuntimeError("std::bad_alloc"),
    RuntimeError("Resource temporarily unavailable"),
)  # fmt: skip


@pytest.mark.parametrize("error", MACHINE, ids=str)
def test_a_machine_without_memory_is_no_crash_of_autograd(error: Exception) -> None:
    session = traced(lambda x: ExhaustedBackward.apply(x, error))
    assert (session.verdict, session.findings) == ("flows", [])
    assert any(str(error) in words for words in session.unseen)
    assert all(source.gradient is None for source in session.sources.values())


# --- hooks ---------------------------------------------------------------------------------------------


def hooked(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.register_hook(lambda grad: grad * 0)
    return y


def watched(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.register_hook(lambda grad: None)
    return y


def hook_that_raises(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.register_hook(lambda grad: grad.no_such_thing)
    return y.tanh()


def test_a_hook_on_the_way_that_raises_stops_what_lies_behind_it() -> None:
    with pytest.raises(AttributeError):
        arriving(hook_that_raises)
    session = traced(hook_that_raises)
    assert session.verdict == "crashes" and named(session, hook_that_raises) == [("error", "GS606", 2)]
    lost = {name for name, source in session.sources.items() if source.status == "blocked"}
    assert lost == {"first.weight", "first.bias", "input.0"}


def test_a_hook_that_takes_the_gradient_away_is_named() -> None:
    assert not arriving(hooked)["first.weight"].any()
    session = traced(hooked)
    assert named(session, hooked) == [("warning", "GS606", 2)]
    assert session.sources["first.weight"].status == "zero"
    assert named(traced(watched), watched) == []


def test_a_hook_of_a_parameter_or_a_module_is_named_by_its_function() -> None:
    def masked(grad: torch.Tensor) -> torch.Tensor:
        return grad * 0

    def emptied(module: nn.Module, given: Any, grads: Any) -> Any:
        return (given[0] * 0,)

    layer = nn.Linear(4, 4)
    layer.weight.register_hook(masked)
    session = gradscope.trace(layer, given(), mode="real")
    assert named(session, masked) == [("warning", "GS606", 0)]
    assert [name for name, source in session.sources.items() if source.status == "zero"] == ["weight"]

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_full_backward_hook(emptied)
    session = gradscope.trace(model, given(), mode="real")
    assert named(session, emptied) == [("warning", "GS606", 0)]
    zero = {name for name, source in session.sources.items() if source.status == "zero"}
    assert zero == {"0.weight", "0.bias", "input.0"}


def test_what_hooks_do_is_said_not_to_be_seen_without_numbers() -> None:
    assert any("hooks" in words for words in traced(hooked, "structural").unseen)


# --- it leaves no trace ----------------------------------------------------------------------------------


def test_gradients_and_their_hooks_are_left_as_they_were() -> None:
    model = Two(torch.tanh)
    model(given()).sum().backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    kept = {name: parameter.grad for name, parameter in model.named_parameters()}
    steps: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: steps.append(name))
    session = gradscope.trace(model, given(), mode="real")
    assert session.sources["first.weight"].gradient.norm_l2 > 0
    assert steps == []  # an optimizer in the backward pass did not step
    for name, parameter in model.named_parameters():
        assert parameter.grad is kept[name] and torch.equal(parameter.grad, before[name])
    model(given()).sum().backward()
    assert sorted(steps) == sorted(before)


@pytest.mark.parametrize("mode", ["structural", "real"])
def test_a_model_that_was_traced_still_gets_its_gradients(mode: Any) -> None:
    model = Two(torch.tanh)
    gradscope.trace(model, given(), mode=mode)
    model(given()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_batch_statistics_are_left_as_they_were_by_a_checkpoint_that_computes_again() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(self.layers, x, use_reentrant=False)

    model = Checkpointed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert gradscope.trace(model, given(), mode="real").verdict == "flows"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_norm_is_that_of_the_gradient_for_a_loss() -> None:
    model, x = Two(torch.tanh), given()
    (model(x) ** 2).sum().backward()
    session = gradscope.trace(Two(torch.tanh), given(), mode="real", loss=lambda y: (y**2).sum())
    for name, parameter in model.named_parameters():
        assert session.sources[name].gradient.norm_l2 == pytest.approx(float(parameter.grad.norm()), rel=1e-5)


def test_a_session_with_gradients_is_read_back_whole() -> None:
    session = traced(where_after)
    assert gradscope.Session.from_dict(session.to_dict()).to_dict() == session.to_dict()
