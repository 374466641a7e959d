"""What a step of training hands to its optimizer and gets no gradient back to: torch is asked for each first."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest

from gradscope.findings import Finding
from gradscope.scanning.scanner import scan

HEAD = """
import copy
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim import Adam

X, Y = torch.ones(3, 4), torch.zeros(3, 4)


def own(y):
    return y.square().mean()


def freeze(part):
    for each in part.parameters():
        each.requires_grad = False
"""
IN_A_FUNCTION = """
def train():
    enc, head = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(enc, head)
    opt = Adam({given})
    for _ in range(2):
        {body}
        opt.zero_grad()
        loss.backward()
        opt.step()


train()
"""
IN_A_CLASS = """
class Trainer:
    def __init__(self):
        self.enc, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.model = nn.Sequential(self.enc, self.head)
        self.opt = Adam({given})

    def features(self, x):
        return self.enc(x)

    def run(self, x):
        {body}
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()


Trainer().run(X)
"""
BOTH = "[*enc.parameters(), *head.parameters()]"
LOSES = {
    "a block": (BOTH, "with torch.no_grad():\n    f = enc(X)\nloss = head(f).sum()"),
    "inference mode": (BOTH, "with torch.inference_mode():\n    f = enc(X)\nloss = head(f.clone()).sum()"),
    "a detach": (BOTH, "f = enc(X).detach()\nloss = head(f).sum()"),
    "a detach in the loss": (BOTH, "loss = F.mse_loss(head(enc(X).detach()), Y)"),
    "the data": (BOTH, "f = F.relu(enc(X))\nloss = head(f.data).sum()"),
    "numpy and back": (BOTH, "f = F.relu(enc(X))\nloss = head(torch.from_numpy(f.detach().numpy())).sum()"),
    "a loss made anew": (
        "list(enc.parameters()) + list(head.parameters())",
        "loss = F.mse_loss(head(enc(X)), Y)\nloss = torch.tensor(loss, requires_grad=True)",
    ),
    "a loss made a leaf": (BOTH, "loss = F.mse_loss(head(enc(X)), Y)\nloss = loss.detach().requires_grad_()"),
    "groups of parameters": (
        '[{"params": enc.parameters()}, {"params": head.parameters(), "lr": 0.1}]',
        "with torch.no_grad():\n    f = enc(X)\nloss = head(f).sum()",
    ),
    "a model put together": (
        "model.parameters()", "with torch.no_grad():\n    f = enc(X)\nloss = head(f).sum()",
    ),
    "indices": (BOTH, "loss = F.mse_loss(head(enc(X)).argmax(-1).float(), Y[:, 0])\nloss.requires_grad = True"),
    "a hard decision": (BOTH, "loss = F.mse_loss((head(enc(X)) > 0.5).float(), Y).requires_grad_()"),
    "numbers added up": (
        BOTH,
        "loss = 0\nfor _ in range(2):\n    loss += head(enc(X)).sum().item()\n"
        "loss = torch.tensor(loss, requires_grad=True)",
    ),
    "one of two ways": (BOTH, "a = enc(X).detach()\nb = X + 1\nloss = head(a + b).sum()"),
    "a switch that is called": (
        BOTH, "torch.set_grad_enabled(False)\nf = enc(X)\ntorch.set_grad_enabled(True)\nloss = head(f).sum()",
    ),
}  # fmt: skip
KEEPS = {
    "an encoder that is not trained": (
        "head.parameters()", "with torch.no_grad():\n    f = enc(X)\nloss = head(f).sum()",
    ),
    "a frozen encoder": (
        BOTH, "enc.requires_grad_(False)\nwith torch.no_grad():\n    f = enc(X)\nloss = head(f).sum()",
    ),
    "an encoder frozen by a loop": (
        BOTH,
        "for p in enc.parameters():\n    p.requires_grad = False\n"
        "with torch.no_grad():\n    f = enc(X)\nloss = head(f).sum()",
    ),
    "a target, and the encoder besides": (BOTH, "t = enc(X + 1).detach()\nloss = F.mse_loss(head(enc(X)), t)"),
    "a block around a target": (BOTH, "with torch.no_grad():\n    t = enc(X + 1)\nloss = F.mse_loss(head(enc(X)), t)"),
    "a copy": (BOTH, "t = copy.deepcopy(enc)\nwith torch.no_grad():\n    y = t(X)\nloss = F.mse_loss(head(enc(X)), y)"),
    "what is printed": (BOTH, "loss = head(enc(X)).sum()\nprint(loss.detach(), loss.item())"),
    "what is counted": (BOTH, "y = head(enc(X))\nloss = y.sum()\nright = (y.argmax(-1) == 0).sum()\nprint(right)"),
    "what is counted beside a loss of one's own": (
        BOTH, "y = head(enc(X))\nloss = own(y)\nright = (y.argmax(-1) == 0).sum()\nprint(right)",
    ),
    "what is measured": (
        BOTH, "y = head(enc(X))\nloss = y.sum()\nwith torch.no_grad():\n    error = (y - Y).abs().mean()\nprint(error)",
    ),
    "an average": (
        BOTH, "loss = head(enc(X)).sum()\nwith torch.no_grad():\n    enc.weight.mul_(0.99)\n    loss_seen = loss.exp()",
    ),
    "a part that is trained as part of the whole": (
        "model.parameters()",
        "with torch.no_grad():\n    middle = enc(X).mean(0)\nloss = F.mse_loss(model(X), middle.expand(3, 4))",
    ),
    "an encoder frozen by a function": (
        BOTH, "freeze(enc)\nwith torch.no_grad():\n    f = enc(X)\nloss = head(f).sum()",
    ),
    "state of a recurrent layer": (BOTH, "h = X\nfor _ in range(2):\n    h = enc(h.detach())\nloss = head(h).sum()"),
    "a scaler of gradients": (BOTH, "y = head(enc(X))\nloss = (y / y.detach().norm()).sum()"),
}  # fmt: skip


def in_a_function(given: str, body: str) -> str:
    return HEAD + IN_A_FUNCTION.replace("{given}", given).replace("{body}", body.replace("\n", "\n        "))


def in_a_class(given: str, body: str) -> str:
    own, body = (re.sub(r"\b(enc|head|model)\b", r"self.\1", part) for part in (given, body.replace("(X)", "(x)")))
    return HEAD + IN_A_CLASS.replace("{given}", own).replace("{body}", body.replace("\n", "\n        "))


def in_a_script(given: str, body: str) -> str:
    lines = in_a_function(given, body).partition("def train():\n")[2].rpartition("\n\n\ntrain()")[0]
    return HEAD + dedent(lines) + "\n"


def in_a_program(given: str, body: str) -> str:
    lines = in_a_function(given, body).partition("def train():\n")[2].rpartition("\n\n\ntrain()")[0]
    return f'{HEAD}\nif __name__ == "__main__":\n{lines}\n'


SHAPES = {"function": in_a_function, "class": in_a_class, "script": in_a_script, "program": in_a_program}


def loses(source: str) -> bool:
    """Run a script; tell whether a parameter that wants one and is with an optimizer got no gradient."""
    torch = pytest.importorskip("torch")
    made = []

    class Recorded(torch.optim.Adam):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    source = source.replace("from torch.optim import Adam\n", "")
    try:
        exec(compile(source, "script", "exec"), {"Adam": Recorded, "print": lambda *_: None, "__name__": "__main__"})
    finally:
        torch.set_grad_enabled(True)
    given = [each for optimizer in made for group in optimizer.param_groups for each in group["params"]]
    return any(each.grad is None for each in given if each.requires_grad)


def grave(folder: Path, source: str) -> list[Finding]:
    (folder / "script.py").write_text(source)
    return [each for each in scan(str(folder / "script.py"), cache=False).findings if each.severity == "error"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", LOSES)
def test_what_is_handed_to_an_optimizer_and_gets_no_gradient_is_an_error(tmp_path: Path, case: str, shape: str) -> None:
    source = SHAPES[shape](*LOSES[case])
    assert loses(source)
    found = grave(tmp_path, source)
    assert found
    assert "enc" in found[0].message
    assert "handed to an optimizer" in found[0].message


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", KEEPS)
def test_what_gets_its_gradient_or_wants_none_is_no_error(tmp_path: Path, case: str, shape: str) -> None:
    source = SHAPES[shape](*KEEPS[case])
    assert not loses(source)
    assert grave(tmp_path, source) == []


TWO_STEPS = """
class Trainer:
    def __init__(self):
        self.enc, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.{first} = Adam(self.enc.parameters())
        self.{second} = Adam({given})

    def step_enc(self, x):
        loss = self.enc(x).sum()
        loss.backward()
        self.{first}.step()

    def step_head(self, x):
        with torch.no_grad():
            f = self.enc(x)
        loss = self.head(f).sum()
        loss.backward()
        {stepped}.step()


