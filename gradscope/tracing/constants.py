"""The tensors that a model and a loss hold besides what may be trained: a run may change them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from gradscope.tracing.provenance import KINDS, tensors_in
from gradscope.tracing.restoring import OWN, attributes_of, tensors_of


def constants_of(model: nn.Module) -> Iterator[tuple[torch.Tensor, str]]:
    """Yield the tensors that a model holds besides: buffers and integers (no name), and attributes by name."""
    for each in tensors_of(model):
        yield each, ""
    for attributes in attributes_of(model):
        for name, value in attributes.items():
            if name not in OWN and KINDS[type(value)] and not name.startswith("_"):
                for tensor in tensors_in([value]):
                    yield tensor, name


def constants_of_loss(loss: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors that a loss holds; none of them is a source."""
    yield from tensors_of(loss, ("_parameters",))
    yield from (constant for constant, _ in constants_of(loss))


def kept_with_history(model: nn.Module) -> set[str]:
    """Return the names of the attributes that hold a tensor with a graph behind it."""
    return {name for tensor, name in constants_of(model) if name and tensor.grad_fn is not None}
