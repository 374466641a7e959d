"""What stands in for a sign that the encoding of a terminal or a file does not have; an error handler of codecs."""

from __future__ import annotations

import codecs

STAND_INS = {"•": "*", "·": ".", "→": "->", "…": "...", "–": "-", "—": "-", "≤": "<=", "≥": ">=", "×": "x"}
IN_PLAIN_LETTERS = "gradscope.plain"


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(STAND_INS.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


codecs.register_error(IN_PLAIN_LETTERS, _in_plain_letters)
