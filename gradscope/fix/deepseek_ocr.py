"""A differentiable way through ``DeepSeekOCREncoder``, whose own path runs in inference mode.

The package decorates both ``encode`` and ``_forward_core`` with ``torch.inference_mode``, detaches the
position table and pins memory, so no gradient reaches pixels or weights. ``DifferentiableEncoder`` runs
the same towers (shared, not copied) on the same numbers without any of it.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from gradscope.errors import UsageError
from gradscope.fix.checkpointing import blocks_to_checkpoint, checkpointing

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture: TypeAlias = "Image | str | os.PathLike[str] | torch.Tensor"

__all__ = ["DifferentiableEncoder"]

Constants: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]

CLIP: Constants = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
OFFICIAL: Constants = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NORMALIZATIONS = ("package", "official")
CHECKPOINTS = ("none", "sam", "all")
TOWERS = ("sam", "clip_pre", "clip_tr")
PAGE = (1024, 1024)
PDF_SCALE = 2.0
TENSOR_HINT = "Give [3, H, W] or [B, 3, H, W], uint8 or floating point in [0, 1]."


class DifferentiableEncoder(nn.Module):
    """``DeepSeekOCREncoder`` with gradients: the same weights and tokens, without inference mode.

    ``sam``, ``clip_pre`` and ``clip_tr`` are the encoder's own modules, so an optimizer step here changes
    the encoder too; its caches, attributes and methods are left alone. Not safe to run from two threads
    at once with ``checkpoint`` other than ``none`` (blocks are wrapped during the call only).

    Args:
        encoder: a ``DeepSeekOCREncoder`` (0.1.0 or 1.0.1).
        trainable: ``keep`` leaves every ``requires_grad`` as it is; ``all`` and ``none`` set it; anything
            else is a shell pattern on names such as ``clip_tr.*``: matches are trained, the rest frozen.
            The flags belong to the shared parameters, so the encoder sees them as well.
        train_positions: make ``position_table`` (``[1 + G * G, 1024]``, a copy of the encoder's) a parameter;
            otherwise it is a buffer without gradient. Independent of ``trainable``.
        normalization: ``package`` uses what the encoder was built with (CLIP's mean and standard deviation
            unless configured); ``official`` uses DeepSeek-OCR's own 0.5 and 0.5.
        device: ``auto`` moves the towers to CUDA, else MPS, else leaves them; ``None`` leaves them; a device
            moves them there. Moving is in place: the encoder's own ``encode`` still looks at its old
            ``device`` afterwards. Every tensor of a call is then on that device; the input moves once.
        checkpoint: recompute activations in the backward pass: of every block of SAM, or of CLIP too.
        compile: run ``forward_features`` through ``torch.compile``, from the first call on.

    Raises:
        UsageError: not such an encoder, an unknown option, weights made in inference mode, no device.
    """

    sam: nn.Module
    clip_pre: nn.Module
    clip_tr: nn.Module
    position_table: torch.Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        trainable: str = "keep",
        train_positions: bool = False,
        normalization: str = "package",
        device: str | torch.device | None = "auto",
        checkpoint: str = "none",
        compile: bool = False,
    ) -> None:
        super().__init__()
        _require_choice("normalization", normalization, NORMALIZATIONS)
        _require_choice("checkpoint", checkpoint, CHECKPOINTS)
        if compile and checkpoint != "none":
            raise UsageError(
                "compile=True and checkpoint cannot be combined.",
                hint="Choose one: the compiler decides itself what to recompute.",
            )
        table = _check_encoder(encoder)
        for name in TOWERS:
            setattr(self, name, getattr(encoder, name))
        # The encoder may have been built, and this may be called, in inference mode: clone out of it.
        with torch.inference_mode(False):
            own_table = table.detach().clone()
            if train_positions:
                self.position_table = nn.Parameter(own_table)
            else:
                self.register_buffer("position_table", own_table, persistent=False)
            self._blocks = blocks_to_checkpoint(self, checkpoint)
            self._set_trainable(trainable)
            _move(self, device)
        self.training = self.sam.training
        self._constants, self._transform = _preprocessing(encoder, normalization)
        self._compile = compile
        self._compiled: Callable[..., torch.Tensor] | None = None

    def forward(self, images: Picture | Sequence[Picture], *, resize: tuple[int, int] | None = None) -> torch.Tensor:
        """Return the tokens ``[B, N, 1024]`` of images; see ``preprocess`` for what images may be."""
        return self.forward_features(self.preprocess(images, resize=resize))

    def preprocess(self, images: Picture | Sequence[Picture], *, resize: tuple[int, int] | None = None) -> torch.Tensor:
        """Return normalised pixels ``[B, 3, H, W]`` in the device and dtype of the weights.

        Args:
            images: an image or a list of them: PIL images and paths (a PDF gives one image per page) go
                through the encoder's own transform, 1024x1024 by default. A tensor, ``[3, H, W]`` or
                ``[B, 3, H, W]``, uint8 or floating point in [0, 1], is normalised but keeps its size, with
                a gradient to floating point pixels. An encoder with ``skip_default_preprocessing`` takes
                tensors that are normalised already, and then they are only moved.
            resize: height and width for tensors, bicubic with antialiasing; images ignore it.

        Raises:
            UsageError: no image, an unreadable one, a wrong shape, NaN, or sizes that differ in one batch.
        """
        several = isinstance(images, (list, tuple))
        pictures: Sequence[Any] = images if several else (images,)  # type: ignore[assignment]
        if not pictures:
            raise UsageError("The list of images is empty.", hint="Give at least one image.")
        batches = [batch for picture in pictures for batch in self._batches(picture, resize)]
        if len({batch.shape[1:] for batch in batches}) > 1:
            sizes = sorted({f"{batch.shape[2]}x{batch.shape[3]}" for batch in batches})
            raise UsageError(
                f"The images of one batch differ in size: {', '.join(sizes)}.",
                hint="Pass resize=(height, width) for tensors, or call once per image.",
            )
        return batches[0] if len(batches) == 1 else torch.cat(batches)

    def forward_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the tokens ``[B, N, 1024]`` of normalised pixels ``[B, 3, H, W]``.

        Equal to the package's ``_forward_core``. The pixels are moved to the device and dtype of the
        weights; N is the number of cells of SAM's output (a cell is 64x64 pixels).

        Raises:
            UsageError: pixels of another shape, or a SAM whose output does not fit the position table.
        """
        _check_shape(pixel_values, dims=(4,))
        weight = self._weight
        pixels = _out_of_inference(pixel_values.to(device=weight.device, dtype=weight.dtype))
        if self._compile:
            if self._compiled is None:
                # The plain function, not the bound method: a deep copy of this module runs its own weights.
                self._compiled = torch.compile(DifferentiableEncoder._features)
            return self._compiled(self, pixels)
        if not self._blocks or not torch.is_grad_enabled():
            return self._features(pixels)
        with checkpointing(self._blocks):
            return self._features(pixels)

    @property
    def _weight(self) -> torch.Tensor:
        return next(iter(self.sam.parameters()))

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.sam(pixels)
        width = self.position_table.shape[1]
        if features.dim() != 4 or features.shape[1] != width:
            raise UsageError(
                f"SAM returned {tuple(features.shape)}, but CLIP needs [B, {width}, H, W].",
                hint="Use the towers of DeepSeek-OCR.",
            )
        tokens = features.flatten(2).transpose(1, 2).contiguous()
        positions = self._positions(features.shape[2], features.shape[3])
        encoded = self.clip_tr(self.clip_pre(tokens + positions))
        total: torch.Tensor = tokens + encoded
        return total

    def _positions(self, height: int, width: int) -> torch.Tensor:
        """Return the positions ``[1, height * width, 1024]``.

        Computed for every call: a cached one would be an inference tensor after a call in inference mode,
        would go stale with ``.to()``, and could not train.
        """
        side = math.isqrt(self.position_table.shape[0] - 1)
        grid = self.position_table[1:].view(side, side, -1).permute(2, 0, 1).unsqueeze(0)
        if (height, width) != (side, side):
            grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        return grid.flatten(2).transpose(1, 2).contiguous()

    def _set_trainable(self, trainable: str) -> None:
        if trainable == "keep":
            return
        named = [pair for pair in self.named_parameters() if pair[0] != "position_table"]
        pattern = {"all": "*", "none": ""}.get(trainable, trainable)
        chosen = {name for name, _ in named if fnmatchcase(name, pattern)}
        if not chosen and trainable != "none":
            raise UsageError(
                f"trainable={trainable!r} matches no parameter.",
                hint='Use "keep", "all", "none" or a pattern such as "clip_tr.*", "clip_pre.*", "sam.*".',
            )
        for name, parameter in named:
            parameter.requires_grad_(name in chosen)

    def _batches(self, picture: Any, resize: tuple[int, int] | None) -> Iterator[torch.Tensor]:
        """Yield pixels ``[B, 3, H, W]``, normalised and moved, of one argument."""
        weight = self._weight
        if isinstance(picture, torch.Tensor):
            yield self._normalised(_check_tensor(picture).to(weight.device), resize).to(weight.dtype)
            return
        if self._transform is None:
            raise UsageError(
                "The encoder was built with skip_default_preprocessing and takes no images.",
                hint='Pass a tensor, or build DifferentiableEncoder with normalization="official".',
            )
        for image in _open(picture):
            pixels = _check_tensor(self._transform(image))
            yield pixels.to(device=weight.device, dtype=weight.dtype)

    def _normalised(self, pixels: torch.Tensor, resize: tuple[int, int] | None) -> torch.Tensor:
        if pixels.dtype == torch.uint8:
            pixels = pixels.to(torch.float32) / 255
        elif pixels.dtype != torch.float64:
            pixels = pixels.to(torch.float32)
        if resize is not None:
            if len(resize) != 2 or min(resize) < 1:
                raise UsageError(f"resize={resize!r} is no size.", hint="Give (height, width), both above 0.")
            pixels = F.interpolate(pixels, size=resize, mode="bicubic", align_corners=False, antialias=True)
        if self._constants is None:
            return pixels
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in self._constants)
        return (pixels - mean) / std


