"""Patches in, tokens out."""

import torch
from torch import nn


class PixelCodec(nn.Module):
    """A small patch encoder with the public method that such packages have."""

    def __init__(self, width: int = 16, patch: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.norm = nn.LayerNorm(width)

    @torch.inference_mode()
    def encode(self, images):
        """Return the tokens ``[B, N, width]`` of images ``[B, 3, H, W]``."""
        return self._tokens(images)

    def forward(self, images):
        return self.encode(images)

    def _tokens(self, images):
        return self.norm(self.patches(images).flatten(2).transpose(1, 2))
