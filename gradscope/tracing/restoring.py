"""Leave no trace: random states, grad mode, and everything of a borrowed model, put back however the run ends."""

from __future__ import annotations

import gc
import itertools
import logging
import operator
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from gradscope.tracing.contents import tensors_in
from gradscope.tracing.holding import variables_kept
from gradscope.tracing.inventory import CONTAINERS, IMMUTABLE, OWN_TABLES, Inventory

TABLES = ("_parameters", "_buffers", "_modules")
_OWN_TABLES = operator.itemgetter(*OWN_TABLES)
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
    """Let Python look for cycles less often: a recording keeps thousands of small objects and makes none.

    Those that are left when the block ends count as old: the next collections would go through them in vain.
    """
    before = gc.get_threshold()
    raised = (max(before[0], RARELY), *before[1:])
    if before[0]:  # 0: it was turned off
        gc.set_threshold(*raised)
    try:
        yield
    finally:
        if gc.get_threshold() == raised:
            gc.set_threshold(*before)
        if before[0] and not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()


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
def kept(model: Inventory, given: tuple[Any, ...] = ()) -> Iterator[Callable[[torch.Tensor], None]]:
    """Keep a model and what it is given as they are; yield what to call before a tensor of theirs changes in place.

    It is copied only then, so that a run costs no second copy of the weights.
    Scripted modules change theirs unseen: their buffers are copied beforehand.
    """
    parameters = model.tensors(("_parameters",))
    others = [*model.tensors(("_buffers",)), *model.loose_tensors()]
    flags = [each.requires_grad for each in others]
    owners = _owners([*parameters, *others, *tensors_in(given)])
    own, parts = [module.__dict__ for module in model.modules], [part for _, part in model.parts]
    copies: dict[int, list[_Before]] = {}

    def before_write(tensor: torch.Tensor) -> None:
        key = _memory(tensor)
        if key in owners and key not in copies:
            copies[key] = [_Before(owner) for owner in owners[key]]

    for module in model.modules:
        if isinstance(module, torch.jit.ScriptModule):
            for buffer in module.buffers():
                before_write(buffer)
    try:
        with (_with_contents(own), _with_contents(map(vars, parameters)), _with_contents(_own_tables(own)),
              put_back(parts, deepest=2),
              put_back(model.objects), _with_contents(model.containers), variables_kept(model.functions),
              _without_gradients(parameters)):  # fmt: skip
            _wait_for_no_rank(model.modules)
            yield before_write
    finally:
        for before in itertools.chain.from_iterable(copies.values()):
            before.put_back()
        for tensor, flag in zip(others, flags, strict=True):
            if tensor.requires_grad != flag and tensor.is_leaf:
                tensor.requires_grad_(flag)


def _owners(tensors: Iterable[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
    """Return the tensors of a model, each once, by the memory that they lie in."""
    found: dict[int, list[torch.Tensor]] = {}
    each_once = {id(each): each for each in tensors}.values()
    for memory, tensor in zip(map(_memory, each_once), each_once, strict=True):
        found.setdefault(memory, []).append(tensor)
    return found


def _own_tables(own: list[dict[str, Any]]) -> list[Any]:
    """Return the tables that every module has, fifteen of them; a scripted one has them elsewhere."""
    try:
        tables = list(itertools.chain.from_iterable(map(_OWN_TABLES, own)))
    except KeyError:
        tables = [attributes.get(name) for attributes in own for name in OWN_TABLES]
    return tables if CONTAINERS.issuperset(map(type, tables)) else [each for each in tables if type(each) in CONTAINERS]


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
        data = self._data
        if (_memory(tensor), tensor.dtype, tensor.shape) != (_memory(data), data.dtype, data.shape):
            tensor.data = data  # other memory, or resized where it lies, as the observers of a quantisation are
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
            # Nor let its output tell the reducer of a backward pass, of which there is one that counts: the first.
            module._static_graph_delay_allreduce_enqueued = True
            module.find_unused_parameters = False


@contextmanager
def swapped(
    model: Inventory, replace: Callable[[torch.Tensor], torch.Tensor], given: tuple[Any, ...] = ()
) -> Iterator[Callable[[torch.Tensor], None]]:
    """Put other tensors in the place of a model's parameters and buffers for a while; ties are kept.

    What ``replace`` gives back as it is stays the model's own; see :func:`kept` for what is yielded.
    """
    made: dict[int, torch.Tensor] = {}
    with kept(model, given) as before_write:
        for module in model.modules:
            for table in _tables(module)[:2]:
                for name, tensor in table.items():
                    if tensor is not None:
                        if id(tensor) not in made:
                            made[id(tensor)] = with_attributes_of(tensor, replace(tensor))
                        table[name] = made[id(tensor)]
        yield before_write


def with_attributes_of(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Give another tensor what somebody has set on this one: a counter, how an optimizer is to treat it."""
    if vars(tensor):
        own = vars(other)
        own.update({name: value for name, value in vars(tensor).items() if name not in own})
    return other


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
    """Give these containers their contents back when the block ends; most are empty, and stay so."""
    parts = list(parts)
    before = [(part, part.copy()) for part in parts if part]
    empty = list(itertools.filterfalse(None, parts))
    try:
        yield
    finally:
        for part, kept_part in before:
            _restore(part, kept_part)
        for part in filter(None, empty):
            part.clear()


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
