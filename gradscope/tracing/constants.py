"""The tensors that a model and a loss hold besides what may be trained: a run may change them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from gradscope.tracing.contents import KINDS, tensors_in
from gradscope.tracing.inventory import Inventory


def constants_of(model: Inventory) -> Iterator[tuple[torch.Tensor, str]]:
    """Yield the tensors that a model holds besides: buffers and integers (no name), and attributes by name."""
    for each in model.tensors():
        yield each, ""
    yield from _attributes(model)


def constants_of_loss(loss: nn.Module) -> Iterator[tuple[torch.Tensor, str]]:
    """Yield the tensors that a loss holds, without names; none of them is a source."""
    yield from ((constant, "") for constant, _ in constants_of(Inventory(loss)))


def kept_with_history(model: nn.Module) -> set[str]:
    """Return the names of the attributes that hold a tensor with a graph behind it."""
    return {name for tensor, name in _attributes(Inventory(model)) if tensor.grad_fn is not None}


def _attributes(model: Inventory) -> Iterator[tuple[torch.Tensor, str]]:
    for name, value in model.parts:
        if KINDS[type(value)] and not name.startswith("_"):
            for tensor in tensors_in([value]):
                yield tensor, name
