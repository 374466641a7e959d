"""What the user asked to trace, as one value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """The options of one trace that concern the target."""

    inputs: tuple[str, ...] = ()
    weights: str | None = None
    seed: int = 0
    fixed: bool = False
    head: bool = False
    entry: str | None = None
    wrt: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    loss: str | None = None
    mode: str = "auto"
