"""What a file hands to its optimizers and what it freezes, by its text: that is often said in another function."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from gradscope.scanning.facts import Frozen, Optimizer
from gradscope.scanning.reading import places

# ``opt = torch.optim.AdamW(``, ``self.opt_g = Lion(``; without a name where it is given back at once.
_OPTIMIZER = re.compile(
    r"(?i)(?:^[ \t]*(?:([\w.]+)[ \t]*(?::[^=\n]+)?=[ \t]*)?|\breturn[ \t]+|[\[({,=][ \t\n]*)"
    r"(?:\w+\.)*(?:\w*(?:adam|optim)\w*|sgd|rmsprop|adagrad|adadelta|adafactor|lion|lamb|lbfgs|muon|rprop)[ \t]*\(",
    re.MULTILINE,
)
_OPTIMIZERS = (
    "dam",
    "ptim",
    "SGD",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "afactor",
    "Lion",
    "Lamb",
    "LBFGS",
    "Muon",
    "Rprop",
)
_PARAMETERS = re.compile(r"([A-Za-z_][\w.]*)\.(?:named_)?parameters\(\)")
_NAME = re.compile(r"(?<![\w.\"'])((?:self\.)?[A-Za-z_]\w*)(?![\w.(=])")
_OF_A_CALL = re.compile(r"\w\(([^()]*)\)\.(?:named_)?parameters\(\)")
# What a model or a part of one is called: ``build_optimizer(args, model)``, ``Wrapper(encoder, head)``.
_MODEL = re.compile(
    r"(?:^|[._])(?:model|net|network|module|enc(?:oder)?|dec(?:oder)?|backbone|heads?|trunk|stem|tower|unet|vae|vit|clip|bert|"
    r"resnet\w*|transformer|policy|actor|critic|student|generator|discriminator|classifier|projector|projection|proj|"
    r"embedder|embeddings?|layers?\d*|blocks?)\d*$"
)
_FREEZES = re.compile(
    r"([A-Za-z_][\w.]*?)(?:\.(?:eval|train|to|cuda|half)\([^()\n]*\))*"
    r"\.(?:requires_grad_\((?:requires_grad[ \t]*=[ \t]*)?False|freeze\w*\()|"
    r"\b(?:(?:set_|toggle_)grad|(?:set_|toggle_)?requires_grad|freeze\w*)\((?:\w+=)?([A-Za-z_][\w.]*)[ \t]*[,)]"
)
_FREEZING = ("requires_grad", "freeze", "set_grad(", "toggle_grad(")
# ``vae = VAE().requires_grad_(False)``
_MADE_FROZEN = re.compile(
    r"^[ \t]*([\w.]+)[ \t]*=[^=\n]*\.requires_grad_\((?:requires_grad[ \t]*=[ \t]*)?False", re.MULTILINE
)
# ``for name, each in model.named_parameters():``, and what is done to each further down.
_LOOP = re.compile(r"for[ \t]+[\w, \t]+[ \t]in[ \t]+([^\n]*parameters\(\)[^\n]*):")
_FREEZES_EACH = re.compile(r"\w+\.requires_grad(?:_\(|[ \t]*=)[ \t]*False")
# What stands at the margin ends a class or a function, whatever it is.
_BLOCK = re.compile(r"^(?:(?:class|def|async[ \t]+def)[ \t]+(\w+)|[A-Za-z_@])", re.MULTILINE)
_MARGIN = re.compile(r"\n(?=[A-Za-z_@])")
FARTHEST = 4000  # characters between brackets, and
LOOP = 6  # lines of a loop


def optimizers(source: str) -> list[Optimizer]:
    """Return the optimizers that a file makes; one that is given back at once has no name."""
    found = []
    for match in _searched(_OPTIMIZER, source, _OPTIMIZERS):
        block = _block(source, match.start())
        scope, text = block[1] if block else "", _text(source, block)
        given = _in_brackets(source, match.end())
        told = "\n".join([given, *_lists(given, text)])
        names = set(_PARAMETERS.findall(told))
        names.update(*map(_NAME.findall, _OF_A_CALL.findall(given)))
        if "parameters()" not in given:
            names.update(filter(is_model, _NAME.findall(given)))
        if names:
            parts = {part: name for name in sorted(names) for part in _parts(name, text) if is_model(part)}
            found.append(
                Optimizer(match[1] or "", scope, parts | dict.fromkeys(sorted(names), ""), "requires_grad" in told)
            )
    return found


def is_model(name: str) -> bool:
    """Tell whether something is a model, or a part of one, by its name."""
    return _MODEL.search(name) is not None


def frozen(source: str) -> list[Frozen]:
    """Return what a file freezes, on some way or always, whole or in part: by itself, by a loop, by a function."""
    if not any(word in source for word in _FREEZING):
        return []
    found = [(match[1] or match[2], match) for match in _searched(_FREEZES, source, _FREEZING)]
    found += [(match[1], match) for match in _searched(_MADE_FROZEN, source, ["requires_grad_("])]
    for loop in _searched(_LOOP, source, ["parameters()"]):
        lines = source[loop.end() : loop.end() + FARTHEST].split("\n", LOOP + 1)[: LOOP + 1]
        if any(map(_FREEZES_EACH.search, lines)):
            found += [(name, loop) for name in _PARAMETERS.findall(loop[1])]
    within = ((name, _block(source, match.start())) for name, match in found)
    return [*dict.fromkeys(Frozen(name, block[1] if block else "") for name, block in within)]


def _searched(pattern: re.Pattern[str], source: str, needles: Sequence[str]) -> Iterator[re.Match[str]]:
    """Yield what an expression matches in the lines that hold a literal: they are far less than all."""
    done = 0
    for at in sorted(at for needle in needles for at in places(source, needle)):
        start = source.rfind("\n", 0, at)
        end = source.find("\n", at)
        end = len(source) if end < 0 else end
        if end > done:
            yield from pattern.finditer(source, max(start + 1, done), end)
            done = end


def _block(source: str, at: int) -> re.Match[str] | None:
    """Return how the top-level class or function begins that an offset lies in; None at the top level itself."""
    line = source.rfind("\n", 0, at + 1) + 1
    if source[line : line + 1] not in " \t\n":
        return None
    while line > 0:
        line = source.rfind("\n", 0, line - 1) + 1
        found = _BLOCK.match(source, line) if source[line] not in " \t\n" else None
        if found:
            return found if found[1] else None
    return None


def _text(source: str, block: re.Match[str] | None) -> str:
    """Return the text of a top-level class or function, or of all that is in none."""
    if block:
        end = _MARGIN.search(source, block.end())
        return source[block.start() : end.end() if end else len(source)]
    blocks = [*_BLOCK.finditer(source)]
    ends = [*(each.start() for each in blocks[1:]), len(source)]
    return "".join(source[each.start() : end] for each, end in zip(blocks, ends, strict=True) if each[1] is None)


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


def _lists(given: str, text: str) -> Iterator[str]:
    """Yield what is assigned to the names that are handed over: ``params = [*a.parameters(), *b.parameters()]``."""
    for name in set(_NAME.findall(given)):
        for assigned in re.finditer(rf"{re.escape(name)}[ \t]*(?::[^=\n]+)?\+?=[ \t]*", text):
            if text[text.rfind("\n", 0, assigned.start()) + 1 : assigned.start()].strip(" \t"):
                continue
            end = text.find("\n", assigned.end())
            end = len(text) if end < 0 else end
            goes_on = text[end - 1] in "([{"
            yield text[assigned.end() : end] + (_in_brackets(text, end) if goes_on else "")


def _parts(name: str, text: str) -> Iterator[str]:
    """Yield what a model is put together of: ``model = nn.Sequential(encoder, head)``."""
    made = rf"^[ \t]*{re.escape(name)}[ \t]*(?::[^=\n]+)?=[ \t]*(?:\w+\.)*[A-Z]\w*\("
    for match in re.finditer(made, text, re.MULTILINE):
        yield from _NAME.findall(_in_brackets(text, match.end()))
