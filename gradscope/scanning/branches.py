"""What decides whether statements are run: the mode, training or evaluation, and the bounds of a loop."""

from __future__ import annotations

import ast

_ARE_TRAINING = frozenset({"training", "is_training", "is_train"})


def modes(test: ast.expr) -> tuple[str, str]:
    """Return when the arms of an ``if`` are run: in ``training``, in ``evaluation``, in ``either``; empty: always."""
    if isinstance(test, ast.BoolOp):
        return ("either", "either") if any(any(modes(part)) for part in test.values) else ("", "")
    if isinstance(test, ast.UnaryOp):
        return modes(test.operand)[::-1]
    return ("training", "evaluation") if _is_training(test) else ("", "")


def _is_training(test: ast.expr) -> bool:
    return (getattr(test, "attr", "") or getattr(test, "id", "")) in _ARE_TRAINING


def leaves_in_training(node: ast.If) -> bool:
    """Tell ``if self.training: return ...``: what comes after it is run in evaluation only."""
    return not node.orelse and isinstance(node.body[-1], (ast.Return, ast.Raise)) and _is_training(node.test)


def may_be_empty(node: ast.expr) -> bool:
    """Tell ``range(start, self.frozen)``: layers between two settings, of which there are often none."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id != "range":
        return False
    return len(node.args) == 2 and not any(isinstance(each, ast.Constant) for each in node.args)
