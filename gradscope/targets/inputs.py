"""What is fed to a model: ``--input`` specifications to tensors and images."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from gradscope.errors import UsageError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
SHAPE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
FORMS = "Accepted: 1x3x512x512, 1x128:int64, pixels=1x3x64x64:bfloat16, page.png, tensor.pt."
TENSOR_SUFFIXES = (".pt", ".pth")


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One parsed ``--input``: a shape to fill with random values, or a file to read."""

    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    name: str = ""
    path: Path | None = None


def parse_input(text: str) -> InputSpec:
    """Parse one specification; an existing file wins over a shape of the same spelling.

    Raises:
        UsageError: neither a shape nor a file that is there.
    """
    path = Path(text)
    if path.is_file():
        return InputSpec(path=path)
    match = SHAPE.fullmatch(text)
    if match is None:
        raise UsageError(f"--input {text!r} is neither a file that exists nor a shape.", hint=FORMS)
    dtype = match["dtype"] or "float32"
    if dtype not in DTYPES:
        raise UsageError(f"--input {text!r} names an unknown dtype.", hint=f"Known: {', '.join(DTYPES)}.")
    shape = tuple(int(size) for size in match["shape"].split("x"))
    if 0 in shape:
        raise UsageError(f"--input {text!r} has a size of 0: there would be nothing to trace.", hint=FORMS)
    return InputSpec(shape=shape, dtype=dtype, name=match["name"] or "")


def make_input(spec: InputSpec, *, seed: int = 0) -> torch.Tensor | Image.Image:
    """Return the tensor or image of a specification; the global random state is left as it was.

    Raises:
        UsageError: the file is no image, no tensor, or holds NaN; or there is no room for the shape.
    """
    if spec.path is not None:
        is_tensor = spec.path.suffix.lower() in TENSOR_SUFFIXES
        return _load_tensor(spec.path) if is_tensor else _open_image(spec.path)
    import torch

    dtype: torch.dtype = getattr(torch, spec.dtype)
    generator = torch.Generator().manual_seed(seed)
    try:
        if dtype.is_floating_point:
            return torch.randn(spec.shape, generator=generator).to(dtype)
        return torch.randint(0, 2, spec.shape, generator=generator).to(dtype)
    except (RuntimeError, MemoryError, OverflowError) as error:  # the allocator's
        raise UsageError(
            f"--input {'x'.join(map(str, spec.shape))} does not fit into this machine's memory.",
            hint="Give a smaller one: gradients flow the same way.",
        ) from error


def describe(value: Any) -> str:
    """Return an input in words: ``1x3x512x512:float32`` or ``image 1240x1754``."""
    if isinstance(value, Image.Image):
        return f"image {value.width}x{value.height}"
    shape = "x".join(str(size) for size in value.shape) or "scalar"
    return f"{shape}:{str(value.dtype).removeprefix('torch.')}"


def default_page(width: int = 1024, height: int = 1024) -> Image.Image:
    """Return a white page with grey bars where text would be."""
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    for line, top in enumerate(range(height // 16, height - height // 16, height // 32)):
        right = width - width // 10 - (line * 97) % (width // 3)
        pen.rectangle((width // 10, top, right, top + height // 80), fill=(70, 70, 70))
    return page


# --- files -----------------------------------------------------------------------------------------


def _open_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image.convert("RGB")
    except (OSError, EOFError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise UsageError(
            f"{path} cannot be read as an image: {error}.", hint="Give a PNG or JPEG file. " + FORMS
        ) from error


def _load_tensor(path: Path) -> torch.Tensor:
    import torch

    try:
        loaded = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises a different class for every way a file can be wrong
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{path} cannot be loaded as a tensor: {first}", hint=FORMS) from error
    if not isinstance(loaded, torch.Tensor):
        raise UsageError(f"{path} holds {type(loaded).__name__}, not a tensor.", hint=FORMS)
    if loaded.is_floating_point() and bool(loaded.isnan().any()):
        raise UsageError(f"{path} holds NaN.", hint="A gradient through NaN says nothing; clean the input.")
    return loaded
