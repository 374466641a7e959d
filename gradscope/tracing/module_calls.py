"""The module calls of one run: the scope of each, what it gave out, and those whose inside nobody sees."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from gradscope.tracing.contents import tensors_in
from gradscope.tracing.frames import function_place, is_user_file, user_place
from gradscope.tracing.provenance import Provenance
from gradscope.tracing.recording import Place, Recording
from gradscope.tracing.scopes import OpenScopes

# Records an operation: its name, the values taken in, the place and the tensors given out.
Record: TypeAlias = Callable[[str, tuple[int, ...], Place | None, list[torch.Tensor]], None]


class ModuleCalls:
    """Follows modules in and out; one that gives out what no recorded call made is taken as one operation.

    ``guesses`` counts the modules taken as one operation although some of what they do was seen.
    """

    def __init__(self, recording: Recording, provenance: Provenance) -> None:
        self._recording = recording
        self._provenance = provenance
        self.names: dict[int, str] = {}  # the ``named_modules`` paths of the model under test, by ``id``
        self.guesses = 0

    def enter(self, here: OpenScopes, module: nn.Module, given: tuple[Any, ...]) -> None:
        """Open the scope of a call in the present thread; ``given`` holds its arguments."""
        name = self.names.get(id(module))
        kind = type(module).__name__
        label = "" if name == "" else name or kind  # the model itself has none
        here.module_calls.append((module, here.push("module", label, name or "", kind), given))

    def leave(self, here: OpenScopes, module: nn.Module, output: Any, record: Record) -> None:
        """Close the scope of a call, and of those inside it that were left without a word.

        ``record`` takes down a module that is taken as one operation. It is not kept: it is the recorder's own, and
        what is part of a cycle is freed only when Python looks for such.
        """
        while here.module_calls:
            entered, scope, given = here.module_calls.pop()
            if entered is module:
                results = [output] if type(output) is torch.Tensor else tensors_in(output)
                if not all(map(self._provenance.is_known, results)) and not self._left_in(scope):
                    operations = self._recording.operations
                    self.guesses += bool(operations) and (operations[-1].scope or 0) >= scope
                    self._take_as_one(module, self._provenance.values_of(given), results, record)
                self._recording.scopes[scope].outputs = tuple(map(self._provenance.value_of, results))
                here.pop(scope)
                return

    def _left_in(self, scope: int) -> bool:
        """Tell whether numbers left for Python in the scope or inside it: an unknown result came from there, then."""
        last = self._recording.escapes[-1].scope if self._recording.escapes else None
        return last is not None and last >= scope

    def _take_as_one(
        self, module: nn.Module, given: tuple[int, ...], results: list[torch.Tensor], record: Record
    ) -> None:
        """Record a module whose inside no torch function shows (scripted, compiled, a kernel) as one operation."""
        own = tuple(self._provenance.value_of(parameter) for parameter in module.parameters())
        name = f"{type(module).__name__}.forward"
        place = user_place(sys._getframe(4))
        if place is None or not is_user_file(place.code.co_filename):  # called by torch: where it is written
            written = inspect.getattr_static(module, "forward")
            place = (function_place(written) if inspect.isfunction(written) else None) or place
        record(name, (*given, *own), place, results)
        self._recording.unseen.append(f"What happens inside {name} is taken as one operation.")
