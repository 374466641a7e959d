"""What the signature of a function says of its values: which parameters may hold floats, whether it gives integers."""

from __future__ import annotations

import ast
import re
from functools import lru_cache

from gradscope.scanning.torch_ops import INTEGER_ANNOTATIONS, INTEGER_NAMES

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

# What Lightning, Transformers and Keras call for the loss of a step; they go backward themselves.
GIVE_LOSS = ("training_step", "compute_loss", "train_step")
_INTEGER_NAME = re.compile(INTEGER_NAMES)
_INTEGER_ANNOTATION = re.compile(INTEGER_ANNOTATIONS)
_INTEGER_OF_TENSOR = re.compile(r"(?:Long|Int|Bool|Byte)Tensor|\b(?:Int\d*|UInt\d*|Integer|Bool)\b")
_INTEGER_TENSOR = re.compile(r"(?:Long|Int|Bool|Byte)Tensor")
_DATA = frozenset({"str", "bytes", "ndarray", "NDArray", "DataFrame"})
_NUMBERS = frozenset({"int", "float", "bool"})
# What holds what stands in its brackets, or behind the first comma.
_HOLDERS = {"list": "list", "List": "list", "Sequence": "list", "tuple": "each", "Tuple": "each", "Optional": "each",
            "Union": "each", "dict": "values", "Dict": "values", "Mapping": "values"}  # fmt: skip
_FLOAT_TENSOR = re.compile(r"(?<!Long)(?<!Int)(?<!Bool)(?<!Byte)Tensor")


@lru_cache(maxsize=4096)  # the same few names in every file
def holds_no_floats(name: str, note: str) -> bool:
    """Tell whether a parameter holds integers or settings, by its name or the words of its annotation."""
    if "Float" in note:
        return False
    # dict[str, Tensor] and Tensor | int may hold floats; LongTensor and Int[Tensor, ...] do not
    annotated = (_INTEGER_OF_TENSOR if "Tensor" in note else _INTEGER_ANNOTATION).search(note)
    return bool(annotated or _INTEGER_NAME.search(name))


def with_plain_defaults(arguments: ast.arguments) -> set[str]:
    """Return the parameters whose default is a number, a string or a truth value: settings, not tensors."""
    positional = [*arguments.posonlyargs, *arguments.args]
    given = [*zip(reversed(positional), reversed(arguments.defaults), strict=False)]
    given += [(each, value) for each, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value]
    return {
        argument.arg for argument, value in given if isinstance(value, ast.Constant) and value.value is not None
    }  # fmt: skip


def positional(node: FunctionNode) -> tuple[str, ...]:
    """Return the parameters that can be given by position, without ``self``."""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    return tuple(names[1:] if names[:1] in (["self"], ["cls"]) else names)


def gives_integers(node: FunctionNode) -> bool:
    """Tell whether a function is said to give tensors of integers and no others."""
    note = words(node.returns)
    return bool(_INTEGER_TENSOR.search(note)) and not _FLOAT_TENSOR.search(note)


def gives_data(node: FunctionNode) -> bool:
    """Tell whether a function is said to give arrays, text or lists of numbers, and no tensor."""
    return node.returns is not None and _held(node.returns) == "data"


def _held(note: ast.expr) -> str:
    """Return what an annotation says is held: ``data``, a ``number``, a ``tensor`` (perhaps), or nothing.

    A number alone is what many a loss is said to give which gives a tensor, and so is a dictionary of them.
    """
    if isinstance(note, ast.BinOp):  # ndarray | None
        return _either([note.left, note.right])
    if isinstance(note, ast.Subscript):
        return _held_in(note)
    if isinstance(note, ast.Constant) and note.value is None:
        return ""
    name = _last_name(note)
    if name == "Image" and isinstance(note, ast.Attribute) and _last_name(note.value) == "Image":  # PIL's
        return "data"
    return "data" if name in _DATA else "number" if name in _NUMBERS else "tensor"


def _held_in(note: ast.Subscript) -> str:
    name = _last_name(note.value)
    if name not in _HOLDERS:  # NDArray[np.float32]
        return "data" if name in _DATA else "tensor"
    parts = note.slice.elts if isinstance(note.slice, ast.Tuple) else [note.slice]
    held = _either(parts[1:] if _HOLDERS[name] == "values" else parts)
    return "data" if held == "number" and _HOLDERS[name] == "list" else held


def _last_name(node: ast.expr) -> str:
    return str(getattr(node, "attr", "") or getattr(node, "id", ""))


def _either(notes: list[ast.expr]) -> str:
    held = {_held(note) for note in notes}
    return next((kind for kind in ("tensor", "data", "number") if kind in held), "")


def words(annotation: ast.expr | None) -> str:
    """Return the names in an annotation (``ast.unparse`` would take longer than reading the function)."""
    if annotation is None:
        return ""
    found = []
    pending: list[ast.AST] = [annotation]
    while pending:
        part = pending.pop()
        if isinstance(part, ast.Name):
            found.append(part.id)
        elif isinstance(part, ast.Attribute):
            found.append(part.attr)
            pending.append(part.value)
        elif isinstance(part, ast.Constant):
            found += [part.value] if isinstance(part.value, str) else []
        elif isinstance(part, ast.BinOp):  # Tensor | None
            pending += (part.left, part.right)
        elif isinstance(part, ast.Subscript):
            pending += (part.value, part.slice)
        else:
            pending += ast.iter_child_nodes(part)
    return " ".join(found)
