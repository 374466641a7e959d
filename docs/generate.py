"""Write what this site takes from the code: rules, command line, Python API, changelog, pictures.

Run: ``python docs/generate.py``, before the site is built, where gradscope can trace ``--model deepseek-ocr``.
"""

from __future__ import annotations

from pathlib import Path

import api
import cli
import pictures
import rules

HERE = Path(__file__).parent


def pages() -> dict[str, str]:
    """Return every generated page by its path in the site's folder."""
    changelog = (HERE.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    return {**rules.pages(), **cli.pages(), **api.pages(), "changelog.md": changelog}


def main() -> None:
    """Write the pages and the pictures."""
    files = {name: text.encode() for name, text in pages().items()} | pictures.pictures()
    for name, content in files.items():
        path = HERE / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


if __name__ == "__main__":
    main()
