"""Detaches that training is made with: all that is trained still gets its gradient. Others are told of."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent, indent

import pytest

from gradscope.findings import Finding
from gradscope.scanning.scanner import scan

HEAD = """
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.discriminator = nn.Linear(4, 1)
        self.criterion = nn.CosineSimilarity()

    def forward(self, x, step=0):
"""
# What is trained, beside the input: each must get a gradient.
MEANT = {
    "both sides of a loss, each held still once": (
        """
        q = self.layer(x).round() + self.layer.weight.sum() * 0 + self.layer.bias
        return F.mse_loss(q, x.detach()) + 0.25 * F.mse_loss(q.detach(), x)
        """,
        {"layer"},
    ),
    "both sides of a difference": (
        """
        q = self.layer.bias + self.layer.weight.sum() * 0
        return torch.mean((q.detach() - x) ** 2) + torch.mean((q - x.detach()) ** 2)
        """,
        {"layer"},
    ),
    "a code that averages move and no gradient": (
        """
        z = self.layer(x)
        q = F.embedding(z.argmax(-1), torch.eye(4))
        diff = (q.detach() - z).square().mean()
        q = z + (q - z).detach()
        return diff + q.sum()
        """,
        {"layer"},
    ),
    "the other view": (
        """
        z1, z2 = self.layer(x), self.layer(x + 1)
        p1, p2 = self.head(z1), self.head(z2)
        return -(self.criterion(p1, z2.detach()).mean() + self.criterion(p2, z1.detach()).mean())
        """,
        {"layer", "head"},
    ),
    "what a model is compared with": (
        "return F.mse_loss(self.layer(x), target=x.softmax(-1).detach())",
        {"layer"},
    ),
    "the largest value": (
        """
        y = self.layer(x)
        y = y - y.amax(dim=-1, keepdim=True).detach()
        return (y.softmax(-1) * x).sum()
        """,
        {"layer"},
    ),
    "the largest value, with its index": (
        """
        y = self.layer(x)
        y = (y - y.max(dim=-1, keepdim=True)[0].detach()).exp()
        return (y / y.sum(-1, keepdim=True) * x).sum()
        """,
        {"layer"},
    ),
    "a discriminator by itself": (
        """
        fake = self.layer(x)
        if step == 0:
            return -self.discriminator(fake).mean()
        return F.relu(1 + self.discriminator(fake.detach())).mean() + x.sum()
        """,
        {"layer", "discriminator"},
    ),
}
NOT_MEANT = {
    "the model's own work, compared with a target": "return F.mse_loss(self.layer(x).detach(), x)",
    "a generator that is not reached": "return -self.discriminator(self.layer(x).detach()).mean()",
    "one side only": "return torch.mean((self.layer(x).detach() - x) ** 2)",
    "the mean and not the largest value": "y = self.layer(x)\nreturn (y - y.mean().detach()).exp().sum()",
    "the largest value of another": "y = self.layer(x)\nreturn (x - y.amax(-1, keepdim=True).detach()).exp().sum()",
    "a weight": "y = self.layer(x)\nreturn ((1 - y).detach() * y).sum()",
    "both sides at once": "return F.mse_loss(self.layer(x).detach(), self.head(x).detach())",
}


def found_in(folder: Path, body: str) -> list[Finding]:
    (folder / "net.py").write_text(HEAD + indent(dedent(body), "        "))
    return [each for each in scan(str(folder / "net.py"), cache=False).findings if each.rule == "GS201"]


def parts_with_gradient(body: str) -> set[str]:
    """Run both steps and return the parts of the model that get a gradient, and ``x`` where the input does."""
    torch = pytest.importorskip("torch")
    namespace: dict[str, object] = {}
    exec(compile(HEAD + indent(dedent(body), "        "), "net", "exec"), namespace)
    torch.manual_seed(0)
    net, x = namespace["Net"](), torch.randn(3, 4, requires_grad=True)  # type: ignore[operator]
    for step in (0, 1):
        value = net(x, step)
        if value.requires_grad:
            value.backward()
    names = {name.partition(".")[0] for name, each in net.named_parameters() if each.grad is not None}
    return names | ({"x"} if x.grad is not None else set())


@pytest.mark.parametrize("case", MEANT)
def test_a_detach_that_training_is_made_with_is_a_note(tmp_path: Path, case: str) -> None:
    body, trained = MEANT[case]
    assert parts_with_gradient(body) == {*trained, "x"}
    found = found_in(tmp_path, body)
    assert found
    assert {each.severity for each in found} == {"note"}


@pytest.mark.parametrize("case", NOT_MEANT)
def test_any_other_detach_is_told_of(tmp_path: Path, case: str) -> None:
    assert "warning" in {each.severity for each in found_in(tmp_path, NOT_MEANT[case])}


@pytest.mark.parametrize("shift", ["y.amax(dim=-1, keepdim=True)", "y.max(dim=-1, keepdim=True)[0]"])
def test_the_largest_value_is_cancelled_by_a_softmax(shift: str) -> None:
    torch = pytest.importorskip("torch")
    y = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    weights = torch.randn(3, 4, dtype=torch.double)
    shifted = eval(f"(y - {shift}.detach()).softmax(-1)")
    with_and_without = [torch.autograd.grad((each * weights).sum(), y)[0] for each in (shifted, y.softmax(-1))]
    torch.testing.assert_close(*with_and_without)