trainer = Trainer()
trainer.step_enc(X)
trainer.step_head(X)
"""


@pytest.mark.parametrize(
    ("given", "stepped"),
    [
        ("self.head.parameters()", "self.opt_head"),
        ("[*self.enc.parameters(), *self.head.parameters()]", "self.opt_head"),
        ("self.head.parameters()", "{'head': self.opt_head}['head']"),
    ],
)
def test_steps_that_take_turns_lose_nothing(tmp_path: Path, given: str, stepped: str) -> None:
    source = HEAD + TWO_STEPS.format(first="opt_enc", second="opt_head", given=given, stepped=stepped)
    assert not loses(source)
    assert grave(tmp_path, source) == []


OWN_METHOD = """
class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        {freeze}


class Reader(Base):
    {decorator}
    def features(self, x):
        {body}

    def training_step(self, x):
        return self.head(self.features(x)).sum()

    def configure_optimizers(self):
        return Adam(self.parameters())


reader = Reader()
optimizer = reader.configure_optimizers()
reader.training_step(X).backward()
"""
STOPPED = ("@torch.no_grad()", "return self.enc(x)"), ("", "with torch.no_grad():\n            return self.enc(x)")
FREEZES = (
    "self.enc.requires_grad_(False)",
    "for each in self.enc.parameters(): each.requires_grad = False",
    "for name, each in self.named_parameters():\n"
    "            if 'enc' in name:\n                each.requires_grad = False",
    "self.enc.freeze = lambda: self.enc.requires_grad_(False)\n        self.enc.freeze()",
)


@pytest.mark.parametrize(("decorator", "body"), STOPPED)
def test_a_method_that_a_step_calls_is_judged_by_the_step(tmp_path: Path, decorator: str, body: str) -> None:
    source = HEAD + OWN_METHOD.format(decorator=decorator, body=body, freeze="")
    assert loses(source)
    (found,) = grave(tmp_path, source)
    assert (
        "self.enc is handed to an optimizer, and no gradient of Reader.training_step gets back there" in found.message
    )


@pytest.mark.parametrize("freeze", FREEZES)
@pytest.mark.parametrize(("decorator", "body"), STOPPED)
def test_what_a_base_class_freezes_wants_no_gradient(tmp_path: Path, decorator: str, body: str, freeze: str) -> None:
    source = HEAD + OWN_METHOD.format(decorator=decorator, body=body, freeze=freeze)
    assert not loses(source)
    assert grave(tmp_path, source) == []


def test_a_step_that_gives_what_is_shown_loses_nothing(tmp_path: Path) -> None:
    source = f"""{HEAD}
def train():
    enc, head = nn.Linear(4, 4), nn.Linear(4, 4)
    opt = Adam([*enc.parameters(), *head.parameters()])
    for _ in range(2):
        loss = head(enc(X)).sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        shown = head(enc(X))
    return loss.detach(), shown


train()
"""
    assert not loses(source)
    assert grave(tmp_path, source) == []


def test_what_a_global_object_keeps_may_carry_a_gradient(tmp_path: Path) -> None:
    """As in PyTorch's own example of REINFORCE, where only the returns are made anew."""
    source = f"""{HEAD}
policy = nn.Linear(4, 4)
policy.saved, policy.rewards = [], [1.0, 2.0]
optimizer = Adam(policy.parameters())


def finish_episode():
    losses, returns = [], []
    for reward in policy.rewards[::-1]:
        returns.insert(0, reward)
    returns = torch.tensor(returns)
    for log_prob, value in zip(policy.saved, returns):
        losses.append(-log_prob * value)
    loss = torch.stack(losses).sum()
    loss.backward()
    optimizer.step()


policy.saved = [policy(X).sum(), policy(X).mean()]
finish_episode()
"""
    assert not loses(source)
    assert grave(tmp_path, source) == []
