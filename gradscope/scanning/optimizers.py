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
# ``vae = VAE().requires_grad_(False)``
_MADE_FROZEN = re.compile(
    r"^[ \t]*([\w.]+)[ \t]*=[^=\n]*\.requires_grad_\((?:requires_grad[ \t]*=[ \t]*)?False", re.MULTILINE
)
# ``for name, each in model.named_parameters():``, and what is done to each further down.
_LOOP = re.compile(r"for[ \t]+[\w, \t]+[ \t]in[ \t]+([^\n]*parameters\(\)[^\n]*):")
_FREEZES_EACH = re.compile(r"\w+\.requires_grad(?:_\(|[ \t]*=)[ \t]*False")
# What stands at the margin ends a class or a function, whatever it is.
_BLOCK = re.compile(r"^(?:(?:class|def|async[ \t]+def)[ \t]+(\w+)|[A-Za-z_@])", re.MULTILINE)
FARTHEST = 4000  # characters between brackets, and
LOOP = 6  # lines of a loop


def optimizers(source: str) -> list[Optimizer]:
    """Return the optimizers that a file makes; one that is given back at once has no name."""
    found = []
    for match in _searched(_OPTIMIZER, source, _OPTIMIZERS):
        scope, text = _scope(source, match.start())
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
    found = [(match[1] or match[2], match) for match in _searched(_FREEZES, source, ["_grad", "freeze"])]
    found += [(match[1], match) for match in _searched(_MADE_FROZEN, source, ["requires_grad_("])]
    for loop in _searched(_LOOP, source, ["parameters()"]):
        lines = source[loop.end() : loop.end() + FARTHEST].split("\n", LOOP + 1)[: LOOP + 1]
        if any(map(_FREEZES_EACH.search, lines)):
            found += [(name, loop) for name in _PARAMETERS.findall(loop[1])]
    return [*dict.fromkeys(Frozen(name, _scope(source, match.start())[0]) for name, match in found)]


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


def _scope(source: str, at: int) -> tuple[str, str]:
    """Return the top-level class or function that an offset lies in, and its text; no name at the top level itself."""
    line = source.rfind("\n", 0, at + 1) + 1
    blocks = [*_BLOCK.finditer(source)]
    above = [block for block in blocks if block.start() <= at]
    ends = [block.start() for block in blocks[1:]] + [len(source)]
    if source[line : line + 1] not in " \t\n" or not above or above[-1][1] is None:
        parts = (source[block.start() : end] for block, end in zip(blocks, ends, strict=True) if block[1] is None)
        return "", "".join(parts)
    return above[-1][1], source[above[-1].start() : ends[len(above) - 1]]


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
        for assigned in re.finditer(rf"^[ \t]*{re.escape(name)}[ \t]*(?::[^=\n]+)?\+?=[ \t]*", text, re.MULTILINE):
            end = text.find("\n", assigned.end())
            end = len(text) if end < 0 else end
            goes_on = text[end - 1] in "([{"
            yield text[assigned.end() : end] + (_in_brackets(text, end) if goes_on else "")


def _parts(name: str, text: str) -> Iterator[str]:
    """Yield what a model is put together of: ``model = nn.Sequential(encoder, head)``."""
    made = rf"^[ \t]*{re.escape(name)}[ \t]*(?::[^=\n]+)?=[ \t]*(?:\w+\.)*[A-Z]\w*\("
    for match in re.finditer(made, text, re.MULTILINE):
        yield from _NAME.findall(_in_brackets(text, match.end()))
