"""What is open at one moment of a run: module calls and grad-mode regions, nested as executed, in each thread."""

from __future__ import annotations

import sys
import threading
from typing import Any

from torch import nn

from gradscope.tracing.frames import function_place, is_running
from gradscope.tracing.recording import Place, Recording, Region, Scope, ScopeKind


class Threads(threading.local):
    """What is open in the present thread; a new one starts with nothing, as its grad mode does."""

    def __init__(self, recording: Recording) -> None:
        self.here = OpenScopes(recording)


class OpenScopes:
    """What is open in one thread.

    ``scope`` is the innermost one. ``watched`` counts how often the thread was entered, ``calls`` and ``functions`` the
    torch functions and the custom functions under way in it; ``module_calls`` holds each module with its scope and the
    arguments it was given.
    """

    __slots__ = ("_recording", "_scopes", "calls", "functions", "module_calls", "regions", "scope", "watched")

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._scopes: list[int] = []
        self.scope: int | None = None
        self.watched = 0
        self.calls = 0
        self.functions = 0
        self.regions: list[tuple[object, Region, int]] = []
        self.module_calls: list[tuple[nn.Module, int, tuple[Any, ...]]] = []

    def push(self, kind: ScopeKind, label: str, module: str = "", type: str = "", region: Region | None = None) -> int:
        """Open a scope inside the innermost one; return its number."""
        scopes = self._recording.scopes
        number = len(scopes)
        scopes.append(Scope(number, self.scope, kind, label, module, type, region))
        self._scopes.append(number)
        self.scope = number
        return number

    def pop(self, scope: int) -> None:
        """Close a scope; a generator may close one that is not the innermost."""
        if self._scopes and self._scopes[-1] == scope:
            self._scopes.pop()
        elif scope in self._scopes:
            self._scopes.remove(scope)
        self.scope = self._scopes[-1] if self._scopes else None

    def enter_region(self, key: object, region: Region) -> None:
        """Note that a grad-mode switch took effect."""
        scope = self.push("region", region.site.function, region=region) if region.disables else -1
        self.regions.append((key, region, scope))

    def leave_region(self, key: object) -> None:
        """Note that a grad-mode switch was undone."""
        for index in range(len(self.regions) - 1, -1, -1):
            if self.regions[index][0] is key:
                self.pop(self.regions.pop(index)[2])
                return

    def place_of_hook(self) -> Place | None:
        """Return where the innermost module's first hook of the backward pass is defined."""
        module = self.module_calls[-1][0] if self.module_calls else None
        hooks = [*module._backward_hooks.values(), *module._backward_pre_hooks.values()] if module is not None else []
        return next(filter(None, map(function_place, hooks)), None)

    @property
    def active(self) -> tuple[Region, ...]:
        """Return the regions that keep autograd from recording now; see :func:`responsible_regions`."""
        if not self.regions:
            return ()
        active = responsible_regions([region for _, region, _ in self.regions])
        for region in active:
            if region.generator is not None and not is_running(region.generator, sys._getframe(1)):
                self._recording.leaked.add(region.site)
        return active


def responsible_regions(regions: list[Region]) -> tuple[Region, ...]:
    """Return the active regions that all have to go before grad mode is on, outermost first.

    An ``enable_grad`` inside a ``no_grad`` wins over it, but not over an ``inference_mode``;
    ``inference_mode(False)`` undoes both.
    """
    blamed: list[Region] = []
    grad_undone = inference_undone = False
    for region in reversed(regions):
        is_inference = region.site.mechanism == "inference_mode"
        if region.disables and not (inference_undone if is_inference else grad_undone):
            blamed.append(region)
        elif not region.disables:
            grad_undone = True
            inference_undone = inference_undone or is_inference
    return tuple(blamed[::-1])
