"""What a command shows on stderr while it works; nothing is left of it when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from gradscope.stages import listening

# What is done sooner needs no bar.
PATIENCE_S = 0.5


@contextmanager
def counting(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar, once it takes a while; yields what to call with how many are done and how many there are."""
    progress = Progress(console=console, transient=True)
    task = progress.add_task(what, total=None)
    begun = time.monotonic()

    def told(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)
        if time.monotonic() - begun > PATIENCE_S:
            progress.start()

    try:
        yield told
    finally:
        if progress.live.is_started:
            progress.stop()


@contextmanager
def staged(console: Console, what: str, first: str) -> Iterator[None]:
    """Show what is being done and its stage, as ``gradscope.stages`` tells them."""
    status = console.status(escape(f"{what}: {first}"))
    with status, listening(lambda stage: status.update(escape(f"{what}: {stage}"))):
        yield
