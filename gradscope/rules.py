"""The rule catalogue: one stable code and one kebab name for every way a gradient stops."""

from __future__ import annotations

import difflib
from importlib import resources

from gradscope.errors import UsageError

# The hundreds digit of a code is its family.
FAMILIES: dict[str, str] = {
    "GS1": "Recording is off",
    "GS2": "History is dropped",
    "GS3": "Values leave torch",
    "GS4": "No useful derivative",
    "GS5": "Opaque to autograd",
    "GS6": "Looks sound, is not",
    "GS7": "Not trained",
    "GS8": "Not as declared",
    "GS9": "Notes",
}

RULES: dict[str, str] = {
    "GS101": "inference-mode-decorator",
    "GS102": "no-grad-decorator",
    "GS103": "inference-mode-block",
    "GS104": "no-grad-block",
    "GS105": "grad-mode-switched-off",
    "GS106": "grad-disabling-wrapper",
    "GS107": "grad-mode-leak",
    "GS201": "detach",
    "GS202": "tensor-data",
    "GS203": "rewrapped-tensor",
    "GS204": "activation-requires-grad-off",
    "GS205": "sample-without-reparameterisation",
    "GS206": "collective-without-gradient",
    "GS207": "derivative-without-graph",
    "GS301": "numpy-escape",
    "GS302": "python-scalar-escape",
    "GS303": "image-or-file-escape",
    "GS401": "index-valued-op",
    "GS402": "piecewise-constant-op",
    "GS403": "integer-cast",
    "GS404": "zero-gradient",
    "GS501": "function-without-gradient",
    "GS502": "custom-op-without-autograd",
    "GS503": "opaque-call",
    "GS601": "inference-tensor-in-autograd",
    "GS602": "inference-tensor-cached",
    "GS603": "in-place-hazard",
    "GS604": "reentrant-checkpoint-without-grad-input",
    "GS605": "phantom-view",
    "GS606": "hook-alters-gradient",
    "GS607": "non-finite-gradient",
    "GS608": "freed-graph",
    "GS701": "parameter-not-in-optimizer",
    "GS702": "parameter-unused",
    "GS801": "expectation-not-met",
    "GS901": "frozen-parameter",
    "GS902": "internal-error",
}


def rule_name(code: str) -> str:
    """Return the kebab name of a rule code; raise ``KeyError`` for an unknown one."""
    return RULES[code]


def rule_family(code: str) -> str:
    """Return the title of the family that a rule belongs to; raise ``KeyError`` for an unknown one."""
    return FAMILIES[code[:3]]


def find_rule(text: str) -> str:
    """Return the code of a rule given by code or name, in any case; raise ``UsageError`` for an unknown one."""
    wanted = text.strip().lower().replace("_", "-")
    for code, name in RULES.items():
        if wanted in (code.lower(), name):
            return code
    raise UsageError(f"There is no rule called {text!r}.", hint=_did_you_mean(wanted))


def load_rule_page(code: str) -> str:
    """Return the Markdown page of a rule; raise ``KeyError`` for an unknown code."""
    if code not in RULES:
        raise KeyError(code)
    return resources.files("gradscope.catalogue").joinpath(f"{code}.md").read_text(encoding="utf-8")


def _did_you_mean(wanted: str) -> str:
    """Name up to three rules that look like the text; say where to find all."""
    names = {name: f"{code} {name}" for code, name in RULES.items()}
    codes = {code.lower(): f"{code} {name}" for code, name in RULES.items()}
    known = {**names, **codes}
    # A part of a name is too short for difflib's ratio: look for it first.
    near = [name for name in names if len(wanted) > 2 and wanted in name]
    near += [word for word in difflib.get_close_matches(wanted, known, n=3) if word not in near]
    if not near:
        return "`gradscope explain` lists all rules."
    return f"Did you mean {' or '.join(known[word] for word in near[:3])}? `gradscope explain` lists all rules."
