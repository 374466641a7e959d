"""The rule catalogue: one stable code and one kebab name for every way a gradient stops."""

from __future__ import annotations

RULES: dict[str, str] = {
    "GS101": "inference-mode-decorator",
    "GS102": "no-grad-decorator",
    "GS103": "inference-mode-block",
    "GS104": "no-grad-block",
    "GS105": "grad-mode-switched-off",
    "GS201": "detach",
    "GS202": "tensor-data",
    "GS203": "rewrapped-tensor",
    "GS302": "python-scalar-escape",
    "GS401": "index-valued-op",
    "GS402": "piecewise-constant-op",
    "GS403": "integer-cast",
    "GS501": "function-without-gradient",
    "GS503": "opaque-call",
    "GS601": "inference-tensor-in-autograd",
}


def rule_name(code: str) -> str:
    """Return the kebab name of a rule code; raise ``KeyError`` for an unknown one."""
    return RULES[code]
