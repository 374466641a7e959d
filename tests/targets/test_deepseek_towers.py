"""The towers have the checkpoint's sizes, and every value in them lets a gradient through."""

from __future__ import annotations

import pytest
import torch

from gradscope.targets.deepseek_towers import SHAPES, Towers, build_towers


def test_full_size_has_the_parameters_of_deepencoder() -> None:
    with torch.device("meta"):
        towers = Towers(SHAPES["full"])
    sam = sum(p.numel() for p in towers.sam_model.parameters())
    clip = sum(
        p.numel() for part in ("pre_layrnorm", "transformer") for p in getattr(towers.vision_model, part).parameters()
    )
    assert sam == 95_569_152
    assert clip == 302_311_424


@pytest.mark.parametrize("size", [(256, 256), (320, 448)])
def test_every_parameter_and_pixel_gets_a_gradient(size: tuple[int, int]) -> None:
    towers = build_towers("tiny")
    pixels = torch.randn(1, 3, *size, requires_grad=True)
    features = towers.sam_model(pixels)
    assert features.shape == (1, 1024, size[0] // 64, size[1] // 64)
    vision = towers.vision_model
    tokens = vision.transformer(vision.pre_layrnorm(features.flatten(2).transpose(1, 2)))
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0
    for name, parameter in towers.named_parameters():
        if not name.startswith("vision_model.embeddings"):
            assert parameter.grad is not None, name


def test_the_same_seed_gives_the_same_towers_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    first, second, other = build_towers("tiny"), build_towers("tiny"), build_towers("tiny", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    weight = "sam_model.net_3.weight"
    assert torch.equal(first.state_dict()[weight], second.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])
