"""A student that learns the features of a teacher, which itself is not trained."""

import torch
from torch import nn
from torch.nn import functional

WIDTH = 16


def tower(depth: int) -> nn.Sequential:
    """Return a small convolutional tower that gives ``[B, WIDTH]``."""
    layers = [nn.Conv2d(3, WIDTH, 8, 8), nn.GELU()]
    for _ in range(depth):
        layers += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Distiller(nn.Module):
    """Student and teacher side by side; what comes out is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.student = tower(1)
        self.teacher = tower(4)
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, images):
        wanted = self.teacher(images).detach()
        return functional.mse_loss(self.project(self.student(images)), wanted)


def build():
    """Return the model to distil and a batch, as `gradscope trace distill.model:build` wants them."""
    return Distiller(), torch.zeros(2, 3, 32, 32)
