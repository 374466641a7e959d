"""Ways that values take where no torch function looks: threads, generators, kernels, wrappers, C++, Python."""

from __future__ import annotations

import asyncio
import copy
import ctypes
import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.nn.functional
from torch import distributed, nn
from torch.utils.dlpack import from_dlpack, to_dlpack
from two import Between, Straight, Two, arriving, given, named, traced

import gradscope
from gradscope.errors import NotAnalysedError, UsageError
from gradscope.paths import short_path

# --- threads -------------------------------------------------------------------------------------------


def detached_in_a_thread(x: torch.Tensor) -> torch.Tensor:
    results: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: results.append(x.detach() * 2))
    thread.start()
    thread.join()
    return results[0]


def detached_in_a_pool(x: torch.Tensor) -> torch.Tensor:
    with ThreadPoolExecutor(2) as pool:
        return pool.submit(lambda: x.detach() * 2).result()


def started_under_no_grad(x: torch.Tensor) -> torch.Tensor:
    results: list[torch.Tensor] = []
    with torch.no_grad():  # a new thread starts with recording on
        thread = threading.Thread(target=lambda: results.append(x * 2))
        thread.start()
        thread.join()
    return results[0]


def row_by_row(x: torch.Tensor) -> torch.Tensor:
    with ThreadPoolExecutor(2) as pool:
        return torch.stack(list(pool.map(lambda row: row * 2, x)))


# --- generators and coroutines -----------------------------------------------------------------------------


def leaking_generator(x: torch.Tensor) -> torch.Tensor:
    def layers() -> Iterator[int]:
        with torch.no_grad():
            yield 2

    for factor in layers():
        x = x * factor
    return x


def careful_generator(x: torch.Tensor) -> torch.Tensor:
    def layers() -> Iterator[int]:
        with torch.no_grad():
            factor = int(torch.tensor(2))
        yield factor

    for factor in layers():
        x = x * factor
    return x


def decorated_generator(x: torch.Tensor) -> torch.Tensor:
    @torch.no_grad()
    def layers() -> Iterator[torch.Tensor]:
        yield x * 2

    return next(layers())


def decorated_consumed_outside(x: torch.Tensor) -> torch.Tensor:
    @torch.no_grad()
    def layers() -> Iterator[int]:
        yield 2

    for factor in layers():
        x = x * factor
    return x


def coroutine_block(x: torch.Tensor) -> torch.Tensor:
    async def run() -> torch.Tensor:
        with torch.no_grad():
            await asyncio.sleep(0)
            return x * 2

    return asyncio.run(run())


def decorated_coroutine(x: torch.Tensor) -> torch.Tensor:
    @torch.no_grad()  # has no effect: the body runs after the decorator is left
    async def run() -> torch.Tensor:
        return x * 2

    return asyncio.run(run())


# --- custom functions bound before the trace ---------------------------------------------------------------


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


straight, nothing = Straight.apply, Nothing.apply


def bound_straight_through(x: torch.Tensor) -> torch.Tensor:
    return straight(x)


def bound_without_gradient(x: torch.Tensor) -> torch.Tensor:
    return nothing(x)


# --- memory ------------------------------------------------------------------------------------------------


