"""The recording of one forward pass: values, operations and the scopes they ran in, as plain data.

Written by ``recorder.py``, read by ``diagnose.py`` and ``drawing.py``. No tensor is kept: a value is
a number, its shape and dtype in words, and whether autograd connected it to anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import CodeType
from typing import Literal, TypeAlias

# The scope in which a model is built, before it is called.
CONSTRUCTOR = "constructor"

ScopeKind: TypeAlias = Literal["module", "region"]


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the source that can be blamed and neutralised.

    For a decorator ``line`` is the decorator's line and ``function`` the decorated function; for a
    ``with`` or a call it is that line and the function that contains it.
    """

    path: str
    line: int
    function: str
    mechanism: str
    how: str


@dataclass(frozen=True, slots=True)
class Region:
    """A stretch of execution under one grad-mode switch; ``disables`` is False for one that re-enables."""

    site: Site
    disables: bool
    chain: tuple[str, ...] = ()


@dataclass(slots=True)
class Scope:
    """One module call or one region, nested as executed; ``module`` is the ``named_modules`` path."""

    id: int
    parent: int | None
    kind: ScopeKind
    label: str
    module: str = ""
    type: str = ""
    region: Region | None = None
    outputs: tuple[int, ...] = ()


@dataclass(slots=True)
class Value:
    """One tensor at one moment. ``connected`` says that autograd links it to some leaf that counts, or is it."""

    id: int
    detail: str
    differentiable: bool
    connected: bool = False
    leaf: bool = False
    inference: bool = False
    name: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in user code an operation was called; resolved to text only when it is shown."""

    code: CodeType
    offset: int
    line: int


@dataclass(slots=True)
class Operation:
    """One torch call: what it took in, what it gave out, where, and under which regions.

    ``custom`` marks what autograd cannot look into either: an ``autograd.Function``, a scripted module.
    """

    index: int
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    place: Place | None
    scope: int | None
    regions: tuple[Region, ...] = ()
    custom: bool = False


@dataclass(slots=True)
class Recording:
    """Everything that one run showed. ``leaves`` maps source names to their first value.

    ``left`` are the calls by which the result left torch, where it is no tensor: then the ``sinks`` are what went in.
    """

    values: list[Value] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)
    leaves: dict[str, int] = field(default_factory=dict)
    outside: dict[str, int] = field(default_factory=dict)
    escapes: list[Operation] = field(default_factory=list)
    sinks: tuple[int, ...] = ()
    left: list[Operation] = field(default_factory=list)
    reached: frozenset[str] = frozenset()
    error: BaseException | None = None
    pending: Operation | None = None
    unseen: list[str] = field(default_factory=list)

    def ancestors(self, scope: int | None) -> list[Scope]:
        """Return the chain of scopes from the outermost to this one."""
        chain: list[Scope] = []
        while scope is not None:
            chain.append(self.scopes[scope])
            scope = self.scopes[scope].parent
        return chain[::-1]
