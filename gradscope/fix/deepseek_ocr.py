"""The reference fixer: DeepSeek-OCR's encoder with its gradient, around an existing encoder.

``DeepSeekOCREncoder`` decorates every compute method with ``@torch.inference_mode()``. Its parts
(``sam``, ``clip_pre``, ``clip_tr``) are plain modules: this module runs them undecorated, as
``sam -> flatten -> + position -> clip_pre -> clip_tr -> tokens + x``.
"""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from gradscope.errors import UsageError

Images: TypeAlias = "torch.Tensor | Image.Image | str | os.PathLike[str] | Sequence[Image.Image | str | os.PathLike[str]]"
Checkpoint: TypeAlias = Literal["none", "sam", "all"]

# The package's defaults (its own code) and DeepSeek's (processor_config.json: 0.5/0.5).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NORMALIZATIONS = {"package": (CLIP_MEAN, CLIP_STD), "official": ((0.5,) * 3, (0.5,) * 3)}
PAGE_SIZE = 1024
PDF_SCALE = 2.0


class DifferentiableEncoder(nn.Module):
    """A ``DeepSeekOCREncoder`` whose tokens carry a gradient to pixels, SAM and CLIP.

    The towers are shared, not copied, and the given encoder keeps working as before.

    Args:
        encoder: a ``DeepSeekOCREncoder`` of package version 0.1 or 1.0.
        trainable: ``keep`` leaves every ``requires_grad`` as it is, ``all`` and ``none`` set it, anything
            else is a pattern on parameter names (``clip_tr.*``) and trains what matches.
        train_positions: make the CLIP position table a parameter of this module.
        normalization: ``package`` (what the encoder does) or ``official`` (DeepSeek's 0.5/0.5).
        device: ``auto`` moves the shared towers to CUDA or MPS where there is one; None leaves them.
        checkpoint: recompute the blocks of ``sam``, or of both towers (``all``), in backward.
        compile: run ``forward_features`` through ``torch.compile``.

    Raises:
        UsageError: an unknown option value, a pattern that matches nothing, or towers that were built
            under inference mode and can never train.
    """

    position_table: torch.Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        trainable: str = "keep",
        train_positions: bool = False,
        normalization: Literal["package", "official"] = "package",
        device: str | torch.device | None = "auto",
        checkpoint: Checkpoint = "none",
        compile: bool = False,
    ) -> None:
        super().__init__()
        _require_choice("normalization", normalization, tuple(NORMALIZATIONS))
        _require_choice("checkpoint", checkpoint, ("none", "sam", "all"))
        _refuse_inference_parameters(encoder)
        self.sam: nn.Module = encoder.sam
        self.clip_pre: nn.Module = encoder.clip_pre
        self.clip_tr: nn.Module = encoder.clip_tr
        self.normalization = normalization
        self.checkpoint = checkpoint
        self._package_preprocess = getattr(encoder, "_preproc_1024", None)
        # A clone: the encoder's own table may be an inference tensor, or shared with its caches.
        table = _plain_copy(encoder.clip_pos_table)
        if train_positions:
            self.position_table = nn.Parameter(table)
        else:
            self.register_buffer("position_table", table, persistent=False)
        self._set_trainable(trainable)
        target = _accelerator() if device == "auto" else device
        self.to(self.weight_device if target is None else target)
        self._features = torch.compile(self._run_towers) if compile else self._run_towers

    @property
    def weight_device(self) -> torch.device:
        """The device of the towers."""
        return next(self.sam.parameters()).device

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the towers."""
        return next(self.sam.parameters()).dtype

    def forward(self, images: Images) -> torch.Tensor:
        """Return tokens ``[B, N, 1024]`` for images of any accepted kind, with gradient."""
        return self.forward_features(self.preprocess(images))

    def preprocess(self, images: Images) -> torch.Tensor:
        """Return normalised pixels ``[B, 3, H, W]`` on the towers' device and dtype.

        PIL images, paths and pages of a PDF become 1024x1024 as the package does it. Tensors (uint8,
        or float in 0..1, ``[3, H, W]`` or ``[B, 3, H, W]``) keep their size and their gradient.

        Raises:
            UsageError: an image that cannot be read, an empty list, a tensor of another shape, or NaN.
        """
        if isinstance(images, torch.Tensor):
            return self._normalise(self._place(_pixel_batch(images)))
        pages = list(_open_pages(images))
        if not pages:
            raise UsageError("There is no image in the list.", hint="Give at least one.")
        if self.normalization == "package" and self._package_preprocess is not None:
            batch = torch.stack([self._package_preprocess(page) for page in pages])
            return self._place(batch)
        batch = torch.stack([_squashed(page) for page in pages])
        return self._place(self._normalise(batch))

    def forward_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return tokens ``[B, N, 1024]`` for normalised pixels ``[B, 3, H, W]``.

        Equal to the package's undecorated ``_forward_core``.
        """
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
            raise UsageError(f"Pixels must be [B, 3, H, W], not {list(pixel_values.shape)}.")
        tokens: torch.Tensor = self._features(self._place(pixel_values))
        return tokens

    # --- the towers -------------------------------------------------------------------------

    def _run_towers(self, pixels: torch.Tensor) -> torch.Tensor:
        with self._checkpointed():
            features = self.sam(pixels)
            tokens = features.flatten(2).transpose(1, 2).contiguous()
            x = tokens + self._positions(features.shape[2], features.shape[3], tokens)
            x = self.clip_pre(x)
            x = self.clip_tr(x)
        return tokens + x

    def _positions(self, height: int, width: int, like: torch.Tensor) -> torch.Tensor:
        """Return the position tokens ``[1, height * width, 1024]``; nothing is cached."""
        table = self.position_table
        grid = math.isqrt(table.shape[0] - 1)
        square = table[1 : 1 + grid * grid].view(grid, grid, -1).permute(2, 0, 1).unsqueeze(0)
        if (height, width) != (grid, grid):
            square = F.interpolate(square, size=(height, width), mode="bicubic", align_corners=False)
        return square.flatten(2).transpose(1, 2).contiguous().to(like.dtype)

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Recompute repeated blocks in backward; the modules are as before when the block ends."""
        towers = {"none": [], "sam": [self.sam], "all": [self.sam, self.clip_tr]}[self.checkpoint]
        with ExitStack() as stack:
            if torch.is_grad_enabled():
                for tower in towers:
                    _warm_scripted_functions(tower)
                    for block in _repeated_blocks(tower):
                        stack.enter_context(_recomputed(block))
            yield

    # --- set-up and pixels ------------------------------------------------------------------

    def _set_trainable(self, trainable: str) -> None:
        if trainable == "keep":
            return
        matched = 0
        for name, parameter in self.named_parameters():
            if name == "position_table":
                continue
            wanted = trainable == "all" or (trainable != "none" and fnmatch.fnmatchcase(name, trainable))
            parameter.requires_grad_(wanted)
            matched += wanted
        if not matched and trainable not in ("all", "none"):
            raise UsageError(
                f"trainable={trainable!r} matches no parameter.",
                hint="Names look like sam.neck.*, clip_pre.weight, clip_tr.*.",
            )

    def _place(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.to(device=self.weight_device, dtype=self.weight_dtype)

    def _normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        mean, std = (
            torch.tensor(values, device=pixels.device, dtype=pixels.dtype).view(3, 1, 1)
            for values in NORMALIZATIONS[self.normalization]
        )
        return (pixels - mean) / std


# --- towers ----------------------------------------------------------------------------------------


def _repeated_blocks(tower: nn.Module) -> list[nn.Module]:
    """Return the members of the longest module list of the tower (its transformer blocks)."""
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    lists += [module for module in tower.modules() if isinstance(module, nn.Sequential)]
    longest = max(lists, key=len, default=nn.ModuleList())
    return list(longest)


@contextmanager
def _recomputed(block: nn.Module) -> Iterator[None]:
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return run_checkpointed(original, *args, use_reentrant=False, **kwargs)

    with mock.patch.object(block, "forward", forward):
        yield


def _warm_scripted_functions(tower: nn.Module) -> None:
    """Call every scripted function that the tower's code names once, on one number.

    The first call of a TorchScript function saves other tensors for backward than the later ones;
    non-reentrant checkpointing pairs them by position and gives a wrong gradient without a word.
    """
    scripted: dict[int, torch.jit.ScriptFunction[Any, Any]] = {}
    for module in tower.modules():
        named = getattr(type(module).forward, "__globals__", {}).values()
        for value in [*named, *module.__dict__.values()]:
            if isinstance(value, torch.jit.ScriptFunction):
                scripted[id(value)] = value
    for function in scripted.values():
        if len(list(function.graph.inputs())) == 1:
            with torch.enable_grad():
                function(torch.zeros(1, requires_grad=True))


# --- set-up ----------------------------------------------------------------------------------------


def _require_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{option}={value!r} is not known.", hint=f"Choose one of {', '.join(choices)}.")


def _refuse_inference_parameters(encoder: nn.Module) -> None:
    for name, parameter in encoder.named_parameters():
        if parameter.is_inference():
            raise UsageError(
                f"The encoder's parameter {name} is an inference tensor: it can never be trained.",
                hint="Build the encoder outside torch.inference_mode().",
            )


def _plain_copy(table: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return table.detach().clone()


def _accelerator() -> torch.device | None:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else None


# --- pixels ----------------------------------------------------------------------------------------


def _pixel_batch(images: torch.Tensor) -> torch.Tensor:
    if images.dim() not in (3, 4) or images.shape[-3] != 3 or 0 in images.shape:
        raise UsageError(
            f"An image tensor must be [3, H, W] or [B, 3, H, W], not {list(images.shape)}.",
            hint="Add the channel axis, or repeat a grey page three times.",
        )
    if images.dtype == torch.uint8:
        images = images.to(torch.float32) / 255
    elif not images.is_floating_point():
        raise UsageError(f"An image tensor must be uint8 or float, not {images.dtype}.")
    elif type(images) in (torch.Tensor, nn.Parameter) and bool(images.isnan().any()):
        raise UsageError("The image tensor holds NaN.", hint="Its gradient would be NaN everywhere.")
    return images if images.dim() == 4 else images.unsqueeze(0)


def _open_pages(images: Any) -> Iterator[Image.Image]:
    if isinstance(images, Image.Image):
        if 0 in images.size:
            raise UsageError(f"The image is {images.width}x{images.height}: it has no pixels.")
        yield images.convert("RGB")
    elif isinstance(images, (str, os.PathLike)):
        path = Path(images)
        if path.suffix.lower() == ".pdf":
            yield from _pdf_pages(path)
        else:
            yield _open_image(path)
    elif isinstance(images, Sequence):
        for item in images:
            yield from _open_pages(item)
    else:
        raise UsageError(
            f"{type(images).__name__} is no image.", hint="Give a PIL image, a path, a tensor, or a list of these."
        )


def _open_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise UsageError(f"There is no file {path}.") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise UsageError(f"{path} cannot be read as an image: {error}.") from error


def _pdf_pages(path: Path) -> Iterator[Image.Image]:
    try:
        import pymupdf
    except ImportError as error:
        raise UsageError("Reading a PDF needs PyMuPDF.", hint="pip install 'torch-gradscope[pdf]'.") from error
    try:
        document = pymupdf.open(path)
    except Exception as error:  # PyMuPDF raises classes of its own for each kind of damage
        raise UsageError(f"{path} cannot be read as a PDF: {error}.") from error
    with document:
        for page in document:
            pixels = page.get_pixmap(matrix=pymupdf.Matrix(PDF_SCALE, PDF_SCALE), alpha=False)
            yield Image.frombytes("RGB", (pixels.width, pixels.height), pixels.samples)


def _squashed(page: Image.Image) -> torch.Tensor:
    from torchvision.transforms import functional
    from torchvision.transforms.functional import InterpolationMode

    size = [PAGE_SIZE, PAGE_SIZE]
    resized = functional.resize(page, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    pixels: torch.Tensor = functional.to_tensor(resized)
    return pixels