def kernel(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    ctypes.memmove(out.data_ptr(), x.data_ptr(), x.numel() * x.element_size())
    return out


def kernel_told_of_its_input_first(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(3, 4)
    assert all(each.data_ptr() % 4 == 0 for each in (x, out))
    source, target = x.data_ptr(), out.data_ptr()
    ctypes.memmove(target, source, x.numel() * x.element_size())
    return out


def written_after_a_look_at_its_address(x: torch.Tensor) -> torch.Tensor:
    out, whole = torch.empty_like(x), torch.empty_like(x)
    assert len({x.data_ptr(), out.data_ptr(), whole.data_ptr()}) == 3
    whole[:] = x
    return out.copy_(x) + whole


def address_only(x: torch.Tensor) -> torch.Tensor:
    assert x.data_ptr() or True
    return x * 2


def exported(x: torch.Tensor) -> torch.Tensor:
    return torch.from_dlpack(x.detach())


def capsule(x: torch.Tensor) -> torch.Tensor:
    return from_dlpack(to_dlpack(x.detach()))


def through_another_library(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.from_dlpack(x.detach()) * 2)


def beside_another_library(x: torch.Tensor) -> torch.Tensor:
    return x * float(np.from_dlpack(x.detach()).shape[0])


def counted_before(x: torch.Tensor) -> torch.Tensor:
    assert x.sum().item()
    return torch.from_dlpack(x.detach())


def shallow_copy(x: torch.Tensor) -> torch.Tensor:
    return copy.copy(x)


def variable(x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.Variable(x, requires_grad=True)


def loaded(x: torch.Tensor) -> torch.Tensor:
    layer = nn.Linear(4, 4, bias=False)
    layer.load_state_dict({"weight": x.T @ x})
    return layer(torch.ones(3, 4))


def called_with(x: torch.Tensor) -> torch.Tensor:
    layer = nn.Linear(4, 4, bias=False)
    return torch.func.functional_call(layer, {"weight": x.T @ x}, (torch.ones(3, 4),))


def sparse_values(x: torch.Tensor) -> torch.Tensor:
    return x.to_sparse()._values().view(3, 4)


def sparse(x: torch.Tensor) -> torch.Tensor:
    return x.to_sparse().to_dense()


def nested(x: torch.Tensor) -> torch.Tensor:
    return torch.nested.to_padded_tensor(torch.nested.as_nested_tensor(list(x)), 0.0)


# --- whole numbers that leave torch ------------------------------------------------------------------------


def through_bytes(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy((x * 255).byte().numpy()).float()


def through_an_image(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.float32((x * 255).byte()))


def through_a_list(x: torch.Tensor) -> torch.Tensor:
    chosen = torch.tensor(x.argmax(-1).tolist())
    return torch.nn.functional.one_hot(chosen, 4).float()


@pytest.mark.parametrize(
    ("between", "flat", "left"),
    [(through_bytes, "GS403", "GS301"), (through_an_image, "GS403", "GS301"), (through_a_list, "GS401", "GS302")],
    ids=["numpy", "array", "list"],
)
def test_rounded_numbers_are_followed_out_of_torch_and_back(between: Between, flat: str, left: str) -> None:
    assert arriving(between)["first.weight"] is None
    session = gradscope.trace(Two(between), given())
    assert session.verdict == "blocked" and session.sources["first.weight"].status == "nondifferentiable"
    assert [(each.rule, each.severity) for each in session.findings] == [(flat, "error"), (left, "warning")]


def one_by_one(x: torch.Tensor) -> torch.Tensor:
    chosen = torch.tensor([row.argmax().item() for row in x])
    return torch.nn.functional.one_hot(chosen, 4).float()


def test_indices_that_leave_one_by_one_are_known_when_they_come_back() -> None:
    assert arriving(one_by_one)["first.weight"] is None
    session = gradscope.trace(Two(one_by_one), given())
    assert [(each.rule, each.severity) for each in session.findings] == [("GS401", "error"), ("GS302", "warning")]
    assert session.sources["first.weight"].status == "nondifferentiable"


class Logged(nn.Module):
    """Counts what a head gets right, and goes on with numbers that have nothing to do with that."""

    def __init__(self, numbers: Between) -> None:
        super().__init__()
        self.head, self.body, self.table = nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(900, 4)
        self.numbers = numbers
        self.right: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        guesses = self.head(x).argmax(-1)
        self.right += [(guesses == 1).float().mean().item(), guesses.tolist(), guesses[0].item()]
        return self.body(x) * self.numbers(x) + self.table(torch.tensor([len(x) + 800]))


@pytest.mark.parametrize(
    "numbers",
    [
        lambda x: torch.tensor([0.5, 1.0, 2.0, 4.0]),
        lambda x: torch.full((4,), 0.5),
        lambda x: torch.tensor([-1, 7, 8, 9]),
    ],
    ids=["floats", "filled", "whole"],
)
def test_constants_are_not_made_of_what_was_logged_before(numbers: Between) -> None:
    session = gradscope.trace(Logged(numbers), given())
    assert session.verdict == "flows" and session.sources["head.weight"].status == "unused"
    assert len([text for text in session.unseen if "takes numbers out of torch" in text]) == 2
    assert not any("does not depend" in text for text in session.remarks)


class BesideTorch(nn.Module):
    """One term of the loss is computed in numpy, and which rows are read is computed by a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.where = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        row = int(self.where(x).sum(-1).argmax())
        term = float(np.square(h.detach().numpy()).mean())
        return self.second(h[row : row + 1]).sum() + 0.5 * term


def test_numbers_that_go_out_of_sight_are_said_to() -> None:
    session = gradscope.trace(BesideTorch(), given())
    assert session.sources["first.weight"].status == "flows" and session.sources["where.weight"].status == "unused"
    row, term = (source for source in session.unseen if "takes numbers out of torch" in source)
    assert row.startswith("int at ") and term.startswith("numpy at ")


def test_whole_numbers_that_were_none_of_the_models_lead_nowhere() -> None:
    def counted(x: torch.Tensor) -> torch.Tensor:
        lengths = torch.tensor([4, 2, 1]).tolist()
        mask = torch.from_numpy(np.array([[i < n for i in range(4)] for n in lengths], dtype=np.float32))
        return mask + 0 * x.detach().sum()

    assert gradscope.trace(Two(counted), given()).sources["first.weight"].status != "nondifferentiable"


# --- sampling, torch.func, scripts ---------------------------------------------------------------------------


def sampled(x: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Normal(x, 1.0).sample()


def resampled(x: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Normal(x, 1.0).rsample()


def gradient_without_graph(x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad((x**3).sum(), x)[0]


def gradient_with_graph(x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad((x**3).sum(), x, create_graph=True)[0]


def function_gradient(x: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda z: (z**3).sum())(x)


def mapped(x: torch.Tensor) -> torch.Tensor:
    return torch.func.vmap(lambda row: row * 2)(x)


def mapped_beside_another(x: torch.Tensor) -> torch.Tensor:
    square = x.T @ x
    return torch.func.vmap(lambda row: row @ square)(x)


def forward_mode(x: torch.Tensor) -> torch.Tensor:
    return torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[1]


@torch.jit.script
def scripted_without_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = x * 2
    return y


@torch.jit.script
def scripted_plainly(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def script_function(x: torch.Tensor) -> torch.Tensor:
    return scripted_without_grad(x)


def plain_script_function(x: torch.Tensor) -> torch.Tensor:
    return scripted_plainly(x)


def compiled(x: torch.Tensor) -> torch.Tensor:
    return COMPILED(x)


COMPILED = torch.compile(lambda x: x * 2)

CUTS = [
    (detached_in_a_thread, "GS201", 2), (detached_in_a_pool, "GS201", 2),
    (leaking_generator, "GS107", 2), (decorated_generator, "GS102", 1), (coroutine_block, "GS104", 2),
    (bound_without_gradient, "GS501", 1), (kernel, "GS503", 2),
    (kernel_told_of_its_input_first, "GS503", 3), (exported, "GS201", 1), (capsule, "GS201", 1),
    (through_another_library, "GS201", 1), (counted_before, "GS201", 2), (shallow_copy, "GS203", 1),
    (variable, "GS201", 1), (loaded, "GS203", 2), (sparse_values, "GS503", 1), (sampled, "GS205", 1),
    (gradient_without_graph, "GS207", 1), (script_function, "GS503", 1),
]  # fmt: skip
LOOK_ALIKES = [
    started_under_no_grad, row_by_row, careful_generator, decorated_consumed_outside, decorated_coroutine,
    bound_straight_through, address_only, written_after_a_look_at_its_address,
    beside_another_library, called_with, sparse, nested, resampled,
    gradient_with_graph, function_gradient, mapped, mapped_beside_another, forward_mode, plain_script_function,
    compiled,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize(("between", "rule", "line"), CUTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_cut_is_named(between: Between, rule: str, line: int, mode: str) -> None:
    truth = arriving(between)
    assert truth["first.weight"] is None and truth["second.weight"].any()
    session = traced(between, mode)
    assert named(session, between)[0] == ("error", rule, line)
    assert session.sources["first.weight"].status == session.sources["input.0"].status == "blocked"
    assert session.sources["second.weight"].status == "flows"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("between", LOOK_ALIKES, ids=lambda between: between.__name__)
def test_a_look_alike_is_no_cut(between: Between, mode: str) -> None:
    truth = arriving(between)
    assert all(grad is not None and grad.any() for grad in truth.values())
    session = traced(between, mode)
    assert (session.verdict, named(session, between)) == ("flows", [])
    assert all(source.status == "flows" for source in session.sources.values())


# --- operators that write into what they are given ---------------------------------------------------------------


@torch.library.custom_op("gradscope_tests::scale_into", mutates_args=("out",))
def scale_into(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x * 2)


def scaled_into(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(3, 4)
    scale_into(x, out)
    return out


def scaled_by_keyword(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(3, 4)
    torch.ops.gradscope_tests.scale_into(out=out, x=x)
    return out


def scaled_elsewhere(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scale_into(x, torch.empty(3, 4))
    return x


@pytest.mark.parametrize("mode", ["real", "structural"])
def test_an_operator_that_writes_into_an_argument_stops_the_gradient_there(mode: str) -> None:
    for between in (scaled_into, scaled_by_keyword):
        assert arriving(between)["first.weight"] is None
        assert named(traced(between, mode), between) == [("error", "GS503", 2)]
    assert arriving(scaled_elsewhere)["first.weight"].any()
    assert traced(scaled_elsewhere, mode).verdict == "flows"


# --- collectives ---------------------------------------------------------------------------------------------


def gathered(x: torch.Tensor) -> torch.Tensor:
    everywhere = [torch.zeros_like(x)]
    distributed.all_gather(everywhere, x)
    return torch.cat(everywhere)


def gathered_for_one(x: torch.Tensor) -> torch.Tensor:
    everywhere = [torch.zeros_like(x)]
    distributed.gather(x, gather_list=everywhere, dst=0)
    return torch.cat(everywhere)


def scattered(x: torch.Tensor) -> torch.Tensor:
    own = torch.zeros_like(x)
    distributed.scatter(own, scatter_list=[x], src=0)
    return own


def gathered_and_put_back(x: torch.Tensor) -> torch.Tensor:
    everywhere = [torch.zeros_like(x)]
    distributed.all_gather(everywhere, x)
    everywhere[distributed.get_rank()] = x
    return torch.cat(everywhere)


def gathered_by_index(x: torch.Tensor) -> torch.Tensor:
    """Torch has another function of that name."""
    return torch.gather(x, 1, torch.zeros(x.shape, dtype=torch.long)) + x.scatter(1, torch.zeros(3, 1).long(), 1.0)


def gathered_with_gradient(x: torch.Tensor) -> torch.Tensor:
    return torch.cat(distributed.nn.functional.all_gather(x))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("process_group")
@pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed")
def test_a_collective_without_gradient_is_named() -> None:
    for between in (gathered, gathered_for_one, scattered):
        assert arriving(between)["first.weight"] is None
        # fake tensors know no collectives in torch 2.9
        for mode in ("real", "structural") if torch.__version__ >= "2.11" else ("real",):
            assert named(traced(between, mode), between) == [("error", "GS206", 2)]
    for between in (gathered_and_put_back, gathered_with_gradient, gathered_by_index):
        assert arriving(between)["first.weight"].any()
        assert named(traced(between, "real"), between) == []


# --- modules whose inside is not seen ----------------------------------------------------------------------------


class WithoutGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.layer(x)
        return y


def test_a_switch_in_an_exported_program_is_named_by_the_line_that_was_exported() -> None:
    """And not by torch's own, nor for lack of a formula of ``linear``."""
    x = torch.randn(2, 4)
    program = torch.export.export(WithoutGrad(), (x,))
    model = nn.Sequential(nn.Linear(4, 4), program.module(), nn.Linear(4, 4))
    for mode in ("real", "structural"):
        session = gradscope.trace(model, x, mode=mode)
        assert session.sources["1.layer.weight"].status == "blocked" and session.fix_verified
        finding = session.findings[0]
        assert (len(session.findings), finding.rule, finding.path) == (1, "GS105", short_path(__file__))
        first = WithoutGrad.forward.__code__.co_firstlineno
        assert finding.line in (first + 1, first + 2)  # the switch, or what is under it
    whole = torch.export.export(nn.Linear(4, 4), (x,)).module()
    assert gradscope.trace(whole, x).verdict == "flows"


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_module_is_judged_as_one_operation_and_computed() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), nn.Linear(4, 4))
    plain(given()).sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())
    session = gradscope.trace(plain, given())
    assert (session.verdict, session.findings, session.target["mode"]) == ("flows", [], "real")
    assert all(source.status == "flows" for source in session.sources.values())

    cut = nn.Sequential(nn.Linear(4, 4), torch.jit.script(WithoutGrad()), nn.Linear(4, 4))
    session = gradscope.trace(cut, given())
    assert [each.rule for each in session.findings] == ["GS503"]
    blocked = {name for name, source in session.sources.items() if source.status == "blocked"}
    assert blocked == {"0.weight", "0.bias", "1.layer.weight", "1.layer.bias", "input.0"}
    assert any("taken as one operation" in words for words in session.unseen)
    assert session.findings[0].fix.startswith("Trace the Python that it was made of")


@pytest.mark.filterwarnings("ignore")
def test_a_script_is_a_model_like_any_other(tmp_path: Path) -> None:
    """What torch.jit.load gives, too: it has its forward in itself, and its class raises where it is asked."""
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    torch.jit.script(plain).save(tmp_path / "plain.pt")
    for model in (torch.jit.script(plain), torch.jit.trace(plain, given()), torch.jit.load(tmp_path / "plain.pt")):
        session = gradscope.trace(model, given())
        assert (session.verdict, session.findings) == ("flows", [])
    session = gradscope.trace(torch.jit.script(WithoutGrad()), given())
    assert session.sources["layer.weight"].status == "blocked" and session.verdict == "blocked"


@torch.jit.script
def scripted_detach(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x).detach() * 2


class EndsInAScript(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return scripted_detach(self.layer(x))


@pytest.mark.parametrize("mode", ["real", "structural"])
def test_a_script_at_the_end_of_a_module_hides_neither_what_came_before_nor_its_own_line(
    mode: gradscope.tracing.library.Mode,
) -> None:
    session = gradscope.trace(EndsInAScript(), given(), mode=mode)
    line = inspect.getsourcelines(EndsInAScript.forward)[1] + 1
    assert [(each.rule, each.line, each.path.endswith("test_other_ways.py")) for each in session.findings] == [
        ("GS201", line, True)
    ]
    assert {source.status for source in session.sources.values()} == {"blocked"}
    assert "layer" in {node.module for node in session.graph.nodes}


def test_lazy_parameters_are_asked_to_be_settled_first() -> None:
    with pytest.raises(UsageError, match="lazy parameters"):
        gradscope.trace(nn.LazyLinear(4), given())


# --- switched off for whatever follows -----------------------------------------------------------------------


class LeavesItOff(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        torch.set_grad_enabled(False)
        return y


@pytest.mark.parametrize("mode", ["real", "structural"])
def test_a_forward_that_leaves_recording_off_blocks_the_loss(mode: str) -> None:
    session = gradscope.trace(LeavesItOff(), given(), mode=mode)
    assert torch.is_grad_enabled()
    assert [each.rule for each in session.findings] == ["GS107"] and session.fix_verified
    assert session.verdict == "blocked" and session.sources["layer.weight"].status == "blocked"


# --- beside others -------------------------------------------------------------------------------------------


def test_a_thread_that_is_not_the_runs_is_left_alone() -> None:
    stop, seen = threading.Event(), []

    def other() -> None:
        model = nn.Linear(4, 4)
        while not stop.is_set():
            with torch.no_grad():
                model(torch.ones(1, 4)).detach()
            seen.append(torch.is_grad_enabled())

    thread = threading.Thread(target=other)
    thread.start()
    try:
        sessions = [traced(torch.tanh, mode) for mode in ("real", "structural") * 5]
    finally:
        stop.set()
        thread.join()
    assert all((session.verdict, session.findings) == ("flows", []) for session in sessions)
    assert seen and all(seen)


def test_it_works_in_a_thread_and_inside_another_trace() -> None:
    with ThreadPoolExecutor(1) as pool:
        session = pool.submit(lambda: traced(lambda x: x.detach(), "real")).result()
    assert [each.rule for each in session.findings] == ["GS201"]
    inner: list[gradscope.Session] = []

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner.append(gradscope.trace(Two(lambda y: y.detach()), torch.ones(3, 4), mode="real"))
            return self.layer(x)

    outer = gradscope.trace(Outer(), given(), mode="real")
    assert (outer.verdict, outer.findings) == ("flows", [])
    assert [each.rule for each in inner[0].findings] == ["GS201"]


def test_the_callers_of_a_cut_are_told() -> None:
    def inner(x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    def outer(x: torch.Tensor) -> torch.Tensor:
        return inner(x) * 2

    (finding,) = traced(outer).findings
    names = [name.rpartition(".")[2] for name in finding.chain]
    assert names[-3:] == ["forward", "outer", "inner"]


# --- custom functions that use what they are not given -------------------------------------------------


class Reversible(torch.autograd.Function):
    """Run blocks that it is not given the parameters of, and go backward through a graph of its own (RevNet)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, block: nn.Module) -> torch.Tensor:
        ctx.block, ctx.x = block, x.detach()
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            torch.autograd.backward(ctx.block(x), grad)
        return x.grad, None


class Forgetful(Reversible):
    """Give the input its gradient and the parameters none, as an adjoint solver that was not told of them."""

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            return torch.autograd.grad(ctx.block(x), x, grad)[0], None


class OfAList(torch.autograd.Function):
    """Take a list, in which autograd looks for no tensors."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        return x + others[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class Held(nn.Module):
    """A layer, then a block whose parameters a custom function uses without being given them."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.first, self.block, self.function = nn.Linear(4, 4), nn.Linear(4, 4), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = [self.block.weight] if self.function is OfAList else self.block
        return self.function.apply(self.first(x), given)


@pytest.mark.parametrize("mode", ["real", "structural"])
@pytest.mark.parametrize("function", [Reversible, Forgetful, OfAList])
def test_what_a_custom_function_is_not_given_is_judged_by_its_backward(
    function: type[torch.autograd.Function], mode: str
) -> None:
    model, x = Held(function), torch.ones(4, 4)
    model(x).sum().backward()
    truth = {name: parameter.grad is not None for name, parameter in model.named_parameters()}
    assert truth["first.weight"] and truth["block.weight"] is (function is Reversible)
    model.zero_grad()

    session = gradscope.trace(model, x, mode=mode)
    used = [name for name in truth if function is not OfAList or name != "block.bias"]
    assert {name: session.sources[name].status == "flows" for name in used} == {name: truth[name] for name in used}
    assert [each.rule for each in session.findings] == ([] if function is Reversible else ["GS501"])
    assert session.verdict == ("flows" if function is Reversible else "blocked")
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a GPU that is not there")
@pytest.mark.usefixtures("pretended_cuda")
def test_a_backward_of_its_own_needs_numbers_on_a_device_that_is_not_there() -> None:
    with pytest.raises(NotAnalysedError, match="not given"):
        gradscope.trace(Held(Reversible), torch.ones(4, 4), mode="structural", device="cuda")


# --- parameters overwritten in the forward pass --------------------------------------------------------


class Overwriting(nn.Module):
    """A layer, then another whose weight is overwritten first."""

    def __init__(self, overwrite: Callable[[nn.Parameter, torch.Tensor], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.overwrite = nn.Linear(4, 4), nn.Linear(4, 4), overwrite

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        self.overwrite(self.second.weight, y)
        return self.second(y)


def cast(weight: nn.Parameter, y: torch.Tensor) -> None:
    weight.data = weight.data.to(y.device, y.dtype) * 1


def normalised(weight: nn.Parameter, y: torch.Tensor) -> None:
    weight.data.copy_(torch.nn.functional.normalize(weight.data))


def clipped(weight: nn.Parameter, y: torch.Tensor) -> None:
    with torch.no_grad():
        weight.copy_(weight.clamp(-1, 1))


def generated(weight: nn.Parameter, y: torch.Tensor) -> None:
    weight.data = y.mean(0).expand(4, 4) * weight.data


@pytest.mark.parametrize("mode", ["real", "structural"])
@pytest.mark.parametrize("overwrite", [cast, normalised, clipped])
def test_an_update_of_a_parameter_from_itself_is_no_cut(overwrite: Any, mode: str) -> None:
    session = gradscope.trace(Overwriting(overwrite), torch.ones(4, 4), mode=mode)
    assert session.verdict == "flows" and session.findings == []


def averaged(weight: nn.Parameter, y: torch.Tensor) -> None:
    weight.data.mul_(0.5).add_(y.mean())


@pytest.mark.parametrize("mode", ["real", "structural"])
@pytest.mark.parametrize("overwrite", [generated, averaged])
def test_a_parameter_overwritten_with_what_others_gave_is_one(overwrite: Any, mode: str) -> None:
    session = gradscope.trace(Overwriting(overwrite), torch.ones(4, 4), mode=mode)
    assert session.sources["first.weight"].status == "partial" and session.sources["second.weight"].status == "flows"
    assert [each.rule for each in session.findings] == ["GS202"]


# --- outputs that do not depend on all inputs ----------------------------------------------------------


class Weights(nn.Module):
    """Train on attention weights, of which the output projection is no part."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[1]


class Forces(nn.Module):
    """Train on the derivative of an energy, of which the last bias is no part; ``graph``: in a way that trains."""

    def __init__(self, graph: bool = True, energy: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.graph, self.both = graph, energy

    def forward(self, x: torch.Tensor) -> Any:
        energy = self.energy(x)
        (forces,) = torch.autograd.grad(energy.sum(), x, create_graph=self.graph)
        return (energy, forces) if self.both else forces


@pytest.mark.parametrize("mode", ["real", "structural"])
@pytest.mark.parametrize(("model", "apart"), [(Weights(), "out_proj"), (Forces(), "energy.2.bias")], ids=["w", "f"])
def test_what_the_result_has_nothing_of_is_unused(model: nn.Module, apart: str, mode: str) -> None:
    x = torch.randn(1, 3, 4, requires_grad=True)
    model(x).pow(2).sum().backward()
    truth = {name: parameter.grad is not None for name, parameter in model.named_parameters()}
    model.zero_grad()
    session = gradscope.trace(model, x, mode=mode)
    assert {name: session.sources[name].status for name in truth} == {
        name: "flows" if truth[name] else "unused" for name in truth
    }
    assert [name for name in truth if not truth[name]] == [name for name in truth if apart in name]
    assert session.verdict == "flows" and session.findings == []


class Scripted(nn.Module):
    """Two layers, one of which runs under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.stopped = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.stopped(x)
        return self.trained(x) + y


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_part_that_a_script_loses_is_blamed_on_the_script() -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(Scripted()))
    session = gradscope.trace(model, torch.randn(3, 4), mode="real")
    assert session.verdict == "blocked"
    assert [(each.severity, each.rule, each.cuts) for each in session.findings] == [
        ("error", "GS503", ("1.stopped.bias", "1.stopped.weight"))
    ]
    assert session.sources["1.trained.weight"].status == "flows"
