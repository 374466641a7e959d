"""What every machine format needs of a finding: a place in a file, a URI, and a name that no other finding has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PureWindowsPath
from typing import Any
from urllib.parse import quote

from gradscope.findings import SEVERITIES, Finding
from gradscope.session import Session


def gravest_first(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings by severity, in their own order within one: whoever shows a few shows these."""
    return sorted(findings, key=lambda each: SEVERITIES.index(each.severity))


def numbered_fingerprints(findings: Sequence[Finding]) -> list[str]:
    """Return a fingerprint for each finding that no other one has: the second of a kind gets ``:2``."""
    seen: Counter[str] = Counter()
    names = []
    for finding in findings:
        seen[finding.fingerprint] += 1
        count = seen[finding.fingerprint]
        names.append(finding.fingerprint if count == 1 else f"{finding.fingerprint}:{count}")
    return names


def place_of(session: Session, finding: Finding) -> tuple[str, int]:
    """Return the file and line of a finding; of the nearest thing that has them where it has none itself.

    Readers such as GitHub refuse a result without a file. A finding on a kernel or on a whole model lies
    in no source: it is shown where its module is called, else where the run was in any file, else at the
    file of the target.
    """
    if _is_file(finding.path):
        return finding.path, max(1, finding.line)
    nodes = [node for node in session.graph.nodes if _is_file(node.path)]
    near = [node for node in nodes if node.finding == finding.id or (finding.module and node.module == finding.module)]
    for node in near + nodes:
        return node.path, max(1, node.line)
    other = next((each for each in session.findings if _is_file(each.path)), None)
    if other is not None:
        return other.path, max(1, other.line)
    name, _, attribute = str(session.target.get("name", "")).rpartition(":")
    return (name if name.endswith(".py") else attribute or name or "unknown"), 1


def uri_of(path: str) -> str:
    """Return a path as a URI reference: percent-encoded, relative where the path is."""
    windows = PureWindowsPath(path)
    if windows.is_absolute():
        return windows.as_uri()
    encoded = quote(path.replace("\\", "/"), safe="/")
    return f"file://{encoded}" if encoded.startswith("/") else encoded


def _is_file(path: str) -> bool:
    return bool(path) and not path.startswith("<")


def classes_of(session: Session) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the entries of a scan class by class, each with the module of its class.

    An inherited method is an entry of the class that inherits it, and names the module that it is written in.
    """
    groups: list[list[dict[str, Any]]] = []
    for entry in session.entries:
        last = groups[-1] if groups else []
        is_more = bool(last) and all(
            other["class"] == entry["class"] and other["clean"] == entry["clean"]
            and other["function"] != entry["function"] for other in last
        )  # fmt: skip
        if is_more:
            last.append(entry)
        else:
            groups.append([entry])
    return [(_home(group), group) for group in groups]


def _home(entries: list[dict[str, Any]]) -> str:
    own = (entry["module"] for entry in entries if entry["function"].startswith(f"{entry['class']}."))
    return str(next(own, entries[0]["module"]))
