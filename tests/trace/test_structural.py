"""Building a model without memory for its weights: what constructors do that must go on working."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import nn

import gradscope
from gradscope.errors import UsageError
from gradscope.tracing.structural import hollow

# As transformers keeps the initialisers that hollow() replaces.
TRUE_NORMAL = nn.init.normal_


class Table(nn.Module):
    """Fills a buffer on the device of a weight, and starts the weight without ``torch.nn.init``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))
        self.register_buffer("index", torch.zeros(4, dtype=torch.int64))
        self.index.copy_(torch.arange(4, device=self.weight.device))
        with torch.no_grad():
            self.weight.normal_().clamp_(-1, 1)
            self.weight.data.mul_(2)
            TRUE_NORMAL(tensor=self.weight, std=0.02)


def test_a_table_made_on_the_device_of_a_weight_has_its_values() -> None:
    model = hollow(Table)
    assert model.index.tolist() == [0, 1, 2, 3]
    assert model.weight.device.type == "meta"
    assert model.weight.requires_grad


class Probed(nn.Module):
    """Runs a layer once to see the shape that it gives, as timm's hybrids and torchvision's SSD do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3, stride=2)
        side = self.layer(torch.zeros(1, 3, 9, 9)).shape[-1]
        self.head = nn.Linear(8 * side * side, 2)


def test_a_constructor_may_run_its_layers_to_see_a_shape() -> None:
    assert hollow(Probed).head.in_features == 8 * 4 * 4


class Copied(nn.Module):
    """Takes over a weight as a buffer, as the frozen normalisation of transformers' DETR does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))
        self.register_buffer("scale", torch.ones(3))
        self.scale.data.copy_(self.weight)


def test_a_buffer_may_be_written_from_a_weight() -> None:
    assert hollow(Copied).scale.shape == (3,)


class Counted(nn.Module):
    """Asks for a number that it computed itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2))
        self.rate = torch.linspace(0, 1, 3).mul_(2).add_(1).tolist()


def test_what_has_values_is_computed() -> None:
    assert hollow(Counted).rate == [1.0, 2.0, 3.0]


class CopiesItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("order", torch.tensor([3, 2, 1, 0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        twin = copy.deepcopy(self)
        assert twin.order.tolist() == [3, 2, 1, 0]  # its numbers are there, whatever was copied before it
        return self.layer(x)[:, twin.order]


def test_what_is_copied_along_with_a_weight_keeps_its_numbers() -> None:
    session = gradscope.trace(CopiesItself(), torch.ones(2, 4), mode="structural")
    assert session.verdict == "flows"


def test_nobody_asks_a_fake_tensor_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch warns of it once in a process, and says that it will raise one day."""
    original, asked = torch.UntypedStorage.data_ptr, []

    def data_ptr(self: torch.UntypedStorage) -> int:
        asked.append(self.device.type)
        return original(self)

    monkeypatch.setattr(torch.UntypedStorage, "data_ptr", data_ptr)
    gradscope.trace(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(3, 4), mode="structural")
    assert "meta" not in asked


class Copies(nn.Module):
    """Copies a module whose buffers have values, as timm does to prune a model."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        layer.append(layer[1])
        self.twin = copy.deepcopy(layer)


def test_a_copy_made_in_a_constructor_keeps_its_ties() -> None:
    calls = []
    original = torch.Tensor.to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda self, *args: calls.append(args) or original(self, *args))
        twin = hollow(Copies).twin
    assert twin[1] is twin[2]
    assert twin[1].running_mean.tolist() == [0.0] * 4, "a buffer keeps its numbers"
    assert len(calls) <= 8, "each parameter goes to the meta device once"


class Inside:
    """A plain object, as a sampler or a settings class is."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight


class KeptElsewhere(nn.Module):
    """Uses what was made of its parameters when it was built, and one of them by another way than its name."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.held, self.listed, self.off = (nn.Parameter(torch.rand(4) + 1) for _ in range(4))
        self.half = self.part[:2] * 2
        self.sampler = Inside(self.held[:2].exp())
        self.all = [self.listed]
        self.cut = self.off[:2] * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            gate = x * self.cut
        return x * self.half + self.sampler.weight + self.all[0][:2] + gate


def test_what_a_model_made_of_its_parameters_before_the_run_leads_to_them() -> None:
    model = KeptElsewhere()
    session = gradscope.trace(model, torch.rand(3, 2))
    statuses = {name: source.status for name, source in session.sources.items() if source.kind == "parameter"}
    assert statuses == {"part": "flows", "held": "flows", "listed": "flows", "off": "blocked"}
    assert session.target["mode"] == "real"
    assert any("from where it is not registered" in words for words in session.remarks)
    model(torch.rand(3, 2)).sum().backward()  # the graph from before is still there
    assert {name for name, each in model.named_parameters() if each.grad is None} == {"off"}


def test_what_was_kept_and_is_not_used_costs_nothing() -> None:
    class Unused(KeptElsewhere):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.part[:2]

    assert gradscope.trace(Unused(), torch.rand(3, 2)).target["mode"] == "structural"


# --- models whose weights are not there -----------------------------------------------------------------


class Loader(Mapping[str, torch.Tensor]):
    """Weights that an offloading library reads from the disk one by one."""

    def __getitem__(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read for nothing")

    def __iter__(self) -> Iterator[str]:
        return iter(["weight"])

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("given", [torch.ones(2, 4), torch.ones(2, 4, device="meta")])
def test_a_model_on_the_meta_device_is_traced_and_an_input_follows_it(given: torch.Tensor) -> None:
    model = nn.Linear(4, 4, device="meta")
    model.loader = Loader()
    assert gradscope.trace(model, given).verdict == "flows"
    with pytest.raises(UsageError, match="keeps no numbers"):
        gradscope.trace(model, given, mode="real")


class Moving(nn.Module):
    """Brings its layer to where the input is, as demucs and soft-moe-pytorch do in each call."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = nn.Linear(4, 4), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layer.to(x.device).to(self.dtype)
        out: torch.Tensor = self.layer(x.to(self.dtype))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_forward_pass_may_move_a_module_that_has_no_memory(dtype: torch.dtype) -> None:
    model = Moving(dtype)
    weight = model.layer.weight
    session = gradscope.trace(model, torch.ones(2, 4), mode="structural")
    assert session.verdict == "flows" and {source.status for source in session.sources.values()} == {"flows"}
    assert model.layer.weight is weight and weight.dtype is torch.float32
