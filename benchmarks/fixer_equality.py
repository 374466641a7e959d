"""The fixer against the package's undecorated ``_forward_core`` at full size: outputs and every gradient.

The tests do this on tiny towers and, at full size, for one size and dtype; this does the whole grid
(float32 and float64, frozen and trainable, square and not, batch of two) and prints the worst relative
difference of each case. Needs about 16 GB and ten minutes on two cores. Run: ``python benchmarks/fixer_equality.py``;
with GRADSCOPE_DEVICE=cuda both run on the GPU (a minute).
"""

from __future__ import annotations

import gc
import os
import time

import torch
from deepseek_ocr_encoder import DeepSeekOCREncoder
from torch import nn

from gradscope.fix.deepseek_ocr import DifferentiableEncoder
from gradscope.targets.deepseek_ocr import build_towers

CASES = [
    (torch.float32, (1, 256, 256)),
    (torch.float32, (2, 320, 448)),
    (torch.float32, (1, 512, 512)),
    (torch.float64, (1, 256, 256)),
    (torch.float64, (2, 320, 448)),
    (torch.float64, (1, 512, 512)),
]
DEVICE = os.environ.get("GRADSCOPE_DEVICE", "cpu")
UNDECORATED = DeepSeekOCREncoder._forward_core.__wrapped__
LIMIT = {torch.float32: 2e-5, torch.float64: 1e-9}


def gradients(call, module: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the output, and the gradients of the pixels and of every parameter that has one."""
    module.zero_grad()
    pixels = pixels.clone().requires_grad_()
    output = call(pixels)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=output.dtype)
    (output * weights.to(output.device)).sum().backward()
    found = {"output": output.detach(), "pixels": pixels.grad}
    found |= {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def scale_of(name: str, reference: dict[str, torch.Tensor]) -> float:
    """Return what a difference is relative to; a key's bias has no gradient but rounding (softmax ignores it)."""
    return float(reference[name.replace("k_proj.bias", "q_proj.bias")].abs().max())


def main() -> None:
    """Compare every case and print one row each."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # on a GPU sums are taken in any order otherwise
    torch.backends.cudnn.allow_tf32 = False
    print(f"{'dtype':<10}{'pixels':<16}{'freeze':<8}{'tensors':>8}{'worst':>11}{'limit':>9}{'seconds':>9}")
    for dtype, (batch, height, width) in CASES:
        for freeze in (True, False):
            started = time.perf_counter()
            towers = build_towers("full", dtype=dtype).to(DEVICE)
            encoder = DeepSeekOCREncoder(towers, device=DEVICE, dtype=dtype, freeze=freeze)
            fixed = DifferentiableEncoder(encoder, device=None)
            generator = torch.Generator().manual_seed(1)
            pixels = torch.randn(batch, 3, height, width, generator=generator, dtype=dtype).to(DEVICE)
            reference = gradients(lambda x, e=encoder: UNDECORATED(e, x), encoder, pixels)
            ours = gradients(fixed.forward_features, fixed, pixels)
            assert ours.keys() == reference.keys()
            worst = max(float((ours[n] - reference[n]).abs().max()) / scale_of(n, reference) for n in ours)
            row = f"{str(dtype)[6:]:<10}{f'{batch}x3x{height}x{width}':<16}{freeze!s:<8}{len(ours):>8}{worst:>11.1e}"
            print(f"{row}{LIMIT[dtype]:>9.0e}{time.perf_counter() - started:>9.1f}", flush=True)
            assert worst <= LIMIT[dtype]
            del encoder, fixed, reference, ours
            gc.collect()


if __name__ == "__main__":
    main()
