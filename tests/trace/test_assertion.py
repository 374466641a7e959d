"""``assert_gradients_flow``: what it asks about, what it allows, what its failure carries."""

from __future__ import annotations

import pickle
import traceback

import pytest
import torch
from torch import nn

import gradscope
from gradscope.assertion import GradientsDoNotFlow
from gradscope.gathering import gathered


class Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(4, 4)
        self.student = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.student(x) - self.teacher(x).detach()


def test_what_is_allowed_is_not_held_against_an_input_that_nobody_asks_about() -> None:
    class Encoded(Cut):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.student(self.teacher(x).detach())

    session = gradscope.assert_gradients_flow(Encoded(), torch.ones(2, 4), allow="teacher.*")
    assert session.sources["input.0"].status == "blocked"
    assert [finding.state for finding in session.findings] == ["expected"]
    with pytest.raises(AssertionError, match=r"input\.0"):
        gradscope.assert_gradients_flow(Encoded(), torch.ones(2, 4, requires_grad=True), allow="teacher.*")
    with pytest.raises(AssertionError, match=r"input\.0"):
        gradscope.assert_gradients_flow(Encoded(), torch.ones(2, 4), allow="teacher", wrt=["teacher", "input.0"])


def test_what_is_asked_about_by_name_has_to_matter() -> None:
    class Edges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    given = torch.ones(2, 4), torch.ones(3)
    assert gradscope.assert_gradients_flow(Edges(), *given).verdict == "flows"
    with pytest.raises(AssertionError, match=r"the result does not depend on input\.1: there is no gradient to arrive"):
        gradscope.assert_gradients_flow(Edges(), *given, wrt="input.1")
    gradscope.assert_gradients_flow(Edges(), *given, wrt=["input.1", "layer"])


def test_the_failure_carries_the_session_through_a_pickle() -> None:
    with pytest.raises(GradientsDoNotFlow) as caught:
        gradscope.assert_gradients_flow(Cut(), torch.ones(2, 4))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.session.to_dict()) == (str(caught.value), caught.value.session.to_dict())
    text = "".join(traceback.format_exception_only(caught.value))
    assert text.startswith("gradscope.GradientsDoNotFlow: the gradient does not arrive at teacher.bias, teacher.weight")


def test_a_crash_names_what_autograd_says_and_the_line_that_is_to_blame() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.sigmoid(x * self.scale)
            z = y * 2
            y.add_(1)
            return z

    with pytest.raises(GradientsDoNotFlow) as caught:
        gradscope.assert_gradients_flow(Written(), torch.ones(2, 4), mode="real")
    said = str(caught.value)
    assert said.startswith("autograd refuses the run: RuntimeError: one of the variables needed")
    assert "GS603 in-place-hazard" in said and "> y.add_(1)" in said


def test_sessions_gathered_keep_what_each_found_and_share_a_place() -> None:
    cut, sound = gradscope.trace(Cut(), torch.ones(2, 4)), gradscope.trace(nn.Linear(4, 1), torch.ones(2, 4))
    whole = gathered([("a", cut), ("b", sound), ("a", cut)])
    assert whole.verdict == cut.verdict == "blocked"
    assert [each["name"] for each in whole.stats["traces"]] == ["a", "b", "a #2"]
    (finding,) = [each for each in whole.findings if each.severity == "error"]
    assert set(finding.cuts) == {f"{name}: {each}" for name in ("a", "a #2") for each in cut.findings[0].cuts}
    assert whole.fix_set == [finding.id] and whole.fix_verified
    assert len(whole.sources) == 2 * len(cut.sources) + len(sound.sources)
    ids = {node.id for node in whole.graph.nodes}
    assert len(ids) == len(whole.graph.nodes)
    assert all(node.parent is None or node.parent in ids for node in whole.graph.nodes)
    assert all(edge.source in ids and edge.target in ids for edge in whole.graph.edges)
    assert {node.finding for node in whole.graph.nodes if node.finding} <= {each.id for each in whole.findings}
    assert gathered([("a", cut)]).to_dict() == {**cut.to_dict(), "stats": gathered([("a", cut)]).stats}
