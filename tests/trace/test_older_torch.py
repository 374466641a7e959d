"""Versions of torch before the newest: refused in a sentence, or traced as the newest is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.torch_version import TorchVersion

import gradscope
from gradscope.errors import UsageError
from gradscope.tracing import instrument
from gradscope.tracing.older_torch import shown
from gradscope.tracing.workshops import open_workshop


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_torch_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.5.1"))
    with pytest.raises(UsageError, match=r"torch 2\.6 or newer, and this is torch 2\.5\.1"):
        gradscope.trace(nn.Linear(2, 2), torch.ones(1, 2))


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("version", "device"), [("2.9.1+cu128", "cpu"), ("2.10.0", "cuda"), ("2.14.1+cpu", "cuda")])
def test_cuda_is_pretended_where_that_does_not_end_the_process(
    version: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    assert open_workshop("auto", "auto").device.type == device
    if device == "cpu":
        with pytest.raises(UsageError, match=r"only torch 2\.10 can do without"):
            gradscope.trace(nn.Linear(2, 2), torch.ones(1, 2), device="cuda")


def test_a_device_that_is_there_is_pretended_by_any_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert open_workshop("structural", "auto").device.type == "cuda"


@pytest.mark.parametrize(
    ("device", "words"), [("xpu", "built without xpu"), ("hpu", "built without hpu"), ("gpu", "no device 'gpu'")]
)
def test_a_device_that_cannot_be_pretended_is_refused_before_torch_ends_the_process(device: str, words: str) -> None:
    if hasattr(torch, device) and getattr(torch, device).is_available():
        pytest.skip("it is there")
    for mode in ("auto", "structural"):
        with pytest.raises(UsageError, match=words):
            gradscope.trace(nn.Linear(2, 2), torch.ones(1, 2), mode=mode, device=device)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def unasking(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as torch had it before 2.9: what it is called in, no function mode is asked about."""

    def all_gather(everywhere: list[torch.Tensor], tensor: torch.Tensor) -> None:
        with torch._C.DisableTorchFunction():
            function(everywhere, tensor)

    return all_gather


class Gathering(nn.Module):
    """A layer, and what it gives gathered from all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        everywhere = [torch.zeros_like(x)]
        distributed.all_gather(everywhere, x)
        return everywhere[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("process_group")
@pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed")
def test_a_collective_that_asks_no_function_mode_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    old = unasking(distributed.all_gather)
    monkeypatch.setattr(distributed, "all_gather", old)
    monkeypatch.setattr(instrument, "unseen_collectives", lambda: ("all_gather",))
    session = gradscope.trace(Gathering(), torch.ones(1, 2), mode="real")
    assert [finding.rule for finding in session.findings] == ["GS206"]
    assert distributed.all_gather is old
    assert shown(old).__name__ == "all_gather"
