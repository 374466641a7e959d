"""See what no torch function shows: operators called from C++ or from a script function, as they are dispatched.

A dispatch mode costs more than the recorder and sees no line of its own, so it is used only where a run met
tensors that came from nowhere.
"""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from gradscope.tracing.recorder import Recorder


class DispatchedCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tell a recorder the operators that ran outside every call it saw."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._recorder.is_between_calls:
            self._recorder.dispatched(func.overloadpacket.__name__, args, kwargs or {}, result)
        return result
