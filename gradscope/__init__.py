"""gradscope: does the gradient arrive, and if not, which line stops it?

The names below are loaded on first use, so that ``import gradscope`` costs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradscope._version import __version__ as __version__

if TYPE_CHECKING:
    from gradscope.assertion import GradientsDoNotFlow
    from gradscope.findings import Finding
    from gradscope.scanning.scanner import scan
    from gradscope.session import Session
    from gradscope.tracing.library import assert_gradients_flow, trace

__all__ = ["Finding", "GradientsDoNotFlow", "Session", "assert_gradients_flow", "scan", "trace"]

_HOMES = {
    "Finding": "gradscope.findings",
    "GradientsDoNotFlow": "gradscope.assertion",
    "Session": "gradscope.session",
    "assert_gradients_flow": "gradscope.tracing.library",
    "scan": "gradscope.scanning.scanner",
    "trace": "gradscope.tracing.library",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
