"""A captioner over the encoder of somebody else."""

import torch
from pixelcodec import PixelCodec
from torch import nn


class Captioner(nn.Module):
    """Encoder, adapter, head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = PixelCodec()
        self.adapter = nn.Linear(16, 32)
        self.head = nn.Linear(32, 100)

    def forward(self, images):
        return self.head(self.adapter(self.encoder(images).clone()))


def build():
    """Return the captioner and a batch."""
    return Captioner(), torch.zeros(2, 3, 32, 32)
