"""Python source as HTML, line by line, in the few colours that help to read seven lines of it."""

from __future__ import annotations

from markupsafe import Markup, escape
from pygments.lexers.python import PythonLexer
from pygments.token import Token

# The first that fits; all else stays plain. The classes are those of report.css.
COLOURED = (
    (Token.Comment, "tc"),
    (Token.Literal.String, "ts"),
    (Token.Literal.Number, "tn"),
    (Token.Name.Decorator, "td"),
    (Token.Keyword, "tk"),
    (Token.Operator.Word, "tk"),
)


def lines(source: str) -> list[Markup]:
    """Return each line of a piece of Python as escaped HTML; what is no Python comes out plain."""
    found = [Markup("")]
    for kind, text in PythonLexer(stripnl=False, ensurenl=False).get_tokens(source):
        colour = next((name for token, name in COLOURED if kind in token), "")
        for number, part in enumerate(text.split("\n")):
            if number:
                found.append(Markup(""))
            if part:
                found[-1] += Markup('<span class="{}">{}</span>').format(colour, part) if colour else escape(part)
    return found
