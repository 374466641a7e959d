"""Where hits lie: the lines of offsets, and which of them fall into a statement."""

from __future__ import annotations

import ast
from bisect import bisect_left, bisect_right


def line_numbers(source: str, offsets: list[int]) -> list[int]:
    """Return the 1-based line of every offset; both ascend."""
    lines: list[int] = []
    line, at = 1, 0
    for offset in offsets:
        line += source.count("\n", at, offset)
        at = offset
        lines.append(line)
    return lines


def within(lines: list[int], node: ast.stmt) -> bool:
    """Tell whether one of the lines, which ascend, lies in a statement; its decorators are part of it."""
    at = bisect_left(lines, first_line(node))
    return at < len(lines) and lines[at] <= (node.end_lineno or node.lineno)


def count_within(lines: list[int], node: ast.stmt) -> int:
    """Return how many of them do."""
    return bisect_right(lines, node.end_lineno or node.lineno) - bisect_left(lines, first_line(node))


def first_line(node: ast.stmt) -> int:
    """Return the line that a statement begins on: that of its first decorator, where it has one."""
    decorators = getattr(node, "decorator_list", ())
    return min(node.lineno, decorators[0].lineno) if decorators else node.lineno
