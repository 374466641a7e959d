"""Ways to lose a gradient that people have reported in public, each in a few lines of our own; torch is asked first."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from gradscope.findings import Finding
from gradscope.scanning.scanner import scan

HEAD = """
import copy
import math
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence
"""
# By the issue: a source, which parameters (or ``x``) get no gradient of it, and the rule that says so.
REPORTED = {
    "mlfoundations/open_flamingo#253": (
        """
        class Layer(nn.Module):
            def condition_on(self, media):
                self.media = media

            def forward(self, x):
                return x + self.media


        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.vision, self.perceiver, self.layer = nn.Linear(4, 4), nn.Linear(4, 4), Layer()

            def _encode(self, x):
                with torch.no_grad():
                    x = self.vision(x)
                x = self.perceiver(x)
                self.layer.condition_on(x)

            def forward(self, x):
                self._encode(x)
                return self.layer(torch.ones(4))
        """,
        {"vision.weight", "vision.bias", "x"},
        ("GS104", "error"),
    ),
    "edreisMD/ConVIRT-pytorch#7": (
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.bert, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

            def text_encoder(self, x):
                with torch.no_grad():
                    out = self.bert(x)
                    out = self.head(F.relu(out))
                return out

            def forward(self, x):
                return self.text_encoder(x)
        """,
        {"bert.weight", "bert.bias", "head.weight", "head.bias", "x"},
        ("GS104", "error"),
    ),
    "facebookresearch/dinov2#472": (
        """
        class Padding(nn.Module):
            @torch.inference_mode()
            def forward(self, x):
                return F.pad(x, [1, 1])


        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.pad = nn.Linear(4, 4), Padding()

            def forward(self, x):
                return self.pad(self.layer(x)).clone()
        """,
        {"layer.weight", "layer.bias", "x"},
        ("GS101", "error"),
    ),
    "wonbeomjang/mobile-hair-segmentation-pytorch#3": (
        """
        class EdgeLoss(nn.Module):
            def forward(self, pred, image):
                pred = pred.argmax(1).float()
                return (pred * image.mean(1)).mean()


        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.loss = nn.Linear(4, 4), EdgeLoss()

            def forward(self, x):
                return self.loss(self.layer(x), x)
        """,
        {"layer.weight", "layer.bias"},
        ("GS401", "warning"),
    ),
    "Ugenteraan/Deep_Hierarchical_Classification#6": (
        """
        def calculate_dloss(predictions, y):
            right = torch.argmax(nn.Softmax(dim=1)(predictions), dim=1)
            return torch.pow(2.0, (right != y).float()).sum()


        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x):
                return calculate_dloss(self.layer(x), torch.zeros(3))
        """,
        {"layer.weight", "layer.bias", "x"},
        ("GS401", "warning"),
    ),
    "huggingface/torchMoji#21": (
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x):
                outputs = self.layer(x)
                if True:
                    outputs = outputs.data
                return outputs
        """,
        {"layer.weight", "layer.bias", "x"},
        ("GS202", "warning"),
    ),
    "NVlabs/DG-Net#40": (
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                f = self.layer(x)
                f = f.detach()  # no gradient
                return self.head(f)
        """,
        {"layer.weight", "layer.bias", "x"},
        ("GS201", "warning"),
    ),
    "dragen1860/IntroVAE-Pytorch#3": (
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                xp = self.decoder(torch.ones(3, 4))
                return self.encoder(xp.detach()) + x
        """,
        {"decoder.weight", "decoder.bias"},
        ("GS201", "warning"),
    ),
    "JunMa11/SegLossOdyssey#17": (
        """
        class DistanceLoss(nn.Module):
            @torch.no_grad()
            def field(self, x):
                return x * 2

            def forward(self, pred):
                return torch.from_numpy(self.field(pred.detach().numpy())).mean()


        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.loss = nn.Linear(4, 4), DistanceLoss()

            def forward(self, x):
                return self.loss(self.layer(x))
        """,
        {"layer.weight", "layer.bias", "x"},
        ("GS201", "warning"),
    ),
}
# What looks alike and is meant so.
ALIKE = {
    "a figure beside a loss": """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x):
                y = self.layer(x)
                with torch.no_grad():
                    acc = y.sigmoid().mean()
                return {"loss": y.sum(), "acc": acc}
        """,
    "a batch shuffled for a momentum encoder": """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.backbone = nn.Linear(4, 4)
                self.momentum_backbone = copy.deepcopy(self.backbone)

            @torch.no_grad()
            def _shuffle(self, x):
                return x[torch.randperm(x.shape[0])]

            def forward(self, x):
                with torch.no_grad():
                    k = self.momentum_backbone(self._shuffle(x))
                return (self.backbone(x) * k).sum()
        """,
    "a packed sequence": """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.LSTM(4, 4, batch_first=True)

            def forward(self, x):
                packed = pack_padded_sequence(x[None], torch.tensor([3]), batch_first=True)
                packed, _ = self.layer(packed)
                return packed.data.sum()
        """,
    "a block at the top level that ends": """
        with torch.set_grad_enabled(False):
            table = torch.ones(4)


        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x):
                return self.layer(x) * table
        """,
}


def without_gradient(source: str) -> set[str]:
    """Run a class ``Net`` and return what of it, and of its input, gets no gradient."""
    torch = pytest.importorskip("torch")
    namespace: dict[str, object] = {}
    exec(compile(HEAD + dedent(source), "net", "exec"), namespace)
    net, x = namespace["Net"](), torch.randn(3, 4, requires_grad=True)  # type: ignore[operator]
    given = net(x)
    value = given["loss"] if isinstance(given, dict) else given
    if value.requires_grad:
        value.sum().backward()
    missing = {name for name, each in net.named_parameters() if each.grad is None}
    return missing | ({"x"} if x.grad is None else set())


def found_in(folder: Path, source: str) -> list[Finding]:
    (folder / "net.py").write_text(HEAD + dedent(source))
    return scan(str(folder / "net.py"), cache=False).findings


@pytest.mark.parametrize("issue", REPORTED)
def test_what_was_reported_is_found(tmp_path: Path, issue: str) -> None:
    source, missing, expected = REPORTED[issue]
    assert without_gradient(source) == missing
    assert expected in [(each.rule, each.severity) for each in found_in(tmp_path, source)]


@pytest.mark.parametrize("issue", ALIKE)
def test_what_is_meant_so_is_a_note(tmp_path: Path, issue: str) -> None:
    assert {name for name in without_gradient(ALIKE[issue]) if "momentum" not in name and "head" not in name} == set()
    assert {each.severity for each in found_in(tmp_path, ALIKE[issue])} <= {"note"}
