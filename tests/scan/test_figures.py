"""Figures and copies beside a loss are looked at and not trained through; the loss itself, and features, are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent, indent

import pytest

from gradscope.findings import Finding
from gradscope.scanning.scanner import scan

HEAD = """
import torch
from torch import nn
from torch.nn import functional as F


class Output(dict):
    pass


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
"""
Scan = Callable[..., list[Finding]]


@pytest.fixture
def of_forward(tmp_path: Path) -> Scan:
    """Return what is found in a class ``Net`` with this forward pass, and with what comes ``after`` it."""

    def find(body: str, after: str = "") -> list[Finding]:
        (tmp_path / "net.py").write_text(HEAD + indent(dedent(body), "        ") + after)
        return scan(str(tmp_path / "net.py"), cache=False).findings

    return find


def wanted(body: str) -> dict[str, bool]:
    """Run the forward pass; return whether the loss, and what is beside it, carry a gradient."""
    torch = pytest.importorskip("torch")
    namespace: dict[str, object] = {}
    exec(compile(HEAD + indent(dedent(body), "        "), "net", "exec"), namespace)
    given = namespace["Net"]()(torch.ones(3, 4))  # type: ignore[operator]
    if isinstance(given, tuple):
        given = dict(zip(("loss", "beside"), given, strict=True))
    loss = given.pop("loss")
    beside = next(iter(given.values()))
    while isinstance(beside, dict):
        beside = next(iter(beside.values()))
    return {"loss": loss.requires_grad, "beside": beside.requires_grad}


# --- figures that a block computes --------------------------------------------------------------------

FIGURES = {
    "in a dictionary": """
        loss = self.layer(x).square().mean()
        with torch.no_grad():
            ppl = torch.exp(loss)
        return loss, {"ppl": ppl}
        """,
    "in a dictionary made by name": """
        loss = self.layer(x).square().mean()
        with torch.no_grad():
            entropy = loss.log()
        return loss, dict(entropy=entropy)
        """,
    "put into a log": """
        loss = self.layer(x).square().mean()
        logs = {}
        with torch.no_grad():
            logs["size"] = loss.sqrt()
        return loss, logs
        """,
    "in a tuple": """
        y = self.layer(x)
        loss = y.square().mean()
        with torch.no_grad():
            perplexity = torch.exp(-(y.softmax(-1) * y.log_softmax(-1)).sum())
        return loss, perplexity
        """,
    "in an output object": """
        loss = self.layer(x).square().mean()
        with torch.no_grad():
            accuracy = (loss * 2).sigmoid()
        return Output(loss=loss, accuracy=accuracy)
        """,
}
PARTS = {
    "features, of a module run in the block": """
        loss = self.layer(x).square().mean()
        with torch.no_grad():
            entropy = self.layer(x + 1)
        return loss, {"entropy": entropy}
        """,
    "features of a layer that the loss does not reach": """
        loss = self.layer(x).square().mean()
        y = self.head(x)
        with torch.no_grad():
            entropy = y.softmax(-1)
        return loss, {"entropy": entropy}
        """,
    "a figure with no loss beside it": """
        y = self.layer(x)
        with torch.no_grad():
            perplexity = y.exp()
        return {"loss": None, "perplexity": perplexity}
        """,
    "the loss itself": """
        y = self.layer(x)
        with torch.no_grad():
            loss = y.square().mean()
        return {"loss": loss, "y": y}
        """,
}


@pytest.mark.parametrize("case", FIGURES)
def test_a_figure_beside_a_loss_is_a_note(of_forward: Scan, case: str) -> None:
    assert wanted(FIGURES[case]) == {"loss": True, "beside": False}
    assert {each.severity for each in of_forward(FIGURES[case]) if each.rule == "GS104"} == {"note"}


@pytest.mark.parametrize("case", PARTS)
def test_what_is_trained_through_is_no_figure(of_forward: Scan, case: str) -> None:
    if case != "a figure with no loss beside it":
        assert wanted(PARTS[case])["loss"] == (case != "the loss itself")
    assert [each.severity for each in of_forward(PARTS[case]) if each.rule == "GS104"] == ["error"]


def test_what_is_no_figure_by_its_name_is_told_of(of_forward: Scan) -> None:
    """It may be meant: an embedding beside a loss."""
    body = """
        y = self.layer(x)
        loss = y.square().mean()
        with torch.no_grad():
            embedding = F.normalize(y)
        return loss, embedding
        """
    assert wanted(body) == {"loss": True, "beside": False}
    assert [each.severity for each in of_forward(body)] == ["warning"]


@pytest.mark.parametrize(("given", "severity"), [("y.std()", "warning"), ("self.layer(y)", "error")])
def test_a_method_that_makes_a_figure_is_no_error(of_forward: Scan, given: str, severity: str) -> None:
    forward = "y = self.layer(x)\nloss = y.square().mean()\nreturn loss, self.spread(y)"
    method = f"@torch.no_grad()\ndef spread(self, y):\n    return {given}"
    outside = "".join(f"\n    {line}" for line in method.splitlines())
    found = of_forward(forward, after=outside)
    assert [each.severity for each in found if each.rule == "GS102"] == [severity]


# --- detached copies ----------------------------------------------------------------------------------

COPIES = {
    "in a log": """
        loss = self.layer(x).square().mean()
        log = {"{}/total".format("train"): loss.clone().detach().mean()}
        return loss, log
        """,
    "under the name of a loss": """
        rec = self.layer(x).square().mean()
        loss = rec + x.mean()
        return {"loss": loss, "rec_loss": rec.detach()}
        """,
    "in a field of an output object": """
        loss = self.layer(x).square().mean()
        return Output(loss=loss, loss_all=loss.detach())
        """,
    "put into a log": """
        loss = self.layer(x).square().mean()
        metrics = {}
        metrics["rec"] = loss.detach()
        return loss, metrics
        """,
}
CUTS = {
    "the loss itself": """
        loss = self.layer(x).square().mean()
        return {"loss": loss.detach(), "n": x}
        """,
    "the loss itself, before": """
        loss = self.layer(x).square().mean()
        loss = loss.detach()
        return loss, {"n": x}
        """,
    "features beside a loss": """
        y = self.layer(x)
        loss = y.square().mean()
        return Output(loss=loss, features=y.detach())
        """,
    "features on the line of a loss": """
        y = self.layer(x)
        loss = y.square().mean()
        return {"loss": loss, "features": y.detach()}
        """,
    "all of the losses": """
        y = self.layer(x)
        losses = {}
        losses["loss_rec"] = y.square().mean().detach()
        return losses
        """,
}


@pytest.mark.parametrize("case", COPIES)
def test_a_detached_copy_of_a_loss_is_a_note(of_forward: Scan, case: str) -> None:
    assert wanted(COPIES[case]) == {"loss": True, "beside": False}
    found = of_forward(COPIES[case])
    assert [(each.rule, each.severity) for each in found] == [("GS201", "note")]
    assert "a copy beside the loss" in found[0].message


@pytest.mark.parametrize("case", CUTS)
def test_a_detach_that_is_no_copy_of_a_loss_is_told_of(of_forward: Scan, case: str) -> None:
    assert [(each.rule, each.severity) for each in of_forward(CUTS[case])] == [("GS201", "warning")]


def test_a_weight_made_of_derivatives_and_detached_is_told_of_once_at_most(of_forward: Scan) -> None:
    body = """
        y = self.layer(x)
        loss = y.square().mean()
        size = torch.autograd.grad(loss, y, retain_graph=True)[0].norm()
        return {}
        """
    assert [each.severity for each in of_forward(body.format("loss / size.detach()"))] == ["note", "note"]
    assert [each.severity for each in of_forward(body.format("loss / size"))] == ["warning"]
