"""Leave no trace: random states, grad mode, and everything of a borrowed model, put back however the run ends."""

from __future__ import annotations

import gc
import itertools
import logging
import operator
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from gradscope.tracing.holding import Holder
from gradscope.tracing.provenance import tensors_in

TABLES = ("_parameters", "_buffers", "_modules")
# What every module has of itself; the rest are attributes of its class.
OWN = frozenset(vars(nn.Module()))
CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, tuple, set, deque})
PLAIN = frozenset({str, int, float, bool, type(None)})
# The containers among them: parameters, buffers, children, and hooks of every kind.
OWN_TABLES = tuple(name for name, value in vars(nn.Module()).items() if type(value) in CONTAINERS)
IMMUTABLE = (str, int, float, type(None), bytes, torch.Tensor, nn.Module, type, ModuleType, FunctionType)
# So many objects more than were freed, before Python looks for cycles among them (700 by default).
RARELY = 50_000
# An argument may be an object that holds the caches of several objects (a video session).
DEEPEST = 6


@contextmanager
def untouched_state() -> Iterator[None]:
    """Put grad mode and the random states of torch, Python and numpy back, however the block ends."""
    grad = torch.is_grad_enabled()
    with ExitStack() as stack:
        stack.callback(torch.set_grad_enabled, grad)
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            stack.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        else:  # not to be done for the sake of a state that nothing has drawn from: it takes a second, and memory
            stack.callback(_seed_cuda_as_new, torch.initial_seed())
        stack.callback(random.setstate, random.getstate())
        if "numpy" in sys.modules:
            numpy_random = sys.modules["numpy"].random
            stack.callback(numpy_random.set_state, numpy_random.get_state())
        stack.enter_context(torch.inference_mode(False))
        yield


def _seed_cuda_as_new(seed: int) -> None:
    """Give the GPUs, if the run was the first to use one, the random states that they would begin with."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


@contextmanager
def unhurried_collector() -> Iterator[None]:
    """Let Python look for cycles less often: a recording keeps thousands of small objects and makes none."""
    before = gc.get_threshold()
    raised = (max(before[0], RARELY), *before[1:])
    if before[0]:  # 0: it was turned off
        gc.set_threshold(*raised)
    try:
        yield
    finally:
        if gc.get_threshold() == raised:
            gc.set_threshold(*before)


@contextmanager
def hushed(name: str) -> Iterator[None]:
    """Keep a logger from telling what the report says in its own words."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def kept(model: nn.Module, given: tuple[Any, ...] = ()) -> Iterator[Callable[[torch.Tensor], None]]:
    """Keep a model and what it is given as they are; yield what to call before a tensor of theirs changes in place.

    It is copied only then, so that a run costs no second copy of the weights.
    Scripted modules change theirs unseen: their buffers are copied beforehand.
    """
    modules = modules_of(model)
    held = [each for module in modules if isinstance(module, Holder) for each in module.objects]
    own = [module.__dict__ for module in modules]
    tables = [table for attributes in own for name in OWN_TABLES
              if type(table := attributes.get(name)) in CONTAINERS]  # fmt: skip
    parts = _parts_of(own)
    owners = _owners([*tensors_of(model), *loose_tensors(model), *tensors_in(given)])
    copies: dict[int, list[_Before]] = {}

    def before_write(tensor: torch.Tensor) -> None:
        key = _memory(tensor)
        if key in owners and key not in copies:
            copies[key] = [_Before(owner) for owner in owners[key]]

    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            for buffer in module.buffers():
                before_write(buffer)
    try:
        with (put_back(own, deepest=1), _with_contents(tables), put_back(parts, deepest=2), put_back(held),
              _without_gradients(list(tensors_of(model, ("_parameters",))))):  # fmt: skip
            _wait_for_no_rank(modules)
            yield before_write
    finally:
        for before in itertools.chain.from_iterable(copies.values()):
            before.put_back()


