"""Peak memory and time of forward and backward through the fixer, per checkpoint mode.

Every mode runs in a process of its own, because the kernel's high-water mark never falls. Linux only.
Run: ``python benchmarks/fixer_memory.py [SIDE]`` (default 512 pixels; full-size towers, float32, CPU). With
GRADSCOPE_DEVICE=cuda it runs on the GPU in bfloat16, and the memory is the GPU's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

MODES = ("none", "sam", "all")
DEVICE = os.environ.get("GRADSCOPE_DEVICE", "cpu")


def status(field: str) -> float:
    """Return one memory field of this process in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1e6


def measure(mode: str, side: int) -> None:
    """Print the peak above the built model (GB) and the seconds of one forward and backward."""
    import torch
    from deepseek_ocr_encoder import DeepSeekOCREncoder

    from gradscope.fix.deepseek_ocr import DifferentiableEncoder
    from gradscope.targets.deepseek_ocr import build_towers

    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    encoder = DeepSeekOCREncoder(build_towers("full", dtype=dtype).to(DEVICE), device=DEVICE, dtype=dtype)
    fixed = DifferentiableEncoder(encoder, checkpoint=mode, device=None)
    pixels = torch.randn(1, 3, side, side, device=DEVICE, requires_grad=True)
    if DEVICE == "cuda":
        measure_on_gpu(lambda: fixed.forward_features(pixels).sum().backward())
        return
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    built = status("VmRSS")
    start = time.perf_counter()
    fixed.forward_features(pixels).sum().backward()
    print(status("VmHWM") - built, time.perf_counter() - start)


def measure_on_gpu(step: Callable[[], None]) -> None:
    """Print the same of the second step on a GPU: the first one loads kernels."""
    import torch

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    built, start = torch.cuda.memory_allocated(), time.perf_counter()
    step()
    torch.cuda.synchronize()
    print((torch.cuda.max_memory_allocated() - built) / 1e9, time.perf_counter() - start)


def main() -> None:
    """Measure every mode and print one row each."""
    side = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    print(f"{'checkpoint':<12}{'peak above model':>18}{'forward+backward':>18}   ({side}x{side})")
    for mode in MODES:
        command = [sys.executable, __file__, "--mode", mode, str(side)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak, seconds = map(float, output.split()[-2:])
        print(f"{mode:<12}{peak:>15.2f} GB{seconds:>16.1f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--mode"]:
        measure(sys.argv[2], int(sys.argv[3]))
    else:
        main()
