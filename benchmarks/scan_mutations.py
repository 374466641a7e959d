"""What the scan says of training scripts that somebody else wrote and that were then broken in one line.

Every script under FOLDER that goes backward once is broken in two ways, each scanned by itself: the loss is detached
and made a leaf before ``backward()``, so that nothing is trained; and the one line that calls a model whose parameters
an optimizer of the file is given is put under ``no_grad``, so that this model is not. Unbroken, none is to have an
error in its step.

Run: ``python benchmarks/scan_mutations.py FOLDER``.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gradscope.errors import GradscopeError
from gradscope.findings import Finding
from gradscope.scanning.optimizers import optimizers
from gradscope.scanning.scanner import scan

BACKWARD = re.compile(r"^([ \t]+)(?:\w*accelerator\.backward\((\w+)\)|(\w+)\.backward\()", re.MULTILINE)
CALL = re.compile(r"^([ \t]+)([\w, ]+ = ([A-Za-z_][\w.]*)\([^\n]*\))\n", re.MULTILINE)
OF_A_STEP = ("is handed to an optimizer", "are handed to an optimizer", "goes backward from nothing else")


def broken(source: str) -> Iterator[tuple[str, str, int]]:
    """Yield each way to break a script: its name, the source, and the line that stops the gradient."""
    (backward,) = BACKWARD.finditer(source)
    indent, name = backward[1], backward[2] or backward[3]
    line = f"{indent}{name} = {name}.detach().requires_grad_()\n"
    at = backward.start()
    yield "a loss that is detached", source[:at] + line + source[at:], source.count("\n", 0, at) + 1
    given = {name for each in optimizers(source) for name in each.given}
    for call in CALL.finditer(source, 0, at):
        if call[3] in given and len(re.findall(rf"\b{re.escape(call[3])}(?:\.\w+)*\(", source[:at])) <= 3:
            block = f"{call[1]}with torch.no_grad():\n{call[1]}    {call[2]}\n"
            changed = source[: call.start()] + block + source[call.end() :]
            yield "a model under no_grad", changed, source.count("\n", 0, call.start()) + 1
            return


def findings(folder: Path, source: str) -> list[Finding]:
    """Scan one script by itself."""
    script = folder / "script.py"
    script.write_text(source)
    try:
        return scan(str(script), cache=False, follow=False).findings
    except GradscopeError:
        return []


def main() -> None:
    """Print how many broken scripts have an error, a warning or a note at the line, and the errors of unbroken ones."""
    told: dict[str, Counter[str]] = {}
    scripts = 0
    with tempfile.TemporaryDirectory() as scratch:
        for path in sorted(Path(sys.argv[1]).rglob("*.py")):
            source = path.read_text(errors="replace")
            if ".parameters()" not in source or len(BACKWARD.findall(source)) != 1 or "torch" not in source:
                continue
            scripts += 1
            for each in findings(Path(scratch), source):
                if each.severity == "error" and any(words in each.message for words in OF_A_STEP):
                    print(f"unbroken: {path}:{each.line} {each.message}")
            for way, changed, line in broken(source):
                found = (each.severity for each in findings(Path(scratch), changed) if each.line == line)
                told.setdefault(way, Counter())[next(found, "nothing")] += 1
    print(f"{scripts} scripts")
    for way, counts in told.items():
        print(f"{way}: {dict(counts.most_common())}")


if __name__ == "__main__":
    main()
