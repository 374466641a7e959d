"""Weights that are kept for a teacher or a target network: no part of the student's gradient is missed there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradscope
from gradscope.session import Session

Update = Callable[[nn.Module, nn.Module], None]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


class Distilled(nn.Module):
    """A student learns what a teacher says, which is an average of what the student was."""

    def __init__(self, update: Update, target: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, self.teacher = network(), network().requires_grad_(False)
        self.update, self.target = update, target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.update(self.teacher, self.student)
        return functional.mse_loss(self.student(x), self.target(self.teacher, x) + 0.1)


def pairs(teacher: nn.Module, student: nn.Module) -> Any:
    return zip(teacher.parameters(), student.parameters(), strict=True)


@torch.no_grad()
def lerped(teacher: nn.Module, student: nn.Module) -> None:
    for old, new in pairs(teacher, student):
        old.lerp_(new, 0.1)


@torch.no_grad()
def replaced(teacher: nn.Module, student: nn.Module) -> None:
    for old, new in pairs(teacher, student):
        old.data = old.data * 0.9 + new.data * 0.1


def multiplied_and_added(teacher: nn.Module, student: nn.Module) -> None:
    for old, new in pairs(teacher, student):
        old.data.mul_(0.9).add_(new.data, alpha=0.1)


@torch.no_grad()
def at_once(teacher: nn.Module, student: nn.Module) -> None:
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.1)


@torch.no_grad()
def as_a_vector(teacher: nn.Module, student: nn.Module) -> None:
    old, new = (parameters_to_vector(each.parameters()) for each in (teacher, student))
    vector_to_parameters(0.9 * old + 0.1 * new, teacher.parameters())


def by_name(teacher: nn.Module, student: nn.Module) -> None:
    new = student.state_dict()
    for name, old in teacher.state_dict().items():
        old.copy_(0.9 * old + 0.1 * new[name])


def loaded(teacher: nn.Module, student: nn.Module) -> None:
    teacher.load_state_dict(student.state_dict())


@torch.no_grad()
def copied(teacher: nn.Module, student: nn.Module) -> None:
    for old, new in pairs(teacher, student):
        old.copy_(new)


@torch.no_grad()
def quietly(teacher: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return teacher(x)


def detached(teacher: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return teacher(x).detach()


def recorded(teacher: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return teacher(x)


def given() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 4)


def students(session: Session) -> set[str]:
    return {source.status for name, source in session.sources.items() if name.startswith("student")}


def gradients(model: Distilled) -> list[torch.Tensor | None]:
    model(given()).backward()
    return [parameter.grad for parameter in model.student.parameters()]


def as_a_constant(model: Distilled) -> list[torch.Tensor | None]:
    """Ask torch for the gradients where the teacher's weights and what it says are numbers that stand there."""
    model.update(model.teacher, model.student)
    target = model.teacher(given()).detach() + 0.1
    functional.mse_loss(model.student(given()), target).backward()
    return [parameter.grad for parameter in model.student.parameters()]


AVERAGES = (lerped, replaced, multiplied_and_added, at_once, by_name)


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize(("update", "target"), [
    *((update, target) for update in (*AVERAGES, loaded, copied, as_a_vector) for target in (quietly, detached)),
    *((update, recorded) for update in AVERAGES),
])  # fmt: skip
def test_a_student_misses_nothing_by_what_its_teacher_learns_of_it(update: Update, target: Any, mode: str) -> None:
    torch.testing.assert_close(gradients(Distilled(update, target)), as_a_constant(Distilled(update, target)))
    session = gradscope.trace(Distilled(update, target), given(), mode=mode)
    assert (session.verdict, students(session)) == ("flows", {"flows"})
    assert all(each.severity == "note" for each in session.findings)