# --- construction ----------------------------------------------------------------------------------


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name}={value!r} is unknown.", hint=f"Known: {', '.join(choices)}.")


def _check_encoder(encoder: nn.Module) -> torch.Tensor:
    """Return the encoder's position table ``[1 + G * G, C]``, or say why the encoder cannot be used."""
    missing = [name for name in (*TOWERS, "clip_pos_table") if not hasattr(encoder, name)]
    if missing:
        raise UsageError(
            f"{type(encoder).__name__} is not a DeepSeekOCREncoder: it has no {', '.join(missing)}.",
            hint="Pass an encoder of the package deepseek-ocr-encoder.",
        )
    table: torch.Tensor = encoder.clip_pos_table  # type: ignore[assignment]
    if table.dim() != 2 or math.isqrt(table.shape[0] - 1) ** 2 != table.shape[0] - 1:
        raise UsageError(
            f"The position table is {tuple(table.shape)}, not [1 + G * G, C].",
            hint="Use the towers of DeepSeek-OCR.",
        )
    for tower in TOWERS:
        module = getattr(encoder, tower)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_inference():
                raise UsageError(
                    f"{tower}.{name} is an inference tensor, so it can never be trained.",
                    hint="Rebuild the model and the encoder outside torch.inference_mode().",
                )
    return table


