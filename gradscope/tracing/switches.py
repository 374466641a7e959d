"""Patches of the grad-mode switches: where each was entered and left, and a run that does without some of them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch.autograd.grad_mode import enable_grad, inference_mode, no_grad, set_grad_enabled

from gradscope.tracing.cuts import EXPORTED_SWITCH
from gradscope.tracing.frames import call_chain, exported_site, is_user_file, region_site
from gradscope.tracing.observer import Observer
from gradscope.tracing.patches import Patches
from gradscope.tracing.recording import Region, Site


def patch_switches(patches: Patches, observer: Observer, neutralised: frozenset[Site]) -> None:
    """Tell the observer of every switch; the ``neutralised`` ones change no mode."""
    for cls in (no_grad, enable_grad, inference_mode):
        _patch_switch(patches, cls, observer, neutralised)
    _patch_set_grad_enabled(patches, observer, neutralised)
    _patch_exported(patches, observer, neutralised)


def _patch_switch(patches: Patches, cls: type, observer: Observer, neutralised: frozenset[Site]) -> None:
    enter, leave = cls.__enter__, cls.__exit__  # type: ignore[attr-defined]
    skipped: set[int] = set()

    def __enter__(self: Any) -> Any:
        if not observer.is_here:
            return enter(self)
        frame = sys._getframe(1)
        site = region_site(frame, cls.__name__)
        if site in neutralised:
            skipped.add(id(self))
            return None
        result = enter(self)
        if observer.is_watching:
            observer.enter_region(self, Region(site, _disables(self), call_chain(frame), _generator(frame)))
        return result

    def __exit__(self: Any, *exc_info: Any) -> Any:
        if id(self) in skipped:
            skipped.discard(id(self))
            return None
        observer.leave_region(self)
        return leave(self, *exc_info)

    patches.replace(cls, "__enter__", __enter__)
    patches.replace(cls, "__exit__", __exit__)


def _generator(frame: FrameType) -> CodeType | None:
    """Return the code of a frame that can be suspended; torch's own wrapper of a decorated generator restores."""
    suspends = frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR)
    return frame.f_code if suspends and is_user_file(frame.f_code.co_filename) else None


def _disables(switch: Any) -> bool:
    """Tell what a switch does: ``inference_mode(False)`` turns gradients on again, even inside no_grad."""
    return bool(switch.mode) if isinstance(switch, inference_mode) else isinstance(switch, no_grad)


def _patch_set_grad_enabled(patches: Patches, observer: Observer, neutralised: frozenset[Site]) -> None:
    """Patch the switch that acts when it is constructed, whether or not a ``with`` follows."""
    construct, wrap = set_grad_enabled.__init__, set_grad_enabled.__call__
    enter, leave = set_grad_enabled.__enter__, set_grad_enabled.__exit__

    def __init__(self: Any, mode: bool) -> None:
        frame = sys._getframe(1)
        # no_grad constructs a set_grad_enabled of its own on entering: that is no site.
        construct(self, mode)
        if is_user_file(frame.f_code.co_filename):
            _begin_switch(self, frame, observer, neutralised)

    def __call__(self: Any, func: Any) -> Any:
        observer.leave_region(self)
        return wrap(self, func)

    def __enter__(self: Any) -> Any:
        frame = sys._getframe(1)
        # Under a decorator the switch was cloned inside torch: only here its site is known.
        if not is_user_file(frame.f_code.co_filename):
            _begin_switch(self, frame, observer, neutralised)
        return enter(self)

    def __exit__(self: Any, *exc_info: Any) -> Any:
        observer.leave_region(self)
        return leave(self, *exc_info)

    for function in (__init__, __call__, __enter__, __exit__):
        patches.replace(set_grad_enabled, function.__name__, function)


def _begin_switch(switch: Any, frame: FrameType, observer: Observer, neutralised: frozenset[Site]) -> None:
    if not observer.is_here:
        return
    site = region_site(frame, "set_grad_enabled")
    if site in neutralised:
        switch.mode = switch.prev
        torch._C._set_grad_enabled(switch.prev)
    elif observer.is_watching:
        observer.enter_region(switch, Region(site, not switch.mode, call_chain(frame)))


def _patch_exported(patches: Patches, observer: Observer, neutralised: frozenset[Site]) -> None:
    """Patch the switch of an exported program: what ran under one is a graph of its own there."""
    cls = getattr(sys.modules.get("torch._higher_order_ops.wrap"), "WrapWithSetGradEnabled", None)
    if cls is None:  # nothing of that kind is loaded
        return
    original: Callable[..., Any] = cls.__call__

    def __call__(self: Any, enable_grad: bool, wrapped_func: Any, *args: Any, **kwargs: Any) -> Any:
        if not observer.is_here:
            return original(self, enable_grad, wrapped_func, *args, **kwargs)
        frame, key, before = sys._getframe(1), object(), torch.is_grad_enabled()
        site = exported_site(wrapped_func, EXPORTED_SWITCH) or region_site(frame, EXPORTED_SWITCH)
        if site in neutralised:
            return wrapped_func(*args, **kwargs)
        if observer.is_watching:
            observer.enter_region(key, Region(site, not enable_grad, call_chain(frame)))
        torch._C._set_grad_enabled(enable_grad)
        try:
            return wrapped_func(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)
            observer.leave_region(key)

    patches.replace(cls, "__call__", __call__)
