# ruff: noqa: E501 - snippets stay on one line
"""Throw damaged and random programs at the scanner: no crash, no hang, no import.

Half of the programs are real files with their text damaged (lines cut, moved and doubled, characters
changed, other files' lines put in, bytes made invalid); half are put together at random from the syntax
trees of real files, so that they parse. Each is scanned as a package of three files.

Run: ``python benchmarks/scan_fuzz.py FOLDER [MINUTES] [SEED]`` (default: 10 minutes).
"""

from __future__ import annotations

import ast
import gc
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

from gradscope.errors import NotAnalysedError
from gradscope.scanning.scanner import scan

SLOWEST_S = 20
SNIPPETS = [
    "@torch.no_grad()", "with torch.no_grad():", "    with torch.inference_mode(), x as y:", "torch.set_grad_enabled(False)",
    "def f(self, *a, **k):", "class A(B, metaclass=C):", "x = y.detach().data", "lambda: (yield)", "async def g(): await x",
    "return super().forward(*x)", "match x:", "    case {'a': [1, *_]}:", "from . import *", "from .... import a as torch",
    "import torch as torch", "stack.enter_context(torch.no_grad())", "f'{x!r:{y}}'", "'''", '"""', "(", "]", "\\", "\x0c", "\t",
    "x: torch.LongTensor = (y := z)", "type X[T] = list[T]", "def h[T: int](x: T) -> T: ...", "try: ...\nexcept* E: ...",
    "# gradscope: ignore[GS101, nonsense]", "# -*- coding: utf-7 -*-", "del x.y", "global z; nonlocal q", "@a[b](c)(d)",
]  # fmt: skip


def damaged(rng: random.Random, files: list[Path]) -> bytes:
    """Return a real file with its text damaged."""
    lines = rng.choice(files).read_text(errors="replace").split("\n")
    start = rng.randrange(len(lines))
    lines = lines[start : start + rng.randrange(5, 400)]
    for _ in range(rng.randrange(1, 12)):
        at = rng.randrange(len(lines) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            del lines[at : at + rng.randrange(1, 5)]
        elif kind == 1:
            lines.insert(at, rng.choice(SNIPPETS))
        elif kind == 2 and lines:
            lines.insert(at, rng.choice(lines))
        elif kind == 3 and lines:
            line = lines[at % len(lines)]
            cut = rng.randrange(len(line) + 1)
            lines[at % len(lines)] = line[:cut] + rng.choice(SNIPPETS) + line[cut:]
        elif kind == 4 and lines:
            lines[at % len(lines)] = " " * rng.randrange(9) + lines[at % len(lines)].strip()
        else:
            rng.shuffle(lines[at : at + 6])
    data = "\n".join(lines).encode("utf-8", "replace")
    if rng.random() < 0.1:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + bytes(rng.randrange(256) for _ in range(3)) + data[at:]
    return data


class Grafter:
    """Makes valid programs out of the statements of real ones, nested at random."""

    def __init__(self, rng: random.Random, files: list[Path]) -> None:
        self.rng = rng
        self.statements: list[ast.stmt] = []
        for path in rng.sample(files, min(200, len(files))):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            found = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
            self.statements += rng.sample(found, min(60, len(found)))
        for text in SNIPPETS:
            try:
                self.statements += ast.parse(text).body * 20
            except SyntaxError:
                continue

    def program(self) -> bytes:
        """Return the source of a random program."""
        body = [self.graft(self.rng.randrange(4)) for _ in range(self.rng.randrange(1, 12))]
        try:
            return ast.unparse(ast.fix_missing_locations(ast.Module(body, []))).encode("utf-8", "replace")
        except (ValueError, RecursionError, AttributeError, TypeError):
            return b""

    def graft(self, depth: int) -> ast.stmt:
        """Return a statement, with others in place of its body."""
        source = ast.unparse(self.rng.choice(self.statements))
        node = ast.parse(source).body[0] if _parses(source) else ast.Pass()
        for part in ("body", "orelse", "finalbody"):
            if depth and getattr(node, part, None) and isinstance(getattr(node, part), list):
                setattr(node, part, [self.graft(depth - 1) for _ in range(self.rng.randrange(1, 4))])
        return node


def _parses(source: str) -> bool:
    try:
        return bool(ast.parse(source).body)
    except SyntaxError:
        return False


def main() -> None:
    """Fuzz for the minutes asked for, and say what came of it; stops at the first failure and keeps its files."""
    warnings.simplefilter("ignore")
    folder, minutes = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 10.0
    rng = random.Random(int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    files = sorted(folder.rglob("*.py"))
    grafter = Grafter(rng, files)
    seen: Counter[str] = Counter()
    modules = set(sys.modules)
    end = time.monotonic() + 60 * minutes
    slowest = 0.0
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"more than {SLOWEST_S} s")))
    package = Path(tempfile.mkdtemp()) / "fuzzed"  # stays behind where something fails
    package.mkdir()
    while time.monotonic() < end:
        for module in ("__init__.py", "a.py", "b.py"):
            program = damaged(rng, files) if rng.random() < 0.5 else grafter.program()
            (package / module).write_bytes(program)
        started = time.monotonic()
        signal.alarm(SLOWEST_S)
        try:
            session = scan(str(package), cache=False, jobs=1)
        except NotAnalysedError:
            seen["nothing readable"] += 1
        else:
            seen["scanned"] += 1
            seen["findings"] += len(session.findings)
            seen["files skipped"] += len(session.unseen)
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.monotonic() - started)
        if seen["scanned"] % 500 == 0:
            gc.collect()
    added = {name for name in set(sys.modules) - modules if name.startswith("fuzzed")}
    assert not added, added
    shutil.rmtree(package.parent)
    print(f"{minutes:g} minutes: {dict(seen)}, slowest {slowest:.2f} s, nothing imported, no crash")


if __name__ == "__main__":
    main()
