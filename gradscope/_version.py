"""The installed version, from the distribution's own metadata."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _installed


def version() -> str:
    """Return the version of the installed ``torch-gradscope``."""
    try:
        return _installed("torch-gradscope")
    except PackageNotFoundError:
        return "0+unknown"
