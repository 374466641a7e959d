"""How a file is named to the user: relative to where they work, or to where it is imported from."""

from __future__ import annotations

import os
import sys


def short_path(path: str) -> str:
    """Return a path relative to the working folder or to the import folder it lies in; else as it is."""
    if not path or path.startswith("<"):
        return path
    path = os.path.abspath(path)
    roots = [os.getcwd(), *(os.path.abspath(entry) for entry in sys.path if entry)]
    inside = [root for root in roots if path.startswith(os.path.join(root, ""))]
    return os.path.relpath(path, max(inside, key=len)) if inside else path