def _owners(tensors: Iterable[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
    """Return the tensors of a model, each once, by the memory that they lie in."""
    found: dict[int, list[torch.Tensor]] = {}
    for tensor in {id(each): each for each in tensors}.values():
        found.setdefault(_memory(tensor), []).append(tensor)
    return found


class _Before:
    """A tensor as it was before it was changed in place: its numbers, its memory, and that it had no history."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._data = tensor.detach()
        self._numbers = _each_once(self._data).clone()
        self._had_history = tensor.grad_fn is not None

    def put_back(self) -> None:
        tensor = self._tensor
        if tensor.grad_fn is not None and not self._had_history and not tensor._is_view():
            tensor.detach_()  # a buffer that something with a gradient was added to
        if _memory(tensor) != _memory(self._data) or tensor.dtype != self._data.dtype:
            tensor.data = self._data
        _each_once(tensor.data).copy_(self._numbers)  # .data: the version counter stays as it was


def _each_once(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view that shows no element twice, as an expanded tensor does, which cannot be written into."""
    if tensor.layout == torch.strided and not tensor.is_nested:
        for dim, stride in enumerate(tensor.stride()):
            tensor = tensor.narrow(dim, 0, 1) if stride == 0 and tensor.shape[dim] > 1 else tensor
    return tensor


@contextmanager
def _without_gradients(parameters: list[torch.Tensor]) -> Iterator[None]:
    """Put ``.grad`` aside: a forward pass may go backward itself, and adds to what is there."""
    before = [parameter.grad for parameter in parameters]
    _set_gradients(parameters, [None] * len(parameters))
    try:
        yield
    finally:
        _set_gradients(parameters, before)


def _set_gradients(parameters: list[torch.Tensor], gradients: Iterable[torch.Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is not gradient:
            parameter.grad = gradient


def _wait_for_no_rank(modules: list[nn.Module]) -> None:
    """Let a distributed model run by itself, as under its ``no_sync``: other ranks may not be traced at this time."""
    for module in modules:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module.require_backward_grad_sync = module.require_forward_param_sync = False


@contextmanager
def swapped(
    model: nn.Module, replace: Callable[[torch.Tensor], torch.Tensor], given: tuple[Any, ...] = ()
) -> Iterator[Callable[[torch.Tensor], None]]:
    """Put other tensors in the place of a model's parameters and buffers for a while; ties are kept.

    What ``replace`` gives back as it is stays the model's own; see :func:`kept` for what is yielded.
    """
    made: dict[int, torch.Tensor] = {}
    with kept(model, given) as before_write:
        for module in model.modules():
            for table in _tables(module)[:2]:
                for name, tensor in table.items():
                    if tensor is not None:
                        if id(tensor) not in made:
                            made[id(tensor)] = replace(tensor)
                        table[name] = made[id(tensor)]
        yield before_write


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return what ``model.modules()`` yields, in a third of the time."""
    found: dict[int, nn.Module] = {}
    pending: list[nn.Module | None] = [model]
    while pending:
        module = pending.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            pending.extend(list(module._modules.values())[::-1])
    return list(found.values())


def tensors_of(model: nn.Module, kinds: tuple[str, ...] = ("_parameters", "_buffers")) -> Iterator[torch.Tensor]:
    """Yield the parameters of a model and all inside it, then the buffers; one that is shared more than once."""
    modules = modules_of(model)
    for kind in kinds:
        for module in modules:
            for tensor in getattr(module, kind).values():
                if tensor is not None:
                    yield tensor


def attributes_of(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield the attributes of all modules, and of the plain objects around them where the model stands for such."""
    for module in modules_of(model):
        yield module.__dict__
        if isinstance(module, Holder):
            yield from (vars(each) for each in module.objects)


def _parts_of(owners: Iterable[dict[str, Any]]) -> list[Any]:
    """Return what may change among the attributes that are not every module's."""
    return [part for attributes in owners for name, part in attributes.items()
            if name not in OWN and type(part) not in PLAIN]  # fmt: skip


def loose_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Return the tensors that a model keeps in plain attributes and the objects there: a metric's state, a memory."""
    parts = _parts_of(attributes_of(model))
    objects = [vars(part) for part in parts if hasattr(part, "__dict__") and not isinstance(part, IMMUTABLE)]
    return tensors_in([*parts, *objects])


def _tables(module: nn.Module) -> list[dict[str, Any]]:
    """Return the dicts that hold a module's parameters, buffers and children (a scripted one has none of its own)."""
    found = [module.__dict__.get(name) for name in TABLES]
    return [table for table in found if isinstance(table, dict)] if len(found) == len(TABLES) else []


@contextmanager
def put_back(values: Iterable[Any], deepest: int = DEEPEST) -> Iterator[None]:
    """Give containers, and the attributes of plain objects, their contents back when the block ends.

    What they hold is looked through ``deepest`` levels down: a caller's cache must not keep what a run put in.
    """
    with _with_contents(_mutable_parts(values, deepest)):
        yield


@contextmanager
def _with_contents(parts: Iterable[Any]) -> Iterator[None]:
    """Give these containers their contents back when the block ends."""
    before = [(part, part.copy() if part else ()) for part in parts]
    try:
        yield
    finally:
        for part, kept_part in before:
            if part or kept_part:
                _restore(part, kept_part)


class _Lasting(dict[type, bool]):
    """Whether values of a class hold nothing that a run could change; looked up for everything that a model holds."""

    def __missing__(self, cls: type) -> bool:
        lasting = self[cls] = issubclass(cls, IMMUTABLE)
        return lasting


def _mutable_parts(values: Iterable[Any], deepest: int) -> Iterator[Any]:
    """Yield dicts, lists and sets, each once."""
    seen: set[int] = set()
    lasting = _Lasting()
    pending = deque((value, 1) for value in values)
    while pending:
        value, depth = pending.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        part: Any = value if type(value) in CONTAINERS else getattr(value, "__dict__", None)
        if type(part) not in CONTAINERS:
            continue
        if type(part) is not tuple:
            yield part
        if part and depth < deepest:
            items = part.values() if isinstance(part, dict) else part
            pending.extend([(item, depth + 1) for item in items if not lasting[type(item)]])


def _restore(part: Any, before: Any) -> None:
    same = len(part) == len(before) and all(map(operator.is_, part, before))
    if same and isinstance(before, dict):
        same = all(map(operator.is_, part.values(), before.values()))
    if not same:
        part.clear()
        (part.extend if isinstance(part, (list, deque)) else part.update)(before)


def _memory(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)
