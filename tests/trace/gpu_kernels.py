"""A Triton kernel; a module of its own, since Triton reads the source of the file that it is defined in."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _double(source, target, count, block: tl.constexpr):
    index = tl.program_id(0) * block + tl.arange(0, block)
    inside = index < count
    tl.store(target + index, tl.load(source + index, mask=inside) * 2, mask=inside)


def doubled(x: torch.Tensor) -> torch.Tensor:
    """Return twice the tensor, through a kernel that autograd sees nothing of."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _double[(1,)](x, out, x.numel(), block=16)
    return out


class Doubled(torch.autograd.Function):
    """The kernel with its derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return doubled(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return doubled(grad)