def _move(module: nn.Module, device: str | torch.device | None) -> None:
    if device is None:
        return
    if device == "auto":
        present = next(module.parameters()).device.type
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        wanted = next((kind for kind, available in there.items() if available), present)
        if wanted == present:  # already there: cuda:1 stays cuda:1
            return
        device = wanted
    try:
        module.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(
            f"device={str(device)!r} cannot be used: {reason}.", hint='Use "auto", None, "cpu" or "cuda".'
        ) from error


def _preprocessing(encoder: Any, normalization: str) -> tuple[Constants | None, Callable[[Image], torch.Tensor] | None]:
    """Return mean and standard deviation for tensors, and the transform for images."""
    if normalization == "official":
        return OFFICIAL, _official_transform
    transform = getattr(encoder, "_preproc_1024", None)
    if transform is None:
        return None, None
    configured = [step for step in getattr(transform, "transforms", ()) if hasattr(step, "mean")]
    constants = (tuple(configured[-1].mean), tuple(configured[-1].std)) if configured else CLIP
    # A partial, so that a transform that is a module does not become a submodule of this one.
    return constants, partial(transform)


def _official_transform(image: Image) -> torch.Tensor:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import normalize, resize, to_tensor

    resized = resize(image, list(PAGE), interpolation=InterpolationMode.BICUBIC, antialias=True)
    pixels: torch.Tensor = normalize(to_tensor(resized), *(list(values) for values in OFFICIAL))
    return pixels


