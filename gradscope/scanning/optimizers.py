"""What a file hands to its optimizers and what it freezes, by its text: that is often said in another function."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gradscope.scanning.facts import Optimizer

# ``opt = torch.optim.AdamW(``, ``self.opt_g = Lion(``; without a name where it is given back at once.
_OPTIMIZER = re.compile(
    r"(?i)(?:^[ \t]*([\w.]+)[ \t]*(?::[^=\n]+)?=[ \t]*|\breturn[ \t]+|[\[({,=][ \t\n]*)"
    r"(?:\w+\.)*(?:\w*(?:adam|optim)\w*|sgd|rmsprop|adagrad|adadelta|adafactor|lion|lamb|lbfgs|muon|rprop)[ \t]*\(",
    re.MULTILINE,
)
_PARAMETERS = re.compile(r"([A-Za-z_][\w.]*)\.(?:named_)?parameters\(\)")
_NAME = re.compile(r"(?<![\w.])([A-Za-z_]\w*)(?![\w.(=])")
_FREEZES = re.compile(
    r"([A-Za-z_][\w.]*?)(?:\.(?:eval|train|to|cuda|half)\([^()\n]*\))*"
    r"\.requires_grad_\((?:requires_grad[ \t]*=[ \t]*)?False|"
    r"for[ \t]+\w+[ \t]+in[ \t]+([A-Za-z_][\w.]*)\.parameters\(\)[ \t]*:\s*\w+\.requires_grad(?:_\(|[ \t]*=)[ \t]*False"
)
_BLOCK = re.compile(r"^(?:class|def|async[ \t]+def)[ \t]+(\w+)", re.MULTILINE)
FARTHEST = 4000


def optimizers(source: str) -> list[Optimizer]:
    """Return the optimizers that a file makes; one that is given back at once has no name."""
    found = []
    for match in _OPTIMIZER.finditer(source):
        given = _in_brackets(source, match.end())
        names = {*_PARAMETERS.findall(given), *_through_names(given, source)}
        if names:
            found.append(Optimizer(match[1] or "", _scope(source, match.start()), tuple(sorted(names))))
    return found


def frozen(source: str) -> tuple[str, ...]:
    """Return what a file freezes, on some way or always: ``encoder.requires_grad_(False)``, or by a loop."""
    return tuple(sorted({match[1] or match[2] for match in _FREEZES.finditer(source)}))


def _scope(source: str, at: int) -> str:
    """Return the top-level class or function that an offset lies in; nothing at the top level itself."""
    line = source.rfind("\n", 0, at + 1) + 1
    if source[line : line + 1] not in " \t\n":
        return ""
    above = [*_BLOCK.finditer(source, 0, at + 1)]
    return above[-1][1] if above else ""


def _in_brackets(source: str, start: int) -> str:
    """Return the text up to the bracket that closes the one before an offset."""
    depth = 1
    for at in range(start, min(len(source), start + FARTHEST)):
        if source[at] in "([{":
            depth += 1
        elif source[at] in ")]}":
            depth -= 1
            if not depth:
                return source[start:at]
    return source[start : start + FARTHEST]


def _through_names(given: str, source: str) -> Iterator[str]:
    """Yield what is handed over by way of a list: ``params = [*a.parameters(), *b.parameters()]``."""
    for name in set(_NAME.findall(given)):
        assigned = re.compile(rf"^[ \t]*{name}[ \t]*(?::[^=\n]+)?\+?=[ \t]*", re.MULTILINE)
        for match in assigned.finditer(source):
            end = source.find("\n", match.end())
            end = len(source) if end < 0 else end
            goes_on = source[end - 1] in "([{"
            text = source[match.end() : end] + (_in_brackets(source, end) if goes_on else "")
            yield from _PARAMETERS.findall(text)
