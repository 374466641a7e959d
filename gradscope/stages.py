"""What is going on right now, told by whoever does it to whoever listens: a spinner in a terminal, or nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_LISTENER: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Have every stage that begins in this context told to ``listener``."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tell(stage: str) -> None:
    """Say in a few words what begins now."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(stage)
