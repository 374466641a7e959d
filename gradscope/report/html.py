"""The report as one HTML file that loads nothing: verdict, findings, graph, table, what stays open.

The template is rendered with autoescape; what the scripts need lies in the page as JSON. The page's own
policy (CSP) lets run exactly the one script and the one style sheet that are written here, by their hash, so
that nothing a traced program is called by can ever be run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from functools import lru_cache
from importlib import resources
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from gradscope.findings import SEVERITIES, Finding
from gradscope.report import boxes, highlight, issue
from gradscope.report.headline import headline
from gradscope.report.page import counted
from gradscope.report.places import classes_of
from gradscope.report.standing import counts_of, is_meant, standing, to_mend
from gradscope.rules import RULES, load_rule_page, rule_family
from gradscope.session import Session

ASSETS = resources.files("gradscope.report").joinpath("page_assets")
# In this order: each file uses what those before it define.
SCRIPTS = ("dom.js", "layout.js", "graph.js", "compare.js", "table.js", "findings.js", "keys.js", "main.js")
# Letters that reorder or hide their neighbours are written out: what is shown is what is there. So are lone
# surrogates (the name of a file that is no UTF-8), which no file could hold.
HIDING = [*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0x061C, 0xFEFF,
          *range(0xD800, 0xE000)]  # fmt: skip
VISIBLE = {code: f"\\u{code:04x}" for code in HIDING}
MOST_NAMES = 3


def render(session: Session, *, full: bool = False) -> str:
    """Return the page; with ``full`` the graph is open to its last box."""
    style, theme, script = _asset("report.css"), _asset("theme.js"), _script()
    return _environment().get_template("report.html").render(
        session=session,
        full=full,
        headline=headline(session),
        standing=standing(session),
        meant=is_meant(session),
        errors=to_mend(session),
        ordered=sorted(session.findings, key=lambda finding: SEVERITIES.index(finding.severity)),
        severities={name: count for name in SEVERITIES if (count := _severities(session)[name])},
        statuses=Counter(source.status for source in session.sources.values()).most_common(),
        layers=_layers(session),
        groups=_entry_groups(session),
        runs=[(run, counts_of(session, run)) for run in session.runs],
        rules={code: _rule(code) for code in sorted({finding.rule for finding in session.findings} & set(RULES))},
        data=Markup(_json(_data(session, full))),
        style=Markup(style),
        script=Markup(script),
        theme=Markup(theme),
        style_hash=_hash(style),
        theme_hash=_hash(theme),
        script_hash=_hash(script),
    )  # fmt: skip


# --- what the template is made with ----------------------------------------------------------------


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = highlight.lines
    environment.filters["cuts"] = _cuts
    environment.filters["counted"] = counted
    return environment


def _asset(name: str) -> str:
    return ASSETS.joinpath(name).read_text(encoding="utf-8")


def _script() -> str:
    parts = "\n".join(_asset(name) for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}}})();\n'


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _visible(value: object) -> object:
    """Write out letters that hide or reorder others, in everything that the template prints."""
    if isinstance(value, Markup):
        return Markup(value.translate(VISIBLE))
    return value.translate(VISIBLE) if isinstance(value, str) else value


def _json(data: object) -> str:
    """Return JSON that can stand inside a script element, whatever strings it holds."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.translate({code: f"\\{written}" for code, written in VISIBLE.items()})
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


# --- what the page shows ---------------------------------------------------------------------------


def _data(session: Session, full: bool) -> dict[str, Any]:
    """Return what the scripts draw from: graphs, sources, and each finding as text for an issue."""
    return {
        "graph": boxes.build(session.graph, session, full=full),
        "healed": boxes.build(session.healed, session, full=full) if session.healed is not None else None,
        "sources": [
            [source.name, source.kind, source.status, int(source.frozen), source.findings, _norm(source.to_dict())]
            for source in session.sources.values()
        ],
        "findings": {
            finding.id: {"rule": finding.rule, "severity": finding.severity, "module": finding.module,
                         "issue": issue.text(finding, session)}
            for finding in session.findings
        },
    }  # fmt: skip


def _norm(source: dict[str, Any]) -> float | str | None:
    if "gradient" not in source:
        return None
    gradient = source["gradient"]
    norm: float | None = gradient["norm_l2"]
    return "not finite" if norm is None or gradient["nonfinite"] else norm


def _severities(session: Session) -> Counter[str]:
    return Counter(finding.severity for finding in session.findings)


def _cuts(finding: Finding) -> list[tuple[str, int]]:
    """Return the sources a finding concerns: their names, or where they are many how many each part has."""
    if len(finding.cuts) <= MOST_NAMES:
        return [(name, 0) for name in finding.cuts]
    parts = Counter(name.split(".")[0] for name in finding.cuts)
    return [(f"{name}.", count) for name, count in parts.items()]


def _layers(session: Session) -> list[list[Finding]]:
    """Return the cuts one behind the other: each list starts with one that nothing hides."""
    stopping = [each for each in session.findings if each.severity == "error" and each.how != "expectation"]
    chains = []
    for first in (finding for finding in stopping if finding.behind not in {each.id for each in stopping}):
        chain = [first]
        for finding in stopping:
            if finding.behind == chain[-1].id:
                chain.append(finding)
        chains.append(chain)
    return chains


def _entry_groups(session: Session) -> list[dict[str, Any]]:
    """Return what a scan says of public methods, class by class."""
    return [
        {"module": home, "name": entries[0]["class"], "entries": entries, "worst": _worst_status(entries)}
        for home, entries in classes_of(session)
    ]


def _worst_status(entries: list[dict[str, Any]]) -> str:
    present = {entry["status"] for entry in entries}
    return next(status for status in ("blocked", "inference-only", "clean") if status in present)


def _rule(code: str) -> dict[str, Any]:
    """Return the catalogue's page of a rule as HTML; no HTML inside it is taken over."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    # The title of the page is said already; the rest stands below a heading of the report.
    tokens = markdown.parse(load_rule_page(code))[3:]
    for token in tokens:
        if token.type.startswith("heading"):
            token.tag = "h3"
    page = markdown.renderer.render(tokens, markdown.options, {})
    # Code that is too wide scrolls, also by keys: the text itself holds no tag.
    page = page.replace("<pre>", '<pre tabindex="0">')
    return {"name": RULES[code], "family": rule_family(code), "page": Markup(page)}
