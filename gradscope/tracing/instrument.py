"""The only place where gradscope patches torch: grad-mode switches, custom functions, module calls.

Everything is noted in one place and is undone in reverse order, on return and on any exception.
What is patched is what torch offers no hook for: ``TorchFunctionMode`` does not see
``inference_mode`` at all, nor the site of the other switches, nor ``autograd.Function.apply``.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from types import CodeType, FrameType
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.grad_mode import enable_grad, inference_mode, no_grad, set_grad_enabled
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode, handle_torch_function

from gradscope.tracing.cuts import EXPORTED_SWITCH
from gradscope.tracing.frames import call_chain, exported_site, is_user_file, region_site, user_place
from gradscope.tracing.older_torch import shown, unseen_collectives
from gradscope.tracing.patches import Patches
from gradscope.tracing.recording import Place, Region, Site
from gradscope.tracing.structural import CannotFollow


class Observer(Protocol):
    """What a recorder must answer to; it is told of threads only that it is watching."""

    @property
    def is_here(self) -> bool: ...
    @property
    def is_watching(self) -> bool: ...
    def in_thread(self) -> AbstractContextManager[None]: ...

    def enter_region(self, key: object, region: Region) -> None: ...
    def leave_region(self, key: object) -> None: ...
    def enter_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool: ...
    def leave_module(self, module: nn.Module, output: Any) -> None: ...
    @property
    def is_in_function(self) -> bool: ...
    def custom_function(
        self, name: str, args: tuple[Any, ...], call: Callable[..., Any], apply: Callable[..., Any]
    ) -> Any: ...
    def parameter(self, data: Any, place: Place | None, make: Callable[[], nn.Parameter]) -> nn.Parameter: ...

    def replayed(self, graph: Any, place: Place | None, replay: Callable[[], None]) -> None: ...
    def pickled(self, tensor: torch.Tensor, place: Place | None) -> None: ...
    def unpickled(self, tensor: torch.Tensor) -> None: ...
    def step(self, optimizer: torch.optim.Optimizer, place: Place | None, *, begins: bool) -> None: ...


# Where torch makes a function for every custom operator, hundreds of them, that only it calls.
OF_OPERATORS = "torch._library.autograd"
# The metaclass of custom functions.
OF_FUNCTIONS: Any = type(torch.autograd.Function)


@contextmanager
def observe(observer: Observer, neutralised: frozenset[Site]) -> Iterator[None]:
    """Report switches, module calls and custom functions to ``observer`` while the block runs.

    The ``neutralised`` sites are not entered: a skipped switch changes no grad mode, in either
    direction, so that an outer region stays visible.
    """
    with Patches() as patches:
        _patch_switch(patches, no_grad, observer, neutralised)
        _patch_switch(patches, enable_grad, observer, neutralised)
        _patch_switch(patches, inference_mode, observer, neutralised)
        _patch_set_grad_enabled(patches, observer, neutralised)
        _patch_exported(patches, observer, neutralised)
        _patch_custom_functions(patches, observer)
        _patch_parameter(patches, observer)
        _patch_copying(patches, observer)
        _patch_pickling(patches, observer)
        _patch_dlpack(patches)
        for name in unseen_collectives():
            patches.replace(torch.distributed, name, shown(getattr(torch.distributed, name)))
        _patch_replays(patches, observer)
        _patch_threads(patches, observer)
        _patch_modules(patches, observer)
        if isinstance(observer, TorchFunctionMode):
            _patch_functional(patches, observer)
        _hook_steps(patches, observer)
        yield


# --- the parts -----------------------------------------------------------------------------------


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


def _patch_custom_functions(patches: Patches, observer: Observer) -> None:
    """Patch ``Function.apply``: its operations run with grad off inside and are not regions.

    ``ste = Straight.apply`` at the top of a module is bound to the original, which still looks the ``forward`` of the
    class up: the metaclass gives out another one.
    """
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        applied = functools.partial(original.__get__(None, cls), **kwargs)
        if not observer.is_watching:
            return applied(*args)
        return observer.custom_function(cls.__name__, args, applied, applied)

    patches.replace(torch.autograd.Function, "apply", classmethod(apply))
    patches.replace(OF_FUNCTIONS, "forward", _Forwards(original, observer))


class _Forwards:
    """The ``forward`` of every custom function, as its class shows it while an observer looks.

    One attribute of the metaclass: there are some two hundred such classes, most of them torch's own, and to replace
    something in each takes longer than all other patches together.
    """

    def __init__(self, apply: Any, observer: Observer) -> None:
        self._apply = apply
        self._observer = observer
        self._of_outer_trace: _Forwards | None = vars(OF_FUNCTIONS).get("forward")

    def __get__(self, cls: Any, metaclass: type) -> Any:
        if cls is None:
            return self
        owner = next(each for each in cls.__mro__ if "forward" in vars(each))
        forward = vars(owner)["forward"]
        outer = self._of_outer_trace
        shown = forward.__get__(None, cls) if outer is None else outer.__get__(cls, metaclass)
        if not isinstance(forward, staticmethod) or not _is_custom(owner):
            return shown
        return _observed_forward(owner, shown, self._apply, self._observer)

    def __set__(self, cls: Any, forward: Any) -> None:
        with self._out_of_the_way():
            cls.forward = forward

    def __delete__(self, cls: Any) -> None:
        with self._out_of_the_way():
            del cls.forward

    @contextmanager
    def _out_of_the_way(self) -> Iterator[None]:
        """Let a class have its own attribute changed: what a metaclass has of that name comes first."""
        del OF_FUNCTIONS.forward
        try:
            yield
        finally:
            OF_FUNCTIONS.forward = self


def _is_custom(cls: Any) -> bool:
    """Tell a function that somebody wrote from torch's own bases, and from what it makes for itself and calls."""
    base = torch.autograd.Function
    return cls is not base and issubclass(cls, base) and cls.__module__ != OF_OPERATORS


