"""Towers of DeepSeek-OCR's DeepEncoder, made from transformers' own SAM and CLIP layers.

The checkpoint's own code cannot be had offline and gradient flow does not depend on the weights, so
these have the same shapes (SAM ViT-B with the 512/1024 convolution compressor, CLIP-L: 95.6 M and
303 M parameters) and random values. ``DeepSeekOCREncoder`` takes them as its ``full_model``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, SamVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoder
from transformers.models.sam.modeling_sam import SamVisionLayer, SamVisionNeck

from gradscope.errors import NotAnalysedError, UsageError

WIDTH = 1024
INITIAL_STD = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of both towers; ``compressor`` are the channels of the two stride-2 convolutions."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    image: int
    window: int
    global_layers: tuple[int, ...]
    neck: int
    compressor: tuple[int, int]
    clip_layers: int
    clip_mlp: int


SHAPES = {
    "full": Shape(768, 12, 12, 3072, 1024, 14, (2, 5, 8, 11), 256, (512, WIDTH), 24, 4096),
    "tiny": Shape(48, 2, 3, 96, 256, 4, (1,), 32, (64, WIDTH), 2, 256),
}


class SamTower(nn.Module):
    """Pixels ``[B, 3, H, W]`` to features ``[B, 1024, H/64, W/64]``; H and W are multiples of 64."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        config = SamVisionConfig(
            hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            mlp_dim=shape.mlp, image_size=shape.image, patch_size=16, window_size=shape.window,
            global_attn_indexes=list(shape.global_layers), output_channels=shape.neck,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        grid = shape.image // 16
        self.patch_embed = nn.Conv2d(3, shape.hidden, 16, stride=16)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, shape.hidden))
        self.blocks = nn.ModuleList(
            SamVisionLayer(config, 0 if index in shape.global_layers else shape.window) for index in range(shape.layers)
        )
        self.neck = SamVisionNeck(config)
        first, second = shape.compressor
        self.net_2 = nn.Conv2d(shape.neck, first, 3, stride=2, padding=1, bias=False)
        self.net_3 = nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features of a batch of normalised pixels."""
        x = self.patch_embed(pixels).permute(0, 2, 3, 1)
        x = x + self._positions(x.shape[1:3])
        for block in self.blocks:
            result = block(x)
            x = result[0] if isinstance(result, tuple) else result
        features: torch.Tensor = self.net_3(self.net_2(self.neck(x)))
        return features

    def _positions(self, size: Sequence[int]) -> torch.Tensor:
        if tuple(size) == tuple(self.pos_embed.shape[1:3]):
            return self.pos_embed
        table = self.pos_embed.permute(0, 3, 1, 2)
        resized = F.interpolate(table, size=tuple(size), mode="bicubic", align_corners=False, antialias=True)
        return resized.permute(0, 2, 3, 1)


class ClipTower(CLIPEncoder):  # type: ignore[misc]
    """Tokens ``[B, N, 1024]`` to tokens: transformers' encoder, without the output wrapper."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the encoded tokens."""
        encoded: torch.Tensor = super().forward(inputs_embeds=tokens).last_hidden_state
        return encoded


class Vision(nn.Module):
    """The part of the checkpoint that holds CLIP, named as the package expects it (``pre_layrnorm``)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=shape.clip_mlp, num_hidden_layers=shape.clip_layers,
            num_attention_heads=16, image_size=224, patch_size=14, hidden_act="quick_gelu",
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.embeddings.position_embedding = nn.Embedding(257, WIDTH)
        self.pre_layrnorm = nn.LayerNorm(WIDTH)
        self.transformer = ClipTower(config)


class Towers(nn.Module):
    """What ``DeepSeekOCREncoder(full_model)`` takes: ``sam_model`` and ``vision_model``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.sam_model = SamTower(shape)
        self.vision_model = Vision(shape)


def build_towers(
    size: Literal["full", "tiny"] = "full",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    initialise: bool = True,
) -> Towers:
    """Build both towers on the CPU; the global random state is left as it was.

    Args:
        size: ``full`` has the checkpoint's shapes, ``tiny`` about 11 M parameters (same 1024 channels).
        dtype: dtype of every parameter.
        seed: seed of the random values.
        initialise: False leaves the values as torch made them (structural mode needs none).
    """
    with torch.random.fork_rng(devices=[]):
        towers = Towers(SHAPES[size]).eval()
    if initialise:
        _fill(towers, torch.Generator().manual_seed(seed))
    return towers.to(dtype)


def load_checkpoint(id_or_dir: str, *, dtype: torch.dtype) -> nn.Module:
    """Load a real checkpoint on the CPU through the package's own way, running the checkpoint's own code.

    Raises:
        UsageError: a folder that is not there.
        NotAnalysedError: the checkpoint cannot be had or its code does not run here.
    """
    looks_local = id_or_dir.startswith((".", "~", os.sep)) or id_or_dir.count("/") > 1
    folder = Path(id_or_dir).expanduser()
    if looks_local and not folder.is_dir():
        raise UsageError(
            f"There is no checkpoint folder {id_or_dir}.",
            hint="Give a folder with config.json, or a hub id such as deepseek-ai/DeepSeek-OCR.",
        )
    from transformers import AutoModel  # a second of imports that the random towers do without

    try:
        with _quiet("huggingface_hub", "transformers"):
            model: Any = AutoModel.from_pretrained(
                str(folder) if looks_local else id_or_dir,
                trust_remote_code=True,
                use_safetensors=True,
                torch_dtype=dtype,
                attn_implementation="eager",
            )
    except Exception as error:  # its own code runs: it may raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotAnalysedError(
            f"The checkpoint {id_or_dir} could not be loaded: {reason}",
            hint="Its code needs transformers < 4.48 and access to its files; "
            "without --weights the diagnosis is the same, on random weights.",
        ) from error
    loaded: nn.Module = model.eval().to(dtype)
    return loaded


@contextmanager
def _quiet(*libraries: str) -> Iterator[None]:
    """Keep libraries from telling of every retry: what comes of it is told once."""
    loggers = [logging.getLogger(library) for library in libraries]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _fill(towers: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter values that let a gradient through.

    transformers' default for this SAM family is a standard deviation of 1e-10, which makes the
    features exactly zero; the relative position tables start at zero as well.
    """
    with torch.no_grad():
        for name, parameter in towers.named_parameters():
            is_norm = "norm" in name and parameter.dim() == 1 and name.endswith("weight")
            parameter.normal_(1.0 if is_norm else 0.0, INITIAL_STD, generator=generator)
