"""What tensors a value holds (an argument, a result, an attribute): in lists, dicts, dataclasses and plain objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from gradscope.tracing.recording import form_in_words

# Results nest rarely deeper; a cycle of objects ends here too.
DEEPEST = 6


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in nested tuples, lists, dicts, dataclasses and plain objects such as model outputs."""
    found: list[torch.Tensor] = []
    gather((value,), found, 0)
    return found


def hidden_tensors(result: Any) -> list[torch.Tensor]:
    """Return the tensors of a result that lie deeper than in a tuple: a custom function connects none of them."""
    outer = result if isinstance(result, tuple) else (result,)
    seen = {id(each) for each in outer}
    return [tensor for tensor in tensors_in(result) if id(tensor) not in seen]


# The dtypes that a gradient can exist for.
DIFFERENTIABLE = frozenset(
    each
    for each in vars(torch).values()
    if isinstance(each, torch.dtype) and (each.is_floating_point or each.is_complex)
)
# What holds no tensors, or (a module) none that are given on.
PLAIN = (int, float, str, bytes, type(None), torch.dtype, torch.device, nn.Module, type)


def gather(items: Iterable[Any], found: list[torch.Tensor], depth: int) -> None:
    """Add the tensors in these items to those found, looking into what holds some, from a depth on."""
    for item in items:
        kind = KINDS[type(item)]
        if kind == "tensor":
            found.append(item)
        elif kind and depth < DEEPEST and (kind != "sequence" or any(map(_KIND_OF, map(type, item)))):  # no (1, 1)
            gather(item if kind == "sequence" else _parts(item), found, depth + 1)


class _Kinds(dict[type, str]):
    """What values of a class are to :func:`tensors_in`; looked up for every argument of every call."""

    def __missing__(self, cls: type) -> str:
        if len(self) > MOST_KINDS:
            self.clear()
        kind = self[cls] = _kind(cls)
        return kind


# Classes made in a function are made again and again.
MOST_KINDS = 4096
KINDS = _Kinds()
_KIND_OF = KINDS.__getitem__


def _kind(cls: type) -> str:
    if issubclass(cls, torch.Tensor):
        return "tensor"
    if issubclass(cls, PLAIN):
        return ""
    if issubclass(cls, (tuple, list, set, frozenset)):
        return "sequence"
    # A mapping that cannot be written into may be a loader, which reads weights from the disk for each of its values.
    return (
        "mapping" if issubclass(cls, (MutableMapping, MappingProxyType)) else "dataclass" if is_dataclass(cls) else ""
    )


def _parts(value: Any) -> Iterable[Any]:
    kind = KINDS[type(value)]
    if kind == "dataclass":
        held = getattr(value, "__dict__", None)
        if held is not None:  # not by getattr: an attribute of a class may be computed, and raise what it likes
            return [held.get(field.name) for field in fields(value)]
        return [getattr(value, field.name, None) for field in fields(value)]
    parts: Iterable[Any] = value if kind == "sequence" else value.values() if kind == "mapping" else ()
    return parts


def results_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a forward's result, also those that objects of any class keep as attributes."""
    found = list(tensors_in(value))
    yield from found or [item for item in _held(value) if isinstance(item, torch.Tensor)]


def left_torch(value: Any) -> bool:
    """Tell whether a result holds numbers that are no tensors: numpy arrays, PIL images, floats."""
    return any(isinstance(item, float) or type(item).__module__.startswith(("numpy", "PIL.")) for item in _held(value))


def _held(value: Any, depth: int = 0) -> Iterator[Any]:
    """Yield everything in a result: items, entries, and the attributes of objects that are neither."""
    yield value
    if depth < DEEPEST and not isinstance(value, (str, bytes, torch.Tensor, nn.Module, type)):
        parts = list(_parts(value)) or list(getattr(value, "__dict__", {}).values())
        for item in parts:
            yield from _held(item, depth + 1)


def describe(tensor: torch.Tensor) -> str:
    """Return shape and dtype in words, such as ``1x256x1024 bfloat16``."""
    return form_in_words(None if tensor.is_nested else tensor.shape, tensor.dtype)
