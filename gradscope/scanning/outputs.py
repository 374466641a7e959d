"""What the names of results say: which of them is a loss, and which are only looked at."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

from gradscope.scanning.detaches import is_detached

_LOSS = re.compile(r"(?:^|[_/.])(?:loss(?:es)?|nll|elbo)(?:$|[_\d])")
_SEVERAL = re.compile(r"losses|_(?:dict|logs?|items|info)$")
# What is printed, plotted and compared, and never trained through.
_FIGURE = re.compile(
    r"(?:^|[_/.])(?:logs?|logging|metrics?|stats?|statistics|monitor(?:ing)?|acc(?:uracy)?\d?|perplexity|ppl|entropy|psnr|"
    r"ssim|m?iou|top_?[15k]|usage|utili[sz]ation|approx_kl|clip_?frac(?:tion)?|grad_norm)(?:$|[_\d])"
)


def named_parts(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Yield what is given side by side, each with its name: of a tuple, a dictionary, the fields of an output."""
    if isinstance(node, (ast.Tuple, ast.List)):
        for part in node.elts:
            yield from named_parts(part)
    elif isinstance(node, ast.Dict):
        yield from ((name_of(key), value) for key, value in zip(node.keys, node.values, strict=True) if key is not None)
    elif isinstance(node, ast.Call) and node.keywords:
        yield from ((keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg)
    else:
        yield name_of(node), node


def name_of(node: ast.expr) -> str:
    """Return the name of a variable, an attribute or a key: ``/rec_loss`` of ``f"{split}/rec_loss"``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        node = node.func.value
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[-1]
    name = getattr(node, "id", "") or getattr(node, "attr", "") or getattr(node, "value", "")
    return name if isinstance(name, str) else ""


def losses(node: ast.expr) -> list[ast.expr]:
    """Return the results that go by the name of a loss, less those that are detached right there."""
    parts = named_parts(node)
    return [part for name, part in parts if _LOSS.search(name) and not (_SEVERAL.search(name) or is_detached(part))]


def are_figures(names: Iterable[str]) -> bool:
    """Tell whether results are only looked at, judged by their names."""
    return all(map(_FIGURE.search, names))


def are_copies(names: Iterable[str]) -> bool:
    """Tell whether what is detached goes into a log or goes by the name of a loss."""
    return any(_FIGURE.search(name) or _LOSS.search(name) for name in names)
