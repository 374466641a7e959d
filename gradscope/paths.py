"""How a file is named to the user, and how one is written: whole or not at all."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path

from gradscope.errors import UsageError


def short_path(path: str) -> str:
    """Return a path relative to the working folder or to the import folder it lies in; else as it is."""
    if not path or path.startswith("<"):
        return path
    path = os.path.abspath(path)
    inside = [root for root in _roots(os.getcwd(), tuple(sys.path)) if path.startswith(root)]
    return path.removeprefix(max(inside, key=len)) if inside else path


@lru_cache(maxsize=4)  # a report names thousands of places
def _roots(folder: str, entries: tuple[str, ...]) -> tuple[str, ...]:
    """Return the folders that paths are shown relative to, each with a separator at its end."""
    return tuple(os.path.join(os.path.abspath(entry), "") for entry in (folder, *filter(None, entries)))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name and move it into place, so that nobody ever reads half of it.

    Raises:
        UsageError: it cannot be written; what was there is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(f"Cannot write {path}: {error.strerror or error}.") from error
