"""How long commands take to start, side by side with others, in processes of their own.

Every contestant is started in turn, round after round; the figures are medians and the fastest of each. pytest is
measured on an empty folder, with and without the plugin: what an installed plugin costs everybody.

Run: ``python benchmarks/startup.py [ROUNDS]`` in an environment in which gradscope, pytest and ruff are installed.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = (
    "import torch\n\n\nclass Net(torch.nn.Module):\n    @torch.no_grad()\n    def forward(self, x):\n        return x\n"
)


def contestants(folder: Path) -> dict[str, list[str]]:
    """Return the commands by name; ruff is left out where it is not installed."""
    python, net = sys.executable, str(folder / "net.py")
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder / "empty")]
    ruff = shutil.which("ruff", path=f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}")
    return {
        "python -c pass": [python, "-c", "pass"],
        **({"ruff --version": [ruff, "--version"]} if ruff else {}),
        "python -c 'import rich.console, click'": [python, "-c", "import rich.console, click"],
        "gradscope --help": [python, "-m", "gradscope", "--help"],
        "gradscope scan net.py": [python, "-m", "gradscope", "scan", net, "-q"],
        "gradscope explain GS101": [python, "-m", "gradscope", "explain", "GS101"],
        "pytest --version": [python, "-m", "pytest", "--version"],
        "pytest, no tests, -p no:gradscope": [*pytest, "-p", "no:gradscope"],
        "pytest, no tests": pytest,
    }


def seconds(command: list[str]) -> float:
    """Return the wall time of one run."""
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, check=False)
    return time.perf_counter() - started


def main(rounds: int) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "net.py").write_text(SOURCE)
        (folder / "empty").mkdir()
        commands = contestants(folder)
        times: dict[str, list[float]] = {each: [] for each in commands}
        for _ in range(rounds):
            for each, command in commands.items():
                times[each].append(seconds(command))
    for each, taken in times.items():
        print(f"{each:<40} {statistics.median(taken):6.3f} s   fastest {min(taken):.3f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
