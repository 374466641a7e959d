"""Leave no trace: random states, grad mode, and everything of a borrowed model, put back however the run ends."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def untouched_state() -> Iterator[None]:
    """Put grad mode and the random states of torch, Python and numpy back, however the block ends."""
    grad = torch.is_grad_enabled()
    with ExitStack() as stack:
        stack.callback(torch.set_grad_enabled, grad)
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        if torch.cuda.is_available():
            stack.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        stack.callback(random.setstate, random.getstate())
        if "numpy" in sys.modules:
            numpy_random = sys.modules["numpy"].random
            stack.callback(numpy_random.set_state, numpy_random.get_state())
        stack.enter_context(torch.inference_mode(False))
        yield


@contextmanager
def kept(model: nn.Module) -> Iterator[Callable[[torch.Tensor], None]]:
    """Keep a model as it is; yield what to call before one of its tensors is changed in place.

    A tensor is copied only when it is about to change, so that a run costs no second copy of the weights.
    Scripted modules change theirs unseen: their buffers are copied beforehand.
    """
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    containers = [pair for module in model.modules() for value in module.__dict__.values() for pair in _copied(value)]
    tables = [(table, dict(table)) for module in model.modules() for table in _tables(module)]
    tensors = [*model.parameters(), *model.buffers()]
    owners = {_memory(tensor): tensor for tensor in tensors}
    copies: dict[int, torch.Tensor] = {}

    def before_write(tensor: torch.Tensor) -> None:
        key = _memory(tensor)
        if key in owners and key not in copies:
            copies[key] = owners[key].detach().clone()

    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            for buffer in module.buffers():
                before_write(buffer)
    try:
        yield before_write
    finally:
        for table, before in (*tables, *((module.__dict__, before) for module, before in attributes)):
            _restore(table, before)
        for container, before in containers:
            _refill(container, before)
        for key, values in copies.items():
            owners[key].data.copy_(values)  # .data: the version counter stays as it was


@contextmanager
def swapped(
    model: nn.Module, replace: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[Callable[[torch.Tensor], None]]:
    """Put other tensors in the place of a model's parameters and buffers for a while; ties are kept.

    What ``replace`` gives back as it is stays the model's own; see :func:`kept` for what is yielded.
    """
    made: dict[int, torch.Tensor] = {}
    with kept(model) as before_write:
        for module in model.modules():
            for table in _tables(module)[:2]:
                for name, tensor in table.items():
                    if tensor is not None:
                        if id(tensor) not in made:
                            made[id(tensor)] = replace(tensor)
                        table[name] = made[id(tensor)]
        yield before_write


def _tables(module: nn.Module) -> list[dict[str, Any]]:
    """Return the dicts that hold a module's parameters, buffers and children (a scripted one has none of its own)."""
    found = [module.__dict__.get(name) for name in TABLES]
    return [table for table in found if isinstance(table, dict)] if len(found) == len(TABLES) else []


def _restore(table: dict[str, Any], before: dict[str, Any]) -> None:
    if list(table) != list(before) or any(table[name] is not value for name, value in before.items()):
        table.clear()
        table.update(before)


# A cache lies rarely deeper in what a module holds.
DEEPEST = 4


def _copied(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Yield the containers in a plain attribute (caches, lists of outputs) with copies of what they hold."""
    if type(value) not in (dict, OrderedDict, defaultdict, list, set, deque) or depth == DEEPEST:
        return
    yield value, copy.copy(value)
    for item in value.values() if isinstance(value, dict) else value:
        yield from _copied(item, depth + 1)


def _refill(container: Any, before: Any) -> None:
    """Give a container back what it held; one that holds it still is not touched."""
    if len(container) == len(before):
        pairs = zip(_items(container), _items(before), strict=True)
        if all(now is then for now, then in pairs):
            return
    container.clear()
    container.extend(before) if isinstance(container, (list, deque)) else container.update(before)


def _items(container: Any) -> Iterator[Any]:
    return iter([*container, *container.values()]) if isinstance(container, dict) else iter(container)


def _memory(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)
