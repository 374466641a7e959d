"""Write the rule pages of this site from the catalogue that ships with gradscope.

Run: ``python docs/rules.py``, before the site is built.
"""

from __future__ import annotations

from pathlib import Path

from gradscope.rules import FAMILIES, RULES, load_rule_page

FOLDER = Path(__file__).parent / "rules"


def summary(code: str) -> str:
    """Return the first sentence of a rule's page."""
    paragraphs = load_rule_page(code).split("\n\n")
    return " ".join(paragraphs[1].split())


def index() -> str:
    """Return the page that lists every rule by family."""
    lines = ["# Rules", "", "Every way a gradient stops, by family. `gradscope explain CODE` shows the same pages.", ""]
    for family, title in FAMILIES.items():
        lines += [f"## {family}: {title}", "", "| code | name | in a sentence |", "|---|---|---|"]
        lines += [
            f"| [{code}]({code}.md) | {name} | {summary(code)} |"
            for code, name in RULES.items()
            if code.startswith(family)
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "index.md").write_text(index(), encoding="utf-8")
    for code in RULES:
        (FOLDER / f"{code}.md").write_text(load_rule_page(code), encoding="utf-8")


if __name__ == "__main__":
    main()
