"""Which class a value is an instance of, as far as the text shows: constructor calls, annotations."""

from __future__ import annotations

import ast
import re

from gradscope.scanning.switches import Names

# Methods that give out the object they are called on.
GIVE_THEMSELVES = ("eval", "train", "to", "cuda", "cpu", "float", "half", "double", "requires_grad_")
# What gives models, judged by its name.
LOADS = re.compile(
    r"(?:^|_)(?:load|create|build|make|instantiate|model|encoder|backbone|network|pipeline|pretrained)(?:_|$)|^from_"
)
# What is made like a model, and is none.
_NO_MODEL = re.compile(r"(?:Tokenizer|Config|Processor|Extractor)$")
# AutoModel.from_pretrained gives some other class; AutoencoderKL.from_pretrained gives that one.
_FACTORY = re.compile(r"Auto(?:[A-Z]\w*)?$")


def itself(value: ast.expr) -> ast.expr:
    """``tower.eval()`` and ``Tower().to(device)`` are the tower."""
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in GIVE_THEMSELVES:
        value = value.func.value
    return value


def is_factory(dotted: str) -> bool:
    """Tell whether the ``from_...`` methods of a class give out instances of others, judged by its name."""
    return _FACTORY.match(dotted.rpartition(".")[2]) is not None


def loads_models(dotted: str) -> bool:
    """Tell whether calling this gives a model, of whatever class, judged by its name."""
    home, _, last = dotted.rpartition(".")
    return LOADS.search(last) is not None and not _NO_MODEL.search(home)


def class_named(annotation: ast.expr | None, names: Names) -> str:
    """Return the dotted name that an annotation is or wraps: ``Tower | None``, ``Optional[Tower]``, ``"Tower"``."""
    if isinstance(annotation, ast.BinOp):
        return class_named(annotation.left, names)
    if isinstance(annotation, ast.Subscript) and names.dotted(annotation.value).endswith("Optional"):
        return class_named(annotation.slice, names)
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        name = annotation.value.partition("|")[0].strip()
        return names.imports.get(name, name) if name.isidentifier() else ""
    return names.dotted(annotation) if annotation is not None else ""


def class_made(value: ast.expr, names: Names) -> str:
    """Return the class that ``Tower(...)`` and ``Tower.from_pretrained(...)`` make an instance of.

    Empty where the call is of something else, or of another package's class that is not in the scan.
    """
    if not isinstance(value, ast.Call):
        return ""
    func = value.func
    last = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
    if not (last[:1].isupper() or last.startswith("from_")):
        return ""
    dotted = names.dotted(func)
    if last.startswith("from_"):
        home = dotted.rpartition(".")[0]
        if is_factory(home) or names.is_maker(dotted):
            return ""
        dotted = home
    return of_the_scan(dotted, names)


def of_the_scan(dotted: str, names: Names) -> str:
    """Return the name if it may be that of a class of the scan, and nothing otherwise."""
    root = dotted.partition(".")[0]
    is_class = dotted.rpartition(".")[2][:1].isupper() and root not in ("torch", "self", "super()")
    return dotted if is_class and not names.is_elsewhere(root) else ""
