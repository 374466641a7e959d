"""The comments that take a finding out: ``# gradscope: ignore[GS104] why``."""

from __future__ import annotations

import io
import re
import tokenize

from gradscope.scanning.facts import Ignore

IGNORE = re.compile(r"#\s*gradscope:\s*ignore(?:\[([^\]]*)\])?")
_LAYOUT = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)


def ignores(source: str) -> list[Ignore]:
    """Return the ignore comments of a file (comments only, not strings that look like one)."""
    found: list[Ignore] = []
    if "gradscope:" not in source:
        return found
    pending: list[tuple[int, tuple[str, ...]]] = []
    first = 0  # the first line of the statement at hand
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            match = IGNORE.search(token.string) if token.type == tokenize.COMMENT else None
            if match:
                codes = tuple(part.strip() for part in (match[1] or "").split(",") if part.strip())
                pending.append((token.start[0], codes))
            elif token.type == tokenize.NEWLINE:
                found += [Ignore(line, first, token.end[0], codes) for line, codes in pending]
                first, pending = 0, []
            elif token.type == tokenize.NL and not first:  # a comment stands alone: it is about the next line only
                found += [Ignore(line, line, line, codes) for line, codes in pending if line < token.start[0]]
                pending = [each for each in pending if each[0] == token.start[0]]
            elif token.type not in _LAYOUT and not first:
                first = token.start[0]
    except (tokenize.TokenError, SyntaxError):
        pass
    return found + [Ignore(line, line, line, codes) for line, codes in pending]