def _observed_forward(cls: Any, forward: Callable[..., Any], apply: Any, observer: Observer) -> Any:
    """Return a forward that is told to the observer unless the ``apply`` around it was."""

    def observed(*args: Any, **kwargs: Any) -> Any:
        if not observer.is_watching or observer.is_in_function:
            return forward(*args, **kwargs)
        leading = 1 if cls.setup_context is torch.autograd.Function.setup_context else 0  # the context
        call = functools.partial(forward, *args[:leading], **kwargs)
        return observer.custom_function(cls.__name__, args[leading:], call, apply.__get__(None, cls))

    observed.__wrapped__ = forward  # type: ignore[attr-defined]  # functools.wraps takes as long as all the rest
    return observed


def _patch_parameter(patches: Patches, observer: Observer) -> None:
    """Patch ``nn.Parameter(t)``: it makes a leaf of any tensor, and no torch function sees it."""
    original = nn.Parameter.__new__

    def __new__(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        if not observer.is_watching:
            return original(cls, data, requires_grad)
        place = user_place(sys._getframe(1))
        return observer.parameter(data, place, lambda: original(cls, data, requires_grad))

    patches.replace(nn.Parameter, "__new__", staticmethod(__new__))


def _patch_copying(patches: Patches, observer: Observer) -> None:
    """Patch the deepcopy of a parameter, which asks no mode, as that of every other tensor does: one call, not four."""
    original: Callable[..., Any] = nn.Parameter.__deepcopy__

    def __deepcopy__(self: nn.Parameter, memo: dict[int, Any]) -> Any:
        if not observer.is_watching or id(self) in memo:
            return original(self, memo)
        return handle_torch_function(original, (self,), self, memo)

    patches.replace(nn.Parameter, "__deepcopy__", __deepcopy__)


def _patch_pickling(patches: Patches, observer: Observer) -> None:
    """Patch both ways through bytes: a plain tensor is pickled, and made again, without a torch function."""
    original: Callable[[torch.Tensor, Any], Any] = torch.Tensor.__reduce_ex__

    def __reduce_ex__(self: torch.Tensor, protocol: Any) -> Any:
        if observer.is_watching:
            observer.pickled(self, user_place(sys._getframe(1)))
        return original(self, protocol)

    rebuild: Callable[..., torch.Tensor] = torch._utils._rebuild_tensor

    def _rebuild_tensor(*args: Any) -> torch.Tensor:
        tensor = rebuild(*args)
        if observer.is_watching:
            observer.unpickled(tensor)
        return tensor

    patches.replace(torch.Tensor, "__reduce_ex__", __reduce_ex__)
    patches.replace(torch._utils, "_rebuild_tensor", _rebuild_tensor)


def _patch_dlpack(patches: Patches) -> None:
    """Patch the way back from a DLPack capsule: a fake tensor has a null address there."""
    original: Callable[..., torch.Tensor] = torch._C._from_dlpack

    def _from_dlpack(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            is_nowhere = tensor.numel() > 0 and not tensor.data_ptr()
        if is_nowhere:
            raise CannotFollow("the memory of a tensor that has none is asked for")
        return tensor

    for home in (torch._C, torch.utils.dlpack):
        if hasattr(home, "_from_dlpack"):
            patches.replace(home, "_from_dlpack", _from_dlpack)


def _patch_replays(patches: Patches, observer: Observer) -> None:
    """Patch the replay of CUDA graphs, which runs kernels and calls nothing."""
    original: Callable[[Any], None] = torch.cuda.CUDAGraph.replay

    def replay(self: Any) -> None:
        if observer.is_watching:
            return observer.replayed(self, user_place(sys._getframe(1)), functools.partial(original, self))
        return original(self)

    patches.replace(torch.cuda.CUDAGraph, "replay", replay)


def _patch_threads(patches: Patches, observer: Observer) -> None:
    """Patch what starts work in another thread: torch's modes are a thread's own, so it has to enter them itself.

    The threads of a pool outlive the run, therefore each piece of their work is wrapped and not the thread.
    """
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit

    def observed(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with observer.in_thread():
                return work(*args, **kwargs)

        return run

    def start_observed(self: threading.Thread) -> None:
        of_a_pool = getattr(getattr(self, "_target", None), "__module__", "") == "concurrent.futures.thread"
        if observer.is_watching and not of_a_pool:
            self.run = observed(self.run)  # type: ignore[method-assign]
        start(self)

    def submit_observed(self: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return submit(self, observed(fn) if observer.is_watching else fn, *args, **kwargs)

    patches.replace(threading.Thread, "start", start_observed)
    patches.replace(ThreadPoolExecutor, "submit", submit_observed)


def _hook_steps(patches: Patches, observer: Observer) -> None:
    """Note which operations are an optimizer's step: torch has hooks for that."""

    def begins(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if observer.is_watching:
            observer.step(optimizer, user_place(sys._getframe(1)), begins=True)

    def ends(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if observer.is_watching:
            observer.step(optimizer, None, begins=False)

    patches.hook(register_optimizer_step_pre_hook(begins))
    patches.hook(register_optimizer_step_post_hook(ends))


def _patch_modules(patches: Patches, observer: Observer) -> None:
    """Patch the call of a module. Torch's global hooks would do, and send every call the long way round."""
    original: Callable[..., Any] = nn.Module._call_impl

    def _call_impl(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not observer.enter_module(self, args, kwargs):
            return original(self, *args, **kwargs)
        try:
            output = original(self, *args, **kwargs)
        except BaseException:
            observer.leave_module(self, None)
            raise
        observer.leave_module(self, output)
        return output

    patches.replace(nn.Module, "_call_impl", _call_impl)


def _patch_functional(patches: Patches, mode: TorchFunctionMode) -> None:
    """Patch how functions of torch that are written in Python (``F.relu``, ``F.layer_norm``) ask the mode.

    Torch looks for subclasses and sets the mode aside by a context manager, which takes longer than to record the call.
    """
    original: Callable[..., Any] = vars(nn.functional)["handle_torch_function"]

    def handle(public_api: Any, relevant_args: Any, *args: Any, **kwargs: Any) -> Any:
        depth = torch._C._len_torch_function_stack()
        if not depth or torch._C._get_function_stack_at(depth - 1) is not mode:
            return original(public_api, relevant_args, *args, **kwargs)
        torch._C._pop_torch_function_stack()
        try:
            return mode.__torch_function__(public_api, (), args, kwargs)
        finally:
            torch._C._push_on_torch_function_stack(mode)

    patches.replace(nn.functional, "handle_torch_function", handle)
