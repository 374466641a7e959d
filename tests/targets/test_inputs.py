"""``--input`` specifications: what is accepted, and one clear sentence for what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from gradscope.errors import UsageError
from gradscope.targets.inputs import InputSpec, default_page, describe, make_input, parse_input


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("1x3x512x512", InputSpec((1, 3, 512, 512))),
        ("1x128:int64", InputSpec((1, 128), "int64")),
        ("pixels=1x3x64x64:bfloat16", InputSpec((1, 3, 64, 64), "bfloat16", "pixels")),
    ],
)
def test_shapes_are_parsed(text: str, spec: InputSpec) -> None:
    assert parse_input(text) == spec
    tensor = make_input(spec)
    assert isinstance(tensor, torch.Tensor)
    assert tuple(tensor.shape) == spec.shape
    assert tensor.dtype == getattr(torch, spec.dtype)


@pytest.mark.parametrize("text", ["", "3x", "x3", "1x0x3", "1x3:float13", "no-such-file.png", "-1x3"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_input(text)


def test_files_are_read(tmp_path: Path) -> None:
    Image.new("L", (30, 20)).save(tmp_path / "page.png")
    torch.save(torch.ones(1, 3, 64, 64), tmp_path / "x.pt")
    image = make_input(parse_input(str(tmp_path / "page.png")))
    assert describe(image) == "image 30x20"
    assert describe(make_input(parse_input(str(tmp_path / "x.pt")))) == "1x3x64x64:float32"


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    default_page(64, 64).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    torch.save({"a": 1}, tmp_path / "dict.pt")
    torch.save(torch.full((1, 3, 64, 64), float("nan")), tmp_path / "nan.pt")
    for name in ("cut.png", "bad.pt", "dict.pt", "nan.pt"):
        with pytest.raises(UsageError, match=name.replace(".", r"\.")):
            make_input(parse_input(str(tmp_path / name)))
