"""The fixer on a GPU: the full forward, every gradient, and the same tokens. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
package = pytest.importorskip("deepseek_ocr_encoder")

from PIL import Image  # noqa: E402

import gradscope  # noqa: E402
from gradscope.fix.deepseek_ocr import DifferentiableEncoder  # noqa: E402
from gradscope.targets.deepseek_ocr import build_towers  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Sum in the same order each time, and in full precision: two ways are compared."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True
    torch.use_deterministic_algorithms(False)


def gradients(call: Any, encoder: Any, pixels: Any) -> dict[str, Any]:
    encoder.zero_grad()
    pixels = pixels.clone().requires_grad_()
    tokens = call(pixels)
    tokens.square().sum().backward()
    found = {"tokens": tokens.detach(), "pixels": pixels.grad}
    return found | {name: each.grad.clone() for name, each in encoder.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("checkpoint", ["none", "sam", "all"])
@pytest.mark.parametrize("size", [(256, 256), (320, 448)])
def test_outputs_and_every_gradient_equal_the_undecorated_path(size: tuple[int, int], checkpoint: str) -> None:
    towers = build_towers("tiny", dtype=torch.float64).cuda()
    encoder = package.DeepSeekOCREncoder(towers, device="cuda", dtype=torch.float64, freeze=False)
    fixed = DifferentiableEncoder(encoder, checkpoint=checkpoint)
    pixels = torch.rand(2, 3, *size, dtype=torch.float64, device="cuda")
    undecorated = gradients(lambda x: package.DeepSeekOCREncoder._forward_core.__wrapped__(encoder, x), encoder, pixels)
    ours = gradients(fixed.forward_features, encoder, pixels)
    assert ours.keys() == undecorated.keys()
    for name, reference in undecorated.items():
        scale = undecorated[name.replace("k_proj.bias", "q_proj.bias")].abs().max()
        assert (ours[name] - reference).abs().max() <= 1e-9 * scale, name


def test_a_page_goes_through_at_full_size_and_gives_the_tokens_of_the_package() -> None:
    encoder = package.DeepSeekOCREncoder(
        build_towers("full", dtype=torch.bfloat16), dtype=torch.bfloat16, device="cuda"
    )
    page = Image.effect_noise((1024, 1024), 60).convert("RGB")
    fixed = DifferentiableEncoder(encoder, trainable="all")
    with torch.no_grad():  # with a gradient to keep, torch attends by another kernel
        assert torch.equal(fixed(page), encoder.encode(page))
    tokens = fixed(page)
    assert tokens.device.type == "cuda" and tokens.shape == (1, 256, 1024)
    tokens.float().sum().backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in fixed.parameters())


def test_towers_on_the_cpu_move_to_the_gpu() -> None:
    encoder = package.DeepSeekOCREncoder(build_towers("tiny"), device="cpu", dtype=torch.float32)
    fixed = DifferentiableEncoder(encoder)
    assert {each.device.type for each in (*fixed.parameters(), *fixed.buffers())} == {"cuda"}
    assert fixed(torch.rand(3, 128, 128)).device.type == "cuda"


@pytest.mark.parametrize("mode", ["structural", "real"])
def test_the_package_is_blocked_on_the_gpu_too_and_the_fixer_flows(mode: str) -> None:
    encoder = package.DeepSeekOCREncoder(build_towers("tiny"), device="cuda", dtype=torch.float32, freeze=False)
    page = Image.effect_noise((1024, 1024), 60).convert("RGB")
    session = gradscope.trace(encoder.encode, page, mode=mode)
    assert session.verdict == "blocked" and session.fix_verified
    assert [(each.rule, each.function.rpartition(".")[2]) for each in session.findings if each.severity == "error"] == [
        ("GS101", "encode"), ("GS101", "_forward_core")
    ]  # fmt: skip
    assert gradscope.trace(DifferentiableEncoder(encoder), page, mode=mode).verdict == "flows"
