"""What was replaced in classes and modules for the time of a run, and how it is put back."""

from __future__ import annotations

from typing import Any

from torch.utils.hooks import RemovableHandle

from gradscope.errors import GradscopeError

_INHERITED = object()


class InstrumentationConflict(GradscopeError):
    """Another tool replaced one of our patches while the trace ran and left its own behind."""


class Patches:
    """What was replaced, in order. An ``ExitStack`` would do, and take twice as long."""

    def __init__(self) -> None:
        self._made: list[tuple[Any, str, Any, Any]] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Patches:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for hook in self._hooks:
            hook.remove()
        conflicts = [f"{owner.__name__}.{name}" for owner, name, original, installed in reversed(self._made)
                     if not _restore(owner, name, original, installed)]  # fmt: skip
        if conflicts:
            raise InstrumentationConflict(
                f"{conflicts[-1]} was patched by another tool while gradscope traced.",
                hint="Stop that tool inside the traced code and trace again.",
            )

    def replace(self, owner: Any, name: str, replacement: Any) -> None:
        """Set an attribute of a class or a module; one that was inherited is taken off again."""
        original = owner.__dict__.get(name, _INHERITED)
        setattr(owner, name, replacement)
        self._made.append((owner, name, original, owner.__dict__[name]))

    def hook(self, handle: RemovableHandle) -> None:
        """Remove a hook in the end."""
        self._hooks.append(handle)


def _restore(owner: Any, name: str, original: Any, installed: Any) -> bool:
    """Put back what was there; False where another tool replaced what was installed."""
    if owner.__dict__.get(name) is not installed:
        return False
    if original is _INHERITED:
        delattr(owner, name)
    else:
        setattr(owner, name, original)
    return True