@pytest.mark.parametrize("mode", ["real", "auto"])
def test_nor_by_a_copy_of_it_or_an_average_of_torch(mode: str) -> None:
    class Copied(Distilled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.mse_loss(self.student(x), quietly(copy.deepcopy(self.student), x) + 0.1)

    class Averaged(Distilled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.teacher.update_parameters(self.student)
            return functional.mse_loss(self.student(x), quietly(self.teacher, x) + 0.1)

    averaged = Averaged(lerped, quietly)
    averaged.teacher = AveragedModel(averaged.student, multi_avg_fn=get_ema_multi_avg_fn(0.9)).requires_grad_(False)
    for model in (Copied(lerped, quietly), averaged):
        session = gradscope.trace(model, given(), mode=mode)
        assert (session.verdict, students(session)) == ("flows", {"flows"})


class Only(Distilled):
    """Nothing but what the teacher says is given out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.update(self.teacher, self.student)
        return self.target(self.teacher, x) + x.sum()


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("target", [quietly, recorded])
@pytest.mark.parametrize("update", [lerped, copied, loaded])
def test_one_whose_only_way_leads_through_its_teacher_is_blocked(update: Update, target: Any, mode: str) -> None:
    x = given().requires_grad_()
    model = Only(update, target)
    model(x).sum().backward()
    assert all(parameter.grad is None for parameter in model.student.parameters())
    session = gradscope.trace(Only(update, target), x, mode=mode)
    assert (session.verdict, students(session)) == ("blocked", {"blocked"})


@pytest.mark.parametrize("mode", ["real", "auto"])
def test_weights_that_are_only_copied_and_trained_on_miss_a_part(mode: str) -> None:
    """Tied by copying: what the second layer would learn does not come back to the first."""

    def tie(teacher: nn.Module, student: nn.Module) -> None:
        for old, new in pairs(teacher, student):
            old.data.copy_(new.data)

    model = Distilled(tie, recorded)
    model.teacher.requires_grad_()
    session = gradscope.trace(model, given(), mode=mode)
    assert (session.verdict, students(session)) == ("partial", {"partial"})


@pytest.mark.parametrize("mode", ["real", "auto"])
def test_so_do_those_whose_norm_is_kept(mode: str) -> None:
    class Scaled(Distilled):
        def __init__(self) -> None:
            super().__init__(lerped, quietly)
            self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.scale.data.copy_(self.student[0].weight.data.norm())
            found: torch.Tensor = self.student(x) / self.scale.detach()
            return found

    session = gradscope.trace(Scaled(), given(), mode=mode)
    assert session.sources["student.0.weight"].status == session.verdict == "partial"


@pytest.mark.parametrize("mode", ["real", "auto"])
def test_what_a_network_says_of_itself_misses_a_part(mode: str) -> None:
    class Itself(Distilled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.mse_loss(self.student(x), quietly(self.student, x) + 0.1)

    session = gradscope.trace(Itself(lerped, quietly), given(), mode=mode)
    assert (session.verdict, students(session)) == ("partial", {"partial"})


@pytest.mark.parametrize("mode", ["real", "auto"])
def test_nor_by_weights_that_are_kept_and_used_as_numbers_only(mode: str) -> None:
    class Reference(Distilled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = {name: 0.9 * each.detach().clone() for name, each in self.student.named_parameters()}
            said = self.student(x)
            with torch.no_grad():
                reference = torch.func.functional_call(self.student, kept, (x,))
            return functional.mse_loss(said, reference)

    class Used(Distilled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = {name: 0.9 * each.detach().clone() for name, each in self.student.named_parameters()}
            return functional.mse_loss(self.student(x), torch.func.functional_call(self.student, kept, (x,)))

    statuses = [students(gradscope.trace(kind(lerped, quietly), given(), mode=mode)) for kind in (Reference, Used)]
    assert statuses == [{"flows"}, {"partial"}]


def norm_by_detach(weight: torch.Tensor) -> torch.Tensor:
    kept = weight.detach()
    with torch.no_grad():
        return (kept * torch.ones(4, 4)).norm()


def norm_of_a_copy(weight: torch.Tensor) -> torch.Tensor:
    kept = copy.deepcopy(weight)
    with torch.no_grad():
        return kept.norm()


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("norm", [norm_by_detach, norm_of_a_copy])
def test_a_norm_of_kept_weights_misses_a_part(norm: Callable[[torch.Tensor], torch.Tensor], mode: str) -> None:
    class Normalised(nn.Module):
        def __init__(self, of: Callable[[torch.Tensor], torch.Tensor]) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.of = nn.Linear(4, 4), of

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.layer(x) / self.of(self.layer.weight)
            return found

    models = Normalised(norm), Normalised(torch.norm)
    for model in models:
        model(given()).sum().backward()
    assert not torch.allclose(models[0].layer.weight.grad, models[1].layer.weight.grad)  # type: ignore[arg-type]
    session = gradscope.trace(Normalised(norm), given(), mode=mode)
    assert (session.verdict, session.sources["layer.weight"].status) == ("partial", "partial")


# --- a step that trains one network of several ------------------------------------------------------------------


def critics_step(*, held: bool = False) -> Callable[[], None]:
    """Return a step that learns towards what a target network says, and towards the entropy of a temperature."""
    torch.manual_seed(0)
    critic, target = network(), network()  # of which nobody takes the flags away
    temperature = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([*critic.parameters(), temperature, *(target.parameters() if held else ())])

    def step() -> None:
        with torch.no_grad():
            wanted = 1 + 0.9 * target(given()).amax(-1)
        loss = functional.smooth_l1_loss(critic(given())[:, 0], wanted) - temperature.exp()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("held", [False, True])
def test_a_step_is_asked_about_what_its_optimizer_holds(held: bool) -> None:
    session = gradscope.trace(critics_step(held=held))
    statuses = {name.partition(".")[0]: source.status for name, source in session.sources.items()}
    assert (statuses["critic"], statuses["target"]) == ("flows", "blocked")
    assert session.verdict == ("blocked" if held else "flows")
    assert [(each.rule, each.severity) for each in session.findings] == [("GS104", "error" if held else "note")]
    said = "No optimizer that steps here holds target.0 (2), target.2 (2): no gradient is wanted there."
    assert (said in session.remarks) == (not held)
    asked = gradscope.trace(critics_step(held=held), wrt="target.*")
    assert asked.verdict == "blocked"
