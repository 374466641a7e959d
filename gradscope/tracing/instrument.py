"""Where gradscope patches torch: custom functions, module calls, and (``switches.py``) the grad-mode switches.

Everything is noted in one place and is undone in reverse order, on return and on any exception.
What is patched is what torch offers no hook for: ``TorchFunctionMode`` does not see
``inference_mode`` at all, nor the site of the other switches, nor ``autograd.Function.apply``.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode, handle_torch_function

from gradscope.tracing.frames import user_place
from gradscope.tracing.observer import Observer
from gradscope.tracing.older_torch import shown, unseen_collectives
from gradscope.tracing.patches import Patches
from gradscope.tracing.recording import Site
from gradscope.tracing.structural import CannotFollow
from gradscope.tracing.switches import patch_switches

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
        patch_switches(patches, observer, neutralised)
        _patch_custom_functions(patches, observer)
        _patch_parameter(patches, observer)
        _patch_copying(patches, observer)
        _patch_pickling(patches, observer)
        _patch_dlpack(patches)
        _patch_moves(patches)
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


def _patch_moves(patches: Patches) -> None:
    """Patch how the weights of a module are moved (``module.to`` in a forward pass) where they are fake.

    Torch swaps them with others, and refuses that where anything refers to them weakly, as a recorder does.
    """
    original: Callable[[torch.Tensor, torch.Tensor], None] = torch.utils.swap_tensors

    def swap_tensors(t1: torch.Tensor, t2: torch.Tensor) -> None:
        if not (isinstance(t1, FakeTensor) and isinstance(t2, FakeTensor)):
            return original(t1, t2)
        with torch._C.DisableTorchFunction():  # it stays the leaf that it is
            t1.data = t2
            t1.fake_device = t2.fake_device
        return None

    patches.replace(torch.utils, "swap_tensors", swap_tensors)


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
