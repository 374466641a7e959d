"""What is different in versions of torch before the newest, down to the oldest that models are traced with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from torch.overrides import handle_torch_function

from gradscope.errors import UsageError
from gradscope.tracing.calls import COLLECTIVES

OLDEST = "2.6"
# Before it autograd asks the driver for a stream as soon as a parameter on CUDA is used, and where there is none the
# process is aborted (``torch/csrc/autograd/input_metadata.cpp``; run on 2.4, 2.6, 2.8, 2.9 and 2.10).
PRETENDS_CUDA = "2.10"


def refuse_old_torch() -> None:
    """Raise where torch is older than what a trace needs (``torch.compiler.set_stance``)."""
    if torch.__version__ < OLDEST:
        raise UsageError(
            f"Tracing takes torch {OLDEST} or newer, and this is torch {torch.__version__}.",
            hint="Update torch, or scan the source, which takes none.",
        )


@functools.lru_cache(maxsize=1)
def unseen_collectives() -> tuple[str, ...]:
    """Return the names of the collectives that do not ask torch's function modes, which is all before torch 2.9."""
    names = sorted({name.rpartition(".")[2] for name in COLLECTIVES} if distributed.is_available() else ())
    return tuple(name for name in names if hasattr(distributed, name) and not _asks(getattr(distributed, name)))


def _asks(function: Callable[..., Any]) -> bool:
    return handle_torch_function.__name__ in inspect.unwrap(function).__code__.co_names


def shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function, which asks torch's function modes as the others do."""

    @functools.wraps(function)
    def asking(*args: Any, **kwargs: Any) -> Any:
        if torch._C._is_torch_function_mode_enabled():
            return handle_torch_function(function, (), *args, **kwargs)
        return function(*args, **kwargs)

    return asking
