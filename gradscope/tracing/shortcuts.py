"""Which torch functions need no closer look: they only ask for a shape or the like, or take in, and give out, no more.

Told once for each function. A recorder is asked some thousand times in a forward pass, and what it does in between
two kernels runs from memory that the kernels took over: each further function and table costs several times what it
costs in a loop.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gradscope.tracing.calls import (
    AS_ANOTHER,
    MAKES_ROOM,
    MAY_BE_REFUSED,
    NOTED,
    OPERATORS,
    ROOMS,
    ROUNDING,
    SHARES_MEMORY,
    is_lasting,
    may_write,
    mutates,
    operation_name,
)
from gradscope.tracing.control_flow import meaning_of
from gradscope.tracing.cuts import RULE_OF_OPERATION

# In place of a name: to be looked at more closely.
CLOSER = ""
_NOT_ONLY_ASKING = MAKES_ROOM | MAY_BE_REFUSED | {"data_ptr"}
_SPECIAL = (
    NOTED | SHARES_MEMORY | ROUNDING | AS_ANOTHER | RULE_OF_OPERATION.keys() | ROOMS
    | {"backward", "new", "new_tensor", "__deepcopy__"}
)  # fmt: skip


class _Shortcuts(dict[Any, "str | None"]):
    """By torch function: the name of a call that only computes, None where it only asks, else ``CLOSER``."""

    def __missing__(self, func: Any) -> str | None:
        found = _shortcut(func)
        if is_lasting(func):
            self[func] = found
        return found


def _shortcut(func: Any) -> str | None:
    name = operation_name(func)
    if name is None:
        return CLOSER if func.__name__ in _NOT_ONLY_ASKING or meaning_of(func) is not None else None
    if func is nn.functional.batch_norm:  # asked with ``training`` by name, see ``asks_to_write``
        return name
    writes = may_write(name) or name.startswith("_foreach_") or (isinstance(func, OPERATORS) and mutates(func))
    return CLOSER if name in _SPECIAL or writes else name


SHORTCUTS = _Shortcuts()
