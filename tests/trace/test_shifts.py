"""A shift that is detached and cancels out costs nothing; one that does not cancel is a cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from two import Between, arriving, traced

Cut = Callable[[torch.Tensor], torch.Tensor]
Shifted = Callable[[torch.Tensor, Cut], torch.Tensor]


def largest(x: torch.Tensor) -> torch.Tensor:
    return x.amax(-1, keepdim=True)


def total(x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1, keepdim=True)


# --- whole -----------------------------------------------------------------------------------------------------


def off_by_one(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    m = cut(largest(x))
    weights = (x - m).exp()
    return weights / ((-m).exp() + total(weights))


def off_by_one_each_by_itself(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    m = largest(x)
    return (x - cut(m)).exp() / (torch.exp(0 - cut(m)) + total((x - cut(m)).exp()))


def off_by_one_from_zero_on(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    m = cut(largest(x).clamp(min=0))
    weights = (x - m).exp()
    return weights / (total(weights) + torch.exp(-m))


def with_a_sink(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    sink = x.new_full((3, 1), 0.5)
    m = cut(torch.maximum(largest(x), sink))
    weights = (x - m).exp()
    return weights / (total(weights) + (sink - m).exp())


def detached_twice(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    m = largest(x)
    return (x - cut(m)).exp() / total((x - cut(m)).exp())


def computed_twice(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    return (x - cut(largest(x))).exp() / total((x - largest(cut(x))).exp())


def put_back_from_anew(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    m = largest(x)
    return x - (total((x - cut(m)).exp()).log() + cut(m))


def shifted_on_both_sides(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    m = largest(x)
    return (x - cut(m)) - total((x - cut(m)).exp()).log()


def multiplied_by_the_reciprocal(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = (x - cut(largest(x))).exp()
    return weights * (1 / total(weights))


def cooled(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = ((x - cut(largest(x))) / 0.5).exp()
    return weights / total(weights)


def cooled_twice(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    m = largest(x)
    return (0.5 * (x - cut(m))).exp() / total((0.5 * (x - cut(m))).exp())


def by_the_mean(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = (x - cut(x.mean(-1, keepdim=True))).exp()
    return weights / total(weights)


def in_two_blocks(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    """As attention does it that sees its keys block by block."""
    left, right = x[:, :2], x[:, 2:]
    first = cut(largest(left))
    both = cut(torch.maximum(first, largest(right)))
    norm = total((left - first).exp()) * (first - both).exp() + total((right - both).exp())
    return (x - both).exp() / norm


def two_of_the_same_size(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    other = x.flip(0)
    m = cut(torch.maximum(x, other))
    return m + ((x - m).exp() + (other - m).exp()).log()


def kept_from_zero(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = (x - cut(largest(x))).exp()
    return weights / (total(weights) + 1e-8)


def by_column(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = (x - cut(x.amax(0))).exp()
    return weights / weights.sum(dim=0)


def all_at_once(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = (x - cut(x.max())).exp()
    return weights / weights.sum() + (x - cut(x.max())).log_softmax(0)


def cooled_by_row(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = ((x - cut(largest(x))) * torch.tensor([[0.5], [1.0], [2.0]])).exp()
    return (weights @ torch.eye(4)) / total(weights)


def by_the_larger_of_two(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    """As the NT-Xent loss of pytorch-metric-learning does: the positive pair against the largest negative one."""
    positive = x[:, :1]
    m = cut(torch.max(positive, torch.max(x[:, 1:], dim=1, keepdim=True)[0]))
    numerator = (positive - m).exp().squeeze(1)
    return (numerator / ((x[:, 1:] - m).exp().sum(dim=1) + numerator))[:, None] * x.new_ones(4)


# --- and not ---------------------------------------------------------------------------------------------------


def off_by_a_shifted_one(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = (x - cut(largest(x))).exp()
    return weights / (1 + total(weights))


def off_by_a_shifted_one_of_torch(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = (x - cut(largest(x))).exp()
    return weights / (total(weights) + torch.ones(1))


def logarithm_of_one_more(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    shifted = x - cut(largest(x))
    return shifted - (1 + total(shifted.exp())).log()


def by_different_shifts(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    return (x - cut(largest(x))).exp() / total((x - cut(x.amin(-1, keepdim=True))).exp())


def cut_on_one_side(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    m = largest(x)
    return (x - m).exp() / total((x - cut(m)).exp())


def squared(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = (x - cut(largest(x))).exp()
    return weights.square() / total(weights)


def weighted_once_more(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = (x - cut(largest(x))).exp()
    return weights / total(weights) * weights


def added_to_the_weights(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = (x - cut(largest(x))).exp()
    return (weights + x) / total(weights)


def cooled_on_one_side(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    shifted = x - cut(largest(x))
    return (shifted / 0.5).exp() / total((shifted / 0.7).exp())


def by_itself(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = (0.5 * x - cut(x)).exp()
    return weights / total(weights)


def chosen_by_a_mask(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    mask = torch.tensor([True, False, True, False])
    return torch.where(mask, x, cut(largest(x))).softmax(-1)


def as_a_target(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    return cut(2 * x).softmax(-1) * x.log_softmax(-1)


def largest_as_a_target(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    return cut(largest(x)).softmax(0) * x


def by_the_largest_of_each_column(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    return (x - cut(x.max(0).values)).softmax(-1)


def added_up_the_other_way(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = (x - cut(largest(x))).exp()
    return weights / weights.sum(0, keepdim=True)


def multiplied_the_other_way(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = (x - cut(x.amax(0))).exp()
    return weights / (weights @ torch.ones(4, 1))


def by_the_larger_of_two_each(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = (x - cut(torch.max(3 * x, x.flip(-1)))).exp()
    return weights / total(weights)


def cooled_by_column(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    weights = ((x - cut(largest(x))) * torch.tensor([0.5, 1.0, 1.5, 2.0])).exp()
    return weights / total(weights)


WHOLE = (
    off_by_one, off_by_one_each_by_itself, off_by_one_from_zero_on, with_a_sink, detached_twice, computed_twice,
    put_back_from_anew, shifted_on_both_sides, multiplied_by_the_reciprocal, cooled, cooled_twice, by_the_mean,
    in_two_blocks, two_of_the_same_size, kept_from_zero, by_column, all_at_once, cooled_by_row,
    by_the_larger_of_two,
)  # fmt: skip
MISSING = (
    off_by_a_shifted_one, off_by_a_shifted_one_of_torch, logarithm_of_one_more, by_different_shifts, cut_on_one_side,
    squared, weighted_once_more, added_to_the_weights, cooled_on_one_side, by_itself, chosen_by_a_mask,
    as_a_target, largest_as_a_target, by_the_largest_of_each_column, added_up_the_other_way, multiplied_the_other_way,
    cooled_by_column, by_the_larger_of_two_each,
)  # fmt: skip


def with_and_without(shifted: Shifted) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the input's gradient as it arrives, and where nothing is detached."""
    found = [arriving(lambda x, cut=cut: shifted(x, cut))["input.0"] for cut in (torch.detach, torch.clone)]
    assert found[0] is not None and found[1] is not None
    return found[0], found[1]


def detached(shifted: Shifted) -> Between:
    return lambda x: shifted(x, torch.detach)


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("shifted", WHOLE)
def test_a_shift_that_cancels_out_misses_nothing(shifted: Shifted, mode: str) -> None:
    torch.testing.assert_close(*with_and_without(shifted))
    session = traced(detached(shifted), mode)
    assert (session.verdict, session.findings) == ("flows", [])


@pytest.mark.parametrize("mode", ["real", "auto"])
@pytest.mark.parametrize("shifted", MISSING)
def test_a_shift_that_does_not_is_a_cut(shifted: Shifted, mode: str) -> None:
    assert not torch.allclose(*with_and_without(shifted), rtol=1e-2)
    session = traced(detached(shifted), mode)
    assert session.sources["first.weight"].status == session.sources["input.0"].status == "partial"
    assert {(each.rule, each.severity) for each in session.findings} == {("GS201", "warning")}
