"""What a model is fed when nobody says: read off its own metadata, and said in the report."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gradscope.targets.inputs import describe


@dataclass(frozen=True, slots=True)
class Guess:
    """Inputs and the sentence that says where they come from."""

    args: tuple[Any, ...]
    said: str
    kwargs: dict[str, Any] = field(default_factory=dict)


def guess_inputs(model: nn.Module) -> Guess | None:
    """Return inputs for a model, or None where nothing about it says what it takes."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if size:
        return Guess((torch.randn(2, *size),), f"Input 2x{'x'.join(map(str, size))}, from its default_cfg.")
    if hasattr(model, "config") and hasattr(model, "main_input_name"):
        return _for_transformers(model)
    return None


def _for_transformers(model: Any) -> Guess | None:
    """Read the sizes in a transformers configuration (``main_input_name`` says which input is the main one)."""
    config, main = model.config, model.main_input_name
    sizes = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]
    kwargs: dict[str, Any] = {}
    names = inspect.signature(model.forward).parameters
    if "input_ids" in names and main in ("input_ids", "inputs"):
        kwargs["input_ids"] = _tokens(sizes)
    if "pixel_values" in names:
        kwargs["pixel_values"] = torch.randn(1, _number(sizes, "num_channels", 3), *_image_size(sizes))
        if "input_ids" in names:
            kwargs["input_ids"] = _tokens(sizes)
    if main in ("input_values", "input_features") and main in names:
        shape = (1, 16000) if main == "input_values" else (1, _number(sizes, "num_mel_bins", 80), 3000)
        kwargs[main] = torch.randn(shape)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        kwargs["decoder_input_ids"] = _tokens(sizes)
    if not kwargs:
        return None
    words = ", ".join(f"{name} {describe(value)}" for name, value in kwargs.items())
    return Guess((), f"Inputs {words}, from its configuration.", kwargs)


def _tokens(sizes: list[Any]) -> torch.Tensor:
    return torch.randint(3, max(_number(sizes, "vocab_size", 100), 8), (1, 16))


def _number(sizes: list[Any], name: str, default: int) -> int:
    found = next((getattr(each, name) for each in sizes if isinstance(getattr(each, name, None), int)), default)
    return int(found)


def _image_size(sizes: list[Any]) -> tuple[int, int]:
    for each in sizes:
        size = getattr(each, "image_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, (list, tuple)) and len(size) >= 2:
            return int(size[-2]), int(size[-1])
    return 224, 224
