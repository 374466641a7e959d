"""Walk the autograd graph from the outputs to the leaves: which ones does a gradient reach?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def reached_leaves(sinks: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors whose ``AccumulateGrad`` nodes lie behind the sinks.

    Asks ``grad_fn.next_functions`` and never ``requires_grad``. The nodes are kept alive while
    walking, since their Python wrappers are made anew on every access and ``id`` would repeat.
    """
    leaves: dict[int, torch.Tensor] = {}
    pending: list[Any] = []
    for sink in sinks:
        if sink.grad_fn is not None:
            pending.append(sink.grad_fn)
        elif sink.requires_grad and sink.is_leaf:
            leaves[id(sink)] = sink
    seen: set[Any] = set(pending)
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return list(leaves.values())
