"""Cold and warm scans beside plain ``ast.parse``, ruff, bandit and TorchFix, on the same files in one run.

Every contestant is a process of its own, started in turn, round after round; the figures are medians, the
ratios are to ``ast.parse`` of every file in one process. TorchFix is measured on a sample (it needs minutes
for a large package), with gradscope on the same sample beside it.

Run: ``python benchmarks/scan.py FOLDER [ROUNDS]``, for example on site-packages/transformers. bandit and
TorchFix are left out where they are not installed beside this Python.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARSE = "import ast, sys, pathlib\nfor f in pathlib.Path(sys.argv[1]).rglob('*.py'): ast.parse(f.read_bytes())"
READ = "import sys, pathlib\nfor f in pathlib.Path(sys.argv[1]).rglob('*.py'): f.read_bytes()"
SAMPLE = 40


def contestants(folder: str) -> dict[str, list[str]]:
    """Return the commands by name; those that are not installed are left out."""
    scan = [sys.executable, "-m", "gradscope", "scan", folder, "-q"]
    return {
        "ast.parse, one process": [sys.executable, "-W", "ignore", "-c", PARSE, folder],
        "read every file": [sys.executable, "-c", READ, folder],
        "gradscope cold, -j 1": [*scan, "--no-cache", "-j", "1"],
        "gradscope cold, -j 2": [*scan, "--no-cache", "-j", "2"],
        "gradscope warm": scan,
        **installed("ruff (F401)", "ruff", ["check", "--select", "F401", "--no-cache", "-q", folder]),
        **installed("bandit (B101)", "bandit", ["-q", "-r", "-t", "B101", folder]),
    }


def installed(name: str, program: str, arguments: list[str]) -> dict[str, list[str]]:
    """Return the command under its name, or nothing where the program is not there."""
    path = shutil.which(program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return {name: [path, *arguments]} if path else {}


def seconds(command: list[str]) -> float:
    """Return the wall time of one run."""
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - started


def compare(commands: dict[str, list[str]], rounds: int) -> dict[str, float]:
    """Run every command in turn, several rounds; return the median of each."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            # One run of the slow ones is enough: they are not near anything.
            if not times[name] or times[name][0] < 60:
                times[name].append(seconds(command))
    return {name: statistics.median(values) for name, values in times.items()}


def show(title: str, medians: dict[str, float], base: str) -> None:
    """Print one table."""
    print(f"\n{title}\n{'':<28}{'seconds':>9}{'ratio':>9}")
    for name, value in sorted(medians.items(), key=lambda item: item[1]):
        print(f"{name:<28}{value:>9.2f}{value / medians[base]:>9.2f}")


def main() -> None:
    """Measure and print the tables."""
    folder, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5
    files = sorted(Path(folder).rglob("*.py"))
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["GRADSCOPE_CACHE_DIR"] = scratch
        commands = contestants(folder)
        seconds(commands["gradscope warm"])  # fills the cache
        title = f"{len(files)} files, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB, {rounds} rounds, medians"
        show(title, compare(commands, rounds), "ast.parse, one process")
        one = Path(scratch) / "one.py"
        one.write_text("import torch\n\n@torch.no_grad()\ndef f(model, x):\n    return model(x)\n")
        command = [sys.executable, "-m", "gradscope", "scan", str(one)]
        print(f"\none file, whole process: {statistics.median(seconds(command) for _ in range(rounds)):.2f} s")
        torchfix = installed("torchfix --select ALL", "torchfix", ["--select", "ALL"])
        if torchfix:
            torch_files = [f for f in files if b"torch" in f.read_bytes()]
            chosen = random.Random(0).sample(torch_files, min(SAMPLE, len(torch_files)))
            sample = Path(scratch) / "sample"
            sample.mkdir()
            for number, path in enumerate(chosen):
                shutil.copy(path, sample / f"f{number}_{path.name}")
            both = {name: [*command, str(sample)] for name, command in torchfix.items()}
            both["gradscope cold, -j 1"] = contestants(str(sample))["gradscope cold, -j 1"]
            show(f"a sample of {len(chosen)} files that name torch", compare(both, 3), "gradscope cold, -j 1")
    print(f"\nlargest child: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000:.0f} MB (of all run here)")


if __name__ == "__main__":
    main()
