"""The rule pages of this site, from the catalogue that ships with gradscope."""

from __future__ import annotations

from gradscope.rules import FAMILIES, RULES, load_rule_page


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


def pages() -> dict[str, str]:
    """Return each page by its path in the site's folder."""
    return {"rules/index.md": index()} | {f"rules/{code}.md": load_rule_page(code) for code in RULES}
