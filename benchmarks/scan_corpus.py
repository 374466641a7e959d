"""What the scan says of twelve real packages, beside labels set by reading and beside two oracles.

``scan_labels.csv``: 359 places drawn at random by syntax alone (no part of gradscope had a say), each read
and judged: error, warning, note, or none (nothing stops there). Those of the group *tuned* were looked at while
the rules were tuned, *held out* and *second draw* (drawn later, judged before any report was seen) were not: they
are reported apart. ``scan_errors.csv``: every error that the scan reports in these packages, judged right or wrong
in the same way.

The first oracle is a plain syntax walk: every decorator and with-block that names a switch. The second one
runs: ``--import`` imports each installed package and looks for functions whose wrapper closes over a torch
context (it needs an environment with the packages in these versions).

Run: ``python benchmarks/scan_corpus.py FOLDER [--import]``; the packages are fetched into FOLDER with pip.
"""

from __future__ import annotations

import ast
import csv
import importlib
import os
import pkgutil
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

from gradscope.findings import Finding
from gradscope.scanning.scanner import scan

PACKAGES = {
    "accelerate": "1.15.0", "diffusers": "0.42.1", "kornia": "0.9.0", "open_clip_torch": "3.3.0", "peft": "0.21.2",
    "segment_anything": "1.0", "sentence_transformers": "6.2.0", "timm": "1.0.31", "torchaudio": "2.11.0",
    "torchvision": "0.29.1", "transformers": "5.24.0", "ultralytics": "8.4.190",
}  # fmt: skip
IMPORT_NAMES = {"open_clip_torch": "open_clip"}
SWITCHES = {"no_grad", "inference_mode", "set_grad_enabled", "smart_inference_mode"}
HERE = Path(__file__).parent


def fetch(folder: Path) -> None:
    """Download the wheels that are not there yet, and unpack them into one folder each."""
    for name, version in PACKAGES.items():
        if (folder / name).is_dir():
            continue
        wheels = folder / "wheels"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), f"{name}=={version}"]
        subprocess.run(command, check=True)
        wheel = next(path for path in wheels.glob("*.whl") if path.name.lower().startswith(name.lower()))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / name)


def findings_of(folder: Path) -> dict[str, list[Finding]]:
    """Scan every package from its own folder, so that paths read like import names."""
    found = {}
    for name in PACKAGES:
        os.chdir(folder / name)
        found[name] = scan(IMPORT_NAMES.get(name, name), cache=False).findings
    return found


# --- labels ------------------------------------------------------------------------------------------


def reported(row: dict[str, str], findings: list[Finding]) -> str:
    """Return the severity reported at a labelled place; a call over several lines may be named by any of them."""
    line = int(row["line"])
    here = [
        each for each in findings if each.path == row["path"] and each.line <= line <= max(each.end_line, each.line)
    ]
    exact = [each for each in here if each.line == line]
    functions = [each for each in here if each.function == row["function"]]
    chosen = exact or functions
    return min((each.severity for each in chosen), key=("error", "warning", "note").index, default="none")


def compare(rows: list[dict[str, str]], found: dict[str, list[Finding]], title: str) -> None:
    """Print how labels and reports agree, and every disagreement that matters."""
    table: Counter[tuple[str, str]] = Counter()
    lines = []
    for row in rows:
        said = reported(row, found[row["package"]])
        table[row["label"], said] += 1
        serious = "error" in (row["label"], said) or (row["label"] == "none") != (said == "none")
        if row["label"] != said and serious:
            lines.append(f"  {row['label']:>7} read, {said:>7} reported: {row['path']}:{row['line']} ({row['reason']})")
    print(f"\n{title}: {len(rows)} places\n{'read as':>10}" + "".join(f"{said:>10}" for said in (*LEVELS, "none")))
    for label in (*LEVELS, "none"):
        print(f"{label:>10}" + "".join(f"{table[label, said]:>10}" for said in (*LEVELS, "none")))
    switches = [row for row in rows if row["kind"] != "tensor" and row["label"] != "none"]
    seen = sum(reported(row, found[row["package"]]) != "none" for row in switches)
    print(f"decorators and with-blocks reported at all: {seen} of {len(switches)}")
    print("\n".join(lines))


LEVELS = ("error", "warning", "note")


def compare_errors(found: dict[str, list[Finding]]) -> None:
    """Print how many of the reported errors were judged right, and which are not judged yet."""
    judged = {(row["path"], row["function"], row["rule"]): row for row in read("scan_errors.csv")}
    errors = [each for findings in found.values() for each in findings if each.severity == "error"]
    rows = [judged.get((each.path, each.function, each.rule)) for each in errors]
    right = sum(row is not None and row["verdict"] == "right" for row in rows)
    wrong = [each for each, row in zip(errors, rows, strict=True) if row and row["verdict"] == "wrong"]
    open_ones = [each for each, row in zip(errors, rows, strict=True) if row is None]
    print(f"\nall errors reported: {len(errors)}, right {right}, wrong {len(wrong)}, not judged {len(open_ones)}")
    for each in (*wrong, *open_ones):
        print(f"  {each.path}:{each.line} {each.rule} {each.function}")


def read(name: str) -> list[dict[str, str]]:
    """Read one of the tables beside this script."""
    with (HERE / name).open() as file:
        return list(csv.DictReader(file))


