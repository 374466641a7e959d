"""The errors a user may meet, each with the exit code the command line gives it.

Every message is one sentence that says what happened; ``hint`` says what to do next.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command (published in ``docs/exit-codes.md``)."""

    CLEAN = 0
    FINDINGS = 1
    USAGE = 2
    NOT_ANALYSED = 3


class GradscopeError(Exception):
    """A failure that the user can do something about; never shown with a traceback."""

    exit_code = ExitCode.USAGE

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says; empty where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "")


def in_words(error: BaseException) -> str:
    """Return the class of an exception and the first line of what it says, where it says anything."""
    first = first_line(error).rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


class UsageError(GradscopeError):
    """The request itself cannot be carried out (unknown name, unreadable input, missing package)."""


class NotAnalysedError(GradscopeError):
    """The target could not be analysed; never to be mistaken for a clean result."""

    exit_code = ExitCode.NOT_ANALYSED
