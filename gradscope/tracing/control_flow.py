"""Run the control flow of torch (``cond``, ``while_loop``, ``scan``, ``map``) as the Python that it stands for.

Torch compiles what these are given even where nothing else is compiled, and finds in that way which parameters a branch
uses. A recorder cannot be compiled along; without that, a branch loses the gradients of its parameters. Run as Python,
each call in a branch is recorded like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_leaves, tree_map


def meaning_of(func: Any) -> Callable[..., Any] | None:
    """Return what a higher-order operator does, as a function of its arguments; None for all but these.

    None as well where this torch has no derivative of it: its exception is what the user gets.
    """
    if not isinstance(func, HigherOrderOperator):
        return None
    derivative = func.py_kernels.get(DispatchKey.Autograd)
    is_missing = "not_implemented" in getattr(derivative, "__qualname__", "not_implemented")
    return None if is_missing else _MEANINGS.get(func._name)


def _cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Sequence[Any]) -> Any:
    return true_fn(*operands) if pred else false_fn(*operands)


def _while_loop(
    cond_fn: Callable[..., Any], body_fn: Callable[..., Any], carried: Sequence[Any], additional: Sequence[Any]
) -> Any:
    while cond_fn(*carried, *additional):
        carried = body_fn(*carried, *additional)
    return tuple(carried)


def _map(function: Callable[..., Any], xs: Sequence[torch.Tensor], others: Sequence[Any], **_: Any) -> Any:
    rows = [function(*row, *others) for row in zip(*xs, strict=True)]
    return tree_map(lambda *leaves: torch.stack(leaves), rows[0], *rows[1:])


def _scan(
    step: Callable[..., Any], init: Sequence[Any], xs: Sequence[torch.Tensor], others: Sequence[Any], **_: Any
) -> Any:
    carry: Any = tuple(init)
    rows = []
    for row in zip(*xs, strict=True):
        carry, out = step(*tree_leaves(carry), *row, *others)
        rows.append(out)
    return carry, tree_map(lambda *leaves: torch.stack(leaves), rows[0], *rows[1:])


_MEANINGS: dict[str, Callable[..., Any]] = {"cond": _cond, "while_loop": _while_loop, "map_impl": _map, "scan": _scan}