# --- oracles -----------------------------------------------------------------------------------------


def written(folder: Path, package: str) -> Iterator[tuple[str, int]]:
    """Yield path and line of every decorator and with-item that names a switch, by a plain syntax walk."""
    for path in sorted((folder / package).rglob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            expressions: list[ast.expr] = []
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                expressions = list(node.decorator_list)
            elif isinstance(node, (ast.With, ast.AsyncWith)):
                expressions = [item.context_expr for item in node.items]
            for expression in expressions:
                if _switches_off(expression):
                    yield str(path.relative_to(folder)), expression.lineno


def _switches_off(expression: ast.expr) -> bool:
    """Tell whether an expression names a switch that is not told to leave gradients on."""
    for part in ast.walk(expression):
        name = part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else ""
        if name in SWITCHES:
            on = {"set_grad_enabled": True}.get(name, False)
            calls = (each for each in ast.walk(expression) if isinstance(each, ast.Call) and each.func is part)
            given = next((value.value for call in calls for value in _constants(call)), None)
            return given is not on or name == "smart_inference_mode"
    return False


def _constants(call: ast.Call) -> list[ast.Constant]:
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return [value for value in values if isinstance(value, ast.Constant)]


def compare_written(folder: Path, found: dict[str, list[Finding]]) -> None:
    """Print which decorators and with-blocks of the syntax walk the scan does not report."""
    total, missed = 0, []
    for name in PACKAGES:
        lines = {
            (each.path, line) for each in found[name] for line in range(each.line, max(each.line, each.end_line) + 1)
        }
        for place in written(folder / name, IMPORT_NAMES.get(name, name)):
            total += 1
            if place not in lines:
                missed.append(place)
    print(f"\nwritten decorators and with-blocks: {total}, reported {total - len(missed)}")
    for path, line in missed:
        print(f"  not reported: {path}:{line}")


def switched_functions(package: str) -> Iterator[tuple[str, str, int]]:
    """Import a package whole; yield file, name and first line of every function that a torch context wraps."""
    root = importlib.import_module(package)
    seen: set[int] = set()
    for module in (root, *_submodules(root)):
        for holder in (module, *(each for each in vars(module).values() if isinstance(each, type))):
            for member in vars(holder).values():
                function = _plain(member)
                if isinstance(function, FunctionType) and id(function) not in seen:
                    seen.add(id(function))
                    inner = _under_context(function)
                    if inner is not None and str(inner.__module__).partition(".")[0] == package:
                        yield inner.__code__.co_filename, inner.__qualname__, inner.__code__.co_firstlineno


def _plain(member: object) -> object:
    """Return the function in a descriptor; placeholders for missing extras raise on any other question."""
    if isinstance(member, (classmethod, staticmethod)):
        return member.__func__
    return member.fget if isinstance(member, property) else member


def _submodules(root: ModuleType) -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(root.__path__, f"{root.__name__}.", onerror=lambda name: None):
        if any(part in ("__main__", "conftest") or part.startswith("test") for part in info.name.split(".")):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield importlib.import_module(info.name)
        except BaseException:  # a missing extra, a script that exits: not ours to mend
            continue


def _under_context(function: FunctionType) -> FunctionType | None:
    """Return the function that a disabling torch context wraps, through other decorators' wrappers."""
    disabled = False
    current = function
    while isinstance(current, FunctionType):
        free = dict(zip(current.__code__.co_freevars, current.__closure__ or (), strict=True))
        factory = free.get("ctx_factory")
        if factory is not None:
            made = factory.cell_contents()
            kind = type(made).__name__
            mode = getattr(made, "mode", kind == "no_grad")
            disabled |= (kind in ("no_grad", "inference_mode") and mode is not False) or (
                kind == "set_grad_enabled" and mode is False
            )
        inner = getattr(current, "__wrapped__", None)
        if not isinstance(inner, FunctionType):
            break
        current = inner
    return current if disabled else None


def compare_running(found: dict[str, list[Finding]]) -> None:
    """Print which functions that run under a torch context have no site at their decorators."""
    for name in PACKAGES:
        package = IMPORT_NAMES.get(name, name)
        decorated = {(each.path, each.function) for each in found[name] if each.how in ("decorator", "applied")}
        try:
            functions = set(switched_functions(package))
        except Exception as error:
            print(f"running under a context in {package}: cannot be imported here ({str(error)[:80]})")
            continue
        missed = []
        for path, qualified, line in sorted(functions):
            short = path[path.rindex(f"{os.sep}{package}{os.sep}") + 1 :]
            if (short, qualified.replace(".<locals>", "")) not in decorated:
                missed.append(f"{short}:{line} {qualified}")
        print(f"running under a context in {package}: {len(functions)}, not reported {len(missed)}", flush=True)
        for text in missed:
            print(f"  {text}")


def main() -> None:
    """Fetch, scan and compare."""
    folder = Path(sys.argv[1]).resolve()
    fetch(folder)
    found = findings_of(folder)
    labels = read("scan_labels.csv")
    for group in dict.fromkeys(row["group"] for row in labels):
        compare([row for row in labels if row["group"] == group], found, group)
    compare_errors(found)
    compare_written(folder, found)
    if "--import" in sys.argv:
        os.chdir(folder)
        compare_running(found)


if __name__ == "__main__":
    main()