# --- images ----------------------------------------------------------------------------------------


def _check_shape(pixels: torch.Tensor, *, dims: tuple[int, ...]) -> None:
    shape = tuple(pixels.shape)
    if pixels.dim() not in dims or shape[-3] != 3:
        raise UsageError(f"The image tensor has shape {shape}, not 3 channels by H by W.", hint=TENSOR_HINT)
    if 0 in shape:
        raise UsageError(f"The image tensor has shape {shape}: there is nothing in it.", hint=TENSOR_HINT)


def _check_tensor(pixels: torch.Tensor) -> torch.Tensor:
    """Return pixels as ``[B, 3, H, W]``."""
    _check_shape(pixels, dims=(3, 4))
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise UsageError(f"The image tensor is {pixels.dtype}.", hint=TENSOR_HINT)
    has_values = not isinstance(pixels, FakeTensor) and pixels.device.type != "meta"
    if has_values and pixels.is_floating_point() and not bool(pixels.detach().isfinite().all()):
        raise UsageError("The image tensor holds NaN or infinity.", hint="Clean the input first.")
    pixels = _out_of_inference(pixels)
    return pixels.unsqueeze(0) if pixels.dim() == 3 else pixels


def _out_of_inference(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that autograd may save, unless inference mode is on anyway."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def _open(picture: Any) -> Iterator[Image]:
    """Yield the RGB images of a PIL image or a path."""
    import PIL.Image

    if isinstance(picture, PIL.Image.Image):
        if 0 in picture.size:
            raise UsageError(f"The image is {picture.width}x{picture.height}.", hint="Give one with pixels.")
        yield picture.convert("RGB")
        return
    if not isinstance(picture, (str, os.PathLike)):
        raise UsageError(
            f"{type(picture).__name__} is no image.",
            hint="Give a PIL image, a path, a tensor, or a list of them.",
        )
    path = Path(os.fspath(picture))
    if not path.is_file():
        raise UsageError(f"There is no image file {path}.", hint="Check the path.")
    if path.suffix.lower() == ".pdf":
        yield from _pages(path)
        return
    try:
        with PIL.Image.open(path) as image:
            yield image.convert("RGB")
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise UsageError(f"{path} cannot be read as an image: {error}.", hint="Give a PNG or JPEG file.") from error


def _pages(path: Path) -> list[Image]:
    """Return the pages of a PDF as the package renders them, at 144 dots per inch."""
    import PIL.Image

    try:
        import pymupdf
    except ImportError as error:
        raise UsageError(f"{path} needs PyMuPDF.", hint="pip install pymupdf") from error
    try:
        with pymupdf.open(path) as document:
            scale = pymupdf.Matrix(PDF_SCALE, PDF_SCALE)
            rendered = [page.get_pixmap(matrix=scale).tobytes("png") for page in document]
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a PDF: {error}.", hint="Give a PDF without password.") from error
    if not rendered:
        raise UsageError(f"{path} has no pages.", hint="Give a PDF with pages.")
    return [PIL.Image.open(io.BytesIO(page)).convert("RGB") for page in rendered]
