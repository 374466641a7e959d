"""Weights that a model uses and does not register: in a plain list or dict, or computed when the model was built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gradscope.tracing.autograd import reached_leaves
from gradscope.tracing.holding import Holder
from gradscope.tracing.inventory import OWN

# A dict of lists of layers.
DEEPEST = 3


def unregistered(model: nn.Module) -> dict[int, tuple[str, torch.Tensor]]:
    """Return what could be trained and ``model.parameters()`` does not give: by ``id``, its name and what is kept.

    Of a tensor that was computed it is what it was computed from, by the name of the tensor.
    """
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for prefix, module in model.named_modules():
        for name, value in (module.tensors if isinstance(module, Holder) else vars(module)).items():
            if name not in OWN:
                for path, tensor in _trainable(value, f"{prefix}.{name}".lstrip("."), 0):
                    for leaf in reached_leaves([tensor]):
                        found.setdefault(id(leaf), (path, tensor))
    for parameter in model.parameters():
        found.pop(id(parameter), None)
    return found


def _trainable(value: Any, path: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.requires_grad:
            yield path, value
    elif isinstance(value, nn.Module):
        yield from ((f"{path}.{name}", parameter) for name, parameter in value.named_parameters())
    elif depth < DEEPEST and isinstance(value, (list, tuple, dict)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from _trainable(item, f"{path}.{name}", depth + 1)
