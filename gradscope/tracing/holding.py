"""Targets that are no modules: a pipeline, a predictor, a bound method, a function; their modules are found in them."""

from __future__ import annotations

import dis
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from gradscope.errors import UsageError

# A pipeline holds its networks itself, a function may hold the predictor that holds the model.
DEEPEST = 3
# What a run may add to: a list of losses, a dict of activations.
CHANGING = (list, dict, set, deque)


class Holder(nn.Module):
    """Stands for something that calls modules without being one.

    Its children are the modules found there, under the names they have there. ``tensors`` are those found beside them,
    by name, ``objects`` the plain objects on the way, ``containers`` the lists, dicts and sets, ``functions`` those
    whose variables were looked into: what a run leaves in them is put back.
    """

    def __init__(self, call: Callable[..., Any], name: str, entry: str) -> None:
        super().__init__()
        self.name = name
        self.entry = entry
        self.call = call
        self.tensors: dict[str, torch.Tensor] = {}
        self.objects: list[Any] = []
        self.containers: list[Any] = []
        self.functions: list[FunctionType] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Make the call that the holder stands for."""
        return self.call(*args, **kwargs)


def held_model(target: Any, entry: str | None) -> tuple[nn.Module, str | None]:
    """Return the module that stands for a target, and the method of it to enter.

    A module is itself, its bound method is it entered there; of all else a :class:`Holder` is made.

    Raises:
        UsageError: it is not callable, or no module is found in it.
    """
    if isinstance(target, nn.Module):
        return target, entry
    owner = getattr(target, "__self__", None)
    if isinstance(target, MethodType) and isinstance(owner, nn.Module) and entry is None:
        return owner, target.__name__
    call = target if entry is None else getattr(target, entry, None)
    if not callable(call):
        asked = f"has no method {entry!r}" if entry is not None else "is neither a module nor callable"
        raise UsageError(f"This {type(target).__name__} {asked}.", hint="Say which method to call: entry='name'.")
    name, _, method = _name_of(target).rpartition(".") if isinstance(target, MethodType) else ("", "", "")
    holder = Holder(call, name or _name_of(target), entry or (method if name else "__call__"))
    _fill(holder, target)
    if next(holder.children(), None) is None:
        raise UsageError(
            f"A trace needs an nn.Module, or something that holds one, and {holder.name} holds none.",
            hint="Give the module itself, or an object or function in whose attributes or variables it is.",
        )
    return holder, None


def holder_of_loss(loss: Callable[[Any], Any] | None) -> nn.Module | None:
    """Return what holds what a loss uses: a target tensor, a metric, a memory, a network of its own."""
    if loss is None or isinstance(loss, nn.Module):
        return loss
    holder = Holder(loss, _name_of(loss), "__call__")
    _fill(holder, loss)
    return holder


def _name_of(target: Any) -> str:
    return str(getattr(target, "__qualname__", type(target).__name__)).replace("<locals>.", "")


def _fill(holder: Holder, target: Any) -> None:
    """Look for modules, nearest first, so that each gets the shortest name it has."""
    seen: set[int] = set()
    pending: deque[tuple[tuple[str, ...], Any]] = deque([((), target)])
    while pending:
        path, value = pending.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            _place(holder, path, value)
        elif isinstance(value, torch.Tensor):
            holder.tensors[".".join(path).lstrip("_")] = value  # what is private of a module has no name
        elif len(path) <= DEEPEST:
            if hasattr(value, "__dict__") and not callable(getattr(value, "__get__", None)):
                holder.objects.append(value)
            elif isinstance(value, FunctionType):
                holder.functions.append(value)
            elif isinstance(value, CHANGING):
                holder.containers.append(value)
            pending.extend(((*path, name), item) for name, item in _inside(value))


def _place(holder: nn.Module, path: tuple[str, ...], module: nn.Module) -> None:
    for name in path[:-1]:
        if name not in holder._modules:
            holder.add_module(name, nn.Module())
        holder = holder.get_submodule(name)
    name = path[-1]
    while hasattr(holder, name):  # what nn.Module has itself, such as ``half``
        name += "_"
    holder.add_module(name, module)


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a value holds, by name: attributes, items, a function's variables."""
    if isinstance(value, functools.partial):
        value = [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        yield "self", value.__self__
    elif isinstance(value, FunctionType):
        yield from _variables(value).items()
    elif isinstance(value, (list, tuple)):
        yield from ((str(index), item) for index, item in enumerate(value))
    elif isinstance(value, dict):
        yield from ((str(name).replace(".", "_"), item) for name, item in value.items())
    elif not isinstance(value, (type, ModuleType, str, bytes)):
        yield from list(getattr(value, "__dict__", {}).items())


def goes_backward(target: Any) -> bool:
    """Tell a function that makes a step of training: it calls ``backward()``, or steps with a closure that does.

    One that defines a ``backward`` (of a custom function), or a function that calls one, may build a model.
    """
    if not isinstance(target, FunctionType):
        return False
    own, *inner = _codes(target)
    return _asks_for(own, "backward") or (_asks_for(own, "step") and any(_asks_for(each, "backward") for each in inner))


def _asks_for(code: CodeType, name: str) -> bool:
    """Tell whether code reads an attribute of this name."""
    reads = (each for each in dis.get_instructions(code) if each.opname in ("LOAD_ATTR", "LOAD_METHOD"))
    return name in code.co_names and any(each.argval == name for each in reads)


def _variables(function: FunctionType) -> dict[str, Any]:
    """Return the variables from outside that a function uses, or a function inside it does (a closure for LBFGS)."""
    known = function.__globals__
    names = dict.fromkeys(name for code in _codes(function) for name in code.co_names if name in known)
    return {**{name: known[name] for name in names}, **inspect.getclosurevars(function).nonlocals}


@contextmanager
def variables_kept(functions: list[FunctionType]) -> Iterator[None]:
    """Give the variables from outside that these functions assign (a counter, an average) their values back."""
    cells = list({id(cell): cell for each in functions for cell in each.__closure__ or ()}.values())
    before = [(cell, cell.cell_contents) for cell in cells if _is_set(cell)]
    names = [(each.__globals__, name) for each in functions for name in _assigned(each) if name in each.__globals__]
    globally = [(known, name, known[name]) for known, name in names]
    try:
        yield
    finally:
        for cell, value in before:
            cell.cell_contents = value
        for known, name, value in globally:
            known[name] = value


def _is_set(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a variable that is assigned later
        return False
    return True


def _assigned(function: FunctionType) -> set[str]:
    """Return the global variables that a function, or one inside it, assigns."""
    steps = (each for code in _codes(function) for each in dis.get_instructions(code))
    return {str(each.argval) for each in steps if each.opname == "STORE_GLOBAL"}


def _codes(function: FunctionType) -> list[CodeType]:
    """Return the code of a function and of all functions inside it."""
    codes = [function.__code__]
    for code in codes:  # grows meanwhile
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
    return codes
