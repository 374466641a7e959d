"""The preset ``deepseek-ocr``: the real ``DeepSeekOCREncoder`` of the installed package, fed as users feed it.

The class overrides ``__call__`` and has no ``forward``, so it is entered through ``encode``. Its towers
are made from transformers' own SAM and CLIP with random weights unless a checkpoint is asked for.
"""

from __future__ import annotations

import importlib
import inspect
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from gradscope.errors import NotAnalysedError, UsageError
from gradscope.session import Remedy
from gradscope.targets.deepseek_towers import build_towers, load_checkpoint
from gradscope.targets.inputs import default_page, describe, make_input, parse_input
from gradscope.targets.request import Request
from gradscope.tracing.subject import Built, Subject, Workshop

__all__ = ["build_towers", "preset"]

PACKAGE = "deepseek-ocr-encoder"
HEAD_WIDTH = 1280
REMEDY = Remedy(
    before="encoder.encode(image)   no gradient to sam, clip_pre, clip_tr, image",
    after="DifferentiableEncoder(encoder)(image)   gradient to all, same tokens",
    code=(
        "from gradscope.fix.deepseek_ocr import DifferentiableEncoder\n"
        'encoder = DifferentiableEncoder(encoder, trainable="all")\n'
        "tokens = encoder(image)  # [B, N, 1024], with gradient"
    ),
)


def preset(request: Request) -> Subject:
    """Return the subject for a request.

    Raises:
        UsageError: the package is not installed, or the input is not an image or a ``[B, 3, H, W]`` tensor.
    """
    encoder_class = _encoder_class()
    image = _image(request)
    described = (describe(image),)
    if request.fixed:
        entry = "forward"
    elif isinstance(image, torch.Tensor) and not _takes_tensors(encoder_class):
        entry = "_forward_core"
    else:
        entry = "encode"

    def prepare(workshop: Workshop) -> nn.Module:
        if request.weights is not None:
            loaded = load_checkpoint(request.weights, dtype=workshop.dtype)
            return workshop.materialise(lambda filled: loaded)
        return workshop.materialise(lambda filled: build_towers("full", seed=request.seed, initialise=filled))

    def build(workshop: Workshop, towers: nn.Module) -> Built:
        return _build(encoder_class, workshop, towers, image, entry, request)

    return Subject(
        name="deepseek-ocr",
        entry=entry,
        prepare=prepare,
        build=build,
        inputs=described,
        remedy=None if request.fixed else REMEDY,
        remarks=_remarks(request, entry, image),
        # Pinning needs a driver; it moves no number. Nothing else of the package is changed.
        absorbed=frozenset() if torch.cuda.is_available() else frozenset({"pin_memory"}),
    )


# --- the parts -------------------------------------------------------------------------------------


def _encoder_class() -> type[nn.Module]:
    try:
        module = importlib.import_module("deepseek_ocr_encoder")
    except ImportError as error:
        raise UsageError(
            f"The package {PACKAGE} is not usable here: {error}.",
            hint="Install it: pip install 'torch-gradscope[deepseek-ocr]'.",
        ) from error
    found: type[nn.Module] = module.DeepSeekOCREncoder
    return found


def _takes_tensors(encoder_class: type[nn.Module]) -> bool:
    return "skip_default_preprocessing" in inspect.signature(encoder_class).parameters


def _image(request: Request) -> Any:
    if len(request.inputs) > 1:
        raise UsageError("deepseek-ocr takes one image.", hint="Give `--input` once.")
    if not request.inputs:
        return default_page()
    image = make_input(parse_input(request.inputs[0]), seed=request.seed)
    if isinstance(image, torch.Tensor):
        if image.dim() != 4 or image.shape[1] != 3 or not image.is_floating_point():
            raise UsageError(
                f"deepseek-ocr takes a float tensor [B, 3, H, W], and {describe(image)} is none.",
                hint="For example `--input 1x3x512x512`, or an image file.",
            )
        if image.shape[2] % 64 or image.shape[3] % 64 or min(image.shape) < 1:
            raise UsageError(
                f"Height and width must be multiples of 64 (16 by the patches, 4 by the compressor), "
                f"not {image.shape[2]}x{image.shape[3]}.",
                hint="For example `--input 1x3x512x512`.",
            )
    return image


def _build(
    encoder_class: type[nn.Module],
    workshop: Workshop,
    towers: nn.Module,
    image: Any,
    entry: str,
    request: Request,
) -> Built:
    options: dict[str, Any] = {"device": workshop.device, "dtype": workshop.dtype, "eager_to_device": False}
    tensor_path = isinstance(image, torch.Tensor)
    if tensor_path and _takes_tensors(encoder_class):
        options["skip_default_preprocessing"] = True
    try:
        encoder = encoder_class(towers, **options)
    except (AttributeError, TypeError) as error:
        raise NotAnalysedError(
            f"{encoder_class.__name__} cannot be built around {request.weights or 'these towers'}: {error}",
            hint="It takes a DeepSeek-OCR checkpoint: sam_model, and a vision_model with CLIP's parts.",
        ) from error
    inputs: dict[str, torch.Tensor] = {}
    argument = image
    if tensor_path:
        argument = workshop.tensor(image)
        inputs["input.0"] = argument
    model: nn.Module = encoder
    call = getattr(encoder, entry) if not request.fixed else None
    if call is None:
        from gradscope.fix.deepseek_ocr import DifferentiableEncoder

        model = DifferentiableEncoder(encoder, device=None)
        call = model.forward_features if tensor_path else model
    if request.head:
        model, call = _with_head(model, call, workshop)
    return Built(model=model, call=lambda: call(argument), inputs=inputs)


def _with_head(model: nn.Module, call: Any, workshop: Workshop) -> tuple[nn.Module, Any]:
    """Put a trainable layer behind the tokens, as a user who trains on them would."""
    head = workshop.materialise(lambda filled: nn.Linear(1024, HEAD_WIDTH))
    whole = nn.Module()
    for name, child in model.named_children():
        whole.add_module(name, child)
    whole.add_module("head", head)
    return whole, lambda image: head(call(image))


def _remarks(request: Request, entry: str, image: Any) -> tuple[str, ...]:
    remarks = []
    with suppress(PackageNotFoundError):
        remarks.append(f"{PACKAGE} {version(PACKAGE)}, entered at {entry}.")
    if request.weights is None:
        remarks.append("The weights are random: where gradients flow does not depend on them.")
    else:
        remarks.append(f"The weights are those of {request.weights}.")
    if not torch.cuda.is_available() and not request.fixed:
        remarks.append("pin_memory was passed over (it needs a CUDA driver and moves no number).")
    if entry == "_forward_core":
        remarks.append("This version takes tensors at _forward_core only, so encode was not entered.")
    if not request.inputs:
        remarks.append("The input is a page drawn by gradscope; give your own with --input page.png.")
    return tuple(remarks)
