"""What the scan says at the lines that public issues blame for a lost gradient.

Each row of ``reported_issues.csv`` is an issue of somebody else's project, the commit at which the line is still
there, and what its author found to be lost. The projects are cloned into FOLDER, where they are not there yet.

Run: ``python benchmarks/reported_issues.py FOLDER``.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from gradscope.scanning.scanner import scan

ISSUES = Path(__file__).with_name("reported_issues.csv")


def checkout(folder: Path, repository: str, commit: str) -> Path:
    """Return the folder of a project at a commit; clone it where it is not there."""
    place = folder / repository.replace("/", "+")
    if not place.is_dir():
        url = f"https://github.com/{repository}"
        subprocess.run(["git", "clone", "-q", "--filter=blob:none", "--no-checkout", url, str(place)], check=True)
        subprocess.run(["git", "-C", str(place), "checkout", "-q", commit], check=True)
    return place


def main() -> None:
    """Print a line for each issue, and how many are told of."""
    folder, told = Path(sys.argv[1]).absolute(), Counter[str]()
    for row in csv.DictReader(ISSUES.read_text().splitlines()):
        os.chdir(checkout(folder, row["issue"].partition("#")[0], row["commit"]))
        found = [each for each in scan(".", cache=False).findings if each.path == row["path"]]
        severity = next((each.severity for each in found if each.line == int(row["line"])), "nothing")
        told[severity] += 1
        print(f"{severity:<8} {row['issue']:<46} {row['path']}:{row['line']}  {row['what is lost']}")
    print(", ".join(f"{severity}: {number}" for severity, number in told.most_common()))


if __name__ == "__main__":
    main()
