"""The fixer against the package's own undecorated path, on transformers' towers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
package = pytest.importorskip("deepseek_ocr_encoder")

from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from gradscope.errors import UsageError  # noqa: E402
from gradscope.fix.deepseek_ocr import DifferentiableEncoder  # noqa: E402
from gradscope.targets.deepseek_ocr import build_towers  # noqa: E402

Encoder = package.DeepSeekOCREncoder
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}
SIZES = [(256, 256), (512, 512), (320, 448)]


def make(dtype: Any = torch.float32, size: Any = "tiny", **options: Any) -> Any:
    return Encoder(build_towers(size, dtype=dtype), device="cpu", dtype=dtype, **options)


def fixer(encoder: Any, **options: Any) -> DifferentiableEncoder:
    """Leave the towers on the CPU, also where there is a GPU: the two ways are compared, and that one does not move."""
    return DifferentiableEncoder(encoder, device=None, **options)


def pixels(*size: int, batch: int = 1, dtype: Any = torch.float32, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64).to(dtype)


def oracle(encoder: Any) -> Any:
    return lambda x: type(encoder)._forward_core.__wrapped__(encoder, x)


def relative(value: Any, reference: Any) -> float:
    return float((value - reference).abs().max() / reference.abs().max())


def run(call: Any, module: nn.Module, x: Any) -> tuple[Any, dict[str, Any]]:
    """Return the output and the gradients of pixels and every tower parameter."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    (y * weights).sum().backward()
    gradients = {"pixels": x.grad}
    gradients |= {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return y.detach(), gradients


def assert_same(ours: Any, reference: Any, tolerance: float) -> None:
    assert relative(ours[0], reference[0]) <= tolerance
    assert ours[1].keys() == reference[1].keys()
    for name, gradient in reference[1].items():
        if name.endswith("k_proj.bias"):  # zero but for rounding: softmax ignores a shift of all keys
            scale = reference[1][name.replace("k_proj", "q_proj")].abs().max()
            assert (ours[1][name] - gradient).abs().max() <= tolerance * scale, name
            continue
        assert gradient.abs().max() > 0, name
        assert relative(ours[1][name], gradient) <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_outputs_and_every_gradient_equal_the_undecorated_path(size: Any, freeze: bool, dtype: Any) -> None:
    encoder = make(dtype, freeze=freeze)
    fixed = fixer(encoder)
    x = pixels(*size, batch=2, dtype=dtype)
    reference = run(oracle(encoder), encoder, x)
    ours = run(fixed.forward_features, fixed, x)
    assert len(ours[1]) == (1 if freeze else 1 + len(list(encoder.parameters())))
    assert_same(ours, reference, TOLERANCE[dtype])
    assert_same(run(fixed.forward_features, fixed, x), ours, 0.0)


def test_full_size() -> None:
    encoder = make(size="full", freeze=False)
    fixed = fixer(encoder)
    x = pixels(256, 256)
    assert_same(run(fixed.forward_features, fixed, x), run(oracle(encoder), encoder, x), 2e-5)


def test_finite_difference_along_a_direction(monkeypatch: Any) -> None:
    # transformers 4.47 drops to float32 in SAM (softmax, norm), which would drown the difference.
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: x.softmax(dim))
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    fixed = fixer(make(torch.float64))
    x = pixels(128, 192, dtype=torch.float64).requires_grad_()
    direction = pixels(128, 192, dtype=torch.float64, seed=2)
    loss = lambda value: fixed.forward_features(value).square().sum()  # noqa: E731
    loss(x).backward()
    step = 1e-5
    with torch.no_grad():
        slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert float((x.grad * direction).sum()) == pytest.approx(float(slope), rel=1e-6)


def test_the_encoder_is_left_as_it_was(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    encoder = make()
    image = Image.effect_noise((90, 70), 60).convert("RGB")
    before = encoder.encode(image).clone()
    attributes = {name: id(value) for name, value in vars(encoder).items()}
    flags = [p.requires_grad for p in encoder.parameters()]
    for mode in ("none", "all"):
        fixed = fixer(encoder, checkpoint=mode)
        x = pixels(128, 128).requires_grad_()
        fixed.forward_features(x).sum().backward()
    assert {name: id(value) for name, value in vars(encoder).items()} == attributes
    assert encoder._pos_cache == {}
    assert [p.requires_grad for p in encoder.parameters()] == flags
    assert not [m for m in encoder.modules() if "forward" in vars(m)]
    assert torch.equal(encoder.encode(image), before)
    assert fixed.sam is encoder.sam and fixed.clip_tr is encoder.clip_tr
    assert relative(fixed(image).detach(), before) <= 2e-5


@pytest.mark.parametrize("trainable", ["keep", "all", "none", "clip_tr.*"])
def test_trainable(trainable: str) -> None:
    encoder = make(freeze=False)
    fixed = fixer(encoder, trainable=trainable)
    expected = {"keep": lambda n: True, "all": lambda n: True, "none": lambda n: False}
    wanted = expected.get(trainable, lambda n: n.startswith("clip_tr."))
    assert all(p.requires_grad == wanted(name) for name, p in fixed.named_parameters())
    assert fixer(make(freeze=True)).sam.net_2.weight.requires_grad is False


@pytest.mark.parametrize("size", [(256, 256), (1024, 1024)])
def test_positions_can_be_trained(size: Any) -> None:
    encoder = make(torch.float64)
    frozen = fixer(encoder)
    assert "position_table" in dict(frozen.named_buffers())
    fixed = fixer(encoder, train_positions=True)
    assert dict(fixed.named_parameters())["position_table"].requires_grad
    x = pixels(*size, dtype=torch.float64)
    fixed.forward_features(x).square().sum().backward()
    assert fixed.position_table.grad[1:].abs().max() > 0
    assert not fixed.position_table.grad[0].any()
    with torch.no_grad():
        fixed.position_table.add_(fixed.position_table.grad)
    assert relative(fixed.forward_features(x).detach(), oracle(encoder)(x).detach()) > 1e-3


class Scripted(nn.Module):
    """DeepSeek's quick_gelu: scripted, and cold until its first call."""

    def __init__(self) -> None:
        super().__init__()
        unit = torch.jit.CompilationUnit("def quick_gelu(x):\n    return x * torch.sigmoid(1.702 * x)\n")
        self.calls = [unit.quick_gelu]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.calls[0](x)


def cold(encoder: Any) -> Any:
    for layer in encoder.clip_tr.layers:
        layer.mlp.activation_fn = Scripted()
    return encoder


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("mode", ["sam", "all"])
def test_checkpointing_gives_the_same_gradients(mode: str, scripted: bool) -> None:
    x = pixels(256, 256, dtype=torch.float64)
    plain = make(torch.float64, freeze=False)
    reference = run(oracle(plain), plain, x)
    encoder = make(torch.float64, freeze=False)
    fixed = fixer(cold(encoder) if scripted else encoder, checkpoint=mode)
    for _ in range(2):
        assert_same(run(fixed.forward_features, fixed, x), reference, 1e-9)


def test_plain_checkpointing_of_a_cold_script_is_wrong() -> None:
    """What the fixer has to avoid; if torch ever repairs it, the warm-up can go."""
    x = pixels(256, 256, dtype=torch.float64)
    plain = make(torch.float64, freeze=False)
    reference = run(oracle(plain), plain, x)
    encoder = cold(make(torch.float64, freeze=False))
    for layer in encoder.clip_tr.layers:
        inner = layer.forward
        layer.forward = lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=False, **k)
    wrong = run(oracle(encoder), encoder, x)
    assert relative(wrong[1]["pixels"], reference[1]["pixels"]) > 1e-3


def test_checkpointing_keeps_less() -> None:
    kept = {}
    for mode in ("none", "sam", "all"):
        fixed = fixer(make(), checkpoint=mode)
        weights = {p.untyped_storage().data_ptr() for p in fixed.parameters()}
        total = [0]

        def pack(tensor: Any, total: Any = total, weights: Any = weights) -> Any:
            if tensor.untyped_storage().data_ptr() not in weights:
                total[0] += tensor.numel()
            return tensor

        x = pixels(256, 256).requires_grad_()
        fixed.forward_features(x).sum().backward()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            fixed.forward_features(x)
        kept[mode] = total[0]
    assert kept["all"] < kept["sam"] < kept["none"] / 2


def test_a_first_call_in_inference_mode_poisons_nothing() -> None:
    encoder = make(freeze=False)
    with torch.inference_mode():
        encoder._forward_core(pixels(256, 256))
        fixed = fixer(encoder, train_positions=True)
        inferred = fixed.forward_features(pixels(256, 256))
    assert inferred.is_inference() and not fixed.position_table.is_inference()
    x = pixels(256, 256)
    ours = run(fixed.forward_features, fixed, x)
    assert "position_table" in ours[1] and "sam.patch_embed.weight" in ours[1]
    with torch.inference_mode():
        made_there = pixels(256, 256)
    fixed.forward_features(made_there).sum().backward()


def test_an_encoder_built_in_inference_mode() -> None:
    towers = build_towers("tiny")
    with torch.inference_mode():
        encoder = Encoder(towers, device="cpu", dtype=torch.float32, eager_to_device=False, freeze=False)
    fixed = fixer(encoder)
    run(fixed.forward_features, fixed, pixels(256, 256))
    with torch.inference_mode():
        poisoned = Encoder(build_towers("tiny"), device="cpu", dtype=torch.float32)
    with pytest.raises(UsageError, match=r"inference tensor.*outside"):
        fixer(poisoned)


def test_dtype_autocast_channels_last_and_copies() -> None:
    fixed = fixer(make())
    x = pixels(256, 256)
    with torch.no_grad():
        expected = fixed.forward_features(x)
        assert relative(fixed.forward_features(x.to(memory_format=torch.channels_last)), expected) <= 2e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(fixed.forward_features(x).float(), expected) <= 6e-2
        double = copy.deepcopy(fixed).double().forward_features(x)
        assert double.dtype == torch.float64 and relative(double, expected.double()) <= 2e-5
        half = copy.deepcopy(fixed).to(torch.bfloat16).forward_features(x)
        assert half.dtype == torch.bfloat16 and relative(half.float(), expected) <= 6e-2


def test_compiled(monkeypatch: Any) -> None:
    real, made = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f: made.append(f) or real(f, backend="aot_eager"))
    encoder = make(freeze=False)
    fixed = fixer(encoder, compile=True)
    assert not made
    x = pixels(128, 128)
    assert_same(run(fixed.forward_features, fixed, x), run(oracle(encoder), encoder, x), 2e-5)
    assert len(made) == 1


@pytest.mark.usefixtures("pretended_cuda")
@pytest.mark.parametrize("stray", [False, True])
def test_everything_runs_on_the_accelerator(stray: bool) -> None:
    """Fake CUDA tensors: an operation that mixes in a CPU tensor raises."""
    encoder = make()
    with FakeTensorMode(allow_non_fake_inputs=False):
        for module in encoder.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                        held[name] = nn.Parameter(empty) if held is module._parameters else empty
        fixed = DifferentiableEncoder(encoder, device=None)
        if stray:
            fixed.position_table = torch.empty(257, 1024, device="cpu")
        image = torch.rand(1, 3, 256, 256, device="cpu").requires_grad_()
        values = fixed.preprocess(image)
        assert values.device.type == "cuda"
        if stray:
            with pytest.raises(RuntimeError, match="device"):
                fixed.forward_features(values)
            return
        tokens = fixed.forward_features(values)
        assert tokens.device.type == "cuda" and tokens.requires_grad
        assert fixed.preprocess(torch.zeros(3, 64, 64, dtype=torch.uint8)).device.type == "cuda"


# --- images ----------------------------------------------------------------------------------------


@pytest.fixture
def page() -> Image.Image:
    return Image.effect_noise((90, 70), 60).convert("RGB")


def test_images_are_prepared_as_the_package_does(page: Image.Image, tmp_path: Path) -> None:
    encoder = make()
    fixed = fixer(encoder)
    expected = encoder._preproc_1024(page).unsqueeze(0)
    path = tmp_path / "page.png"
    page.save(path)
    for given in (page, path, str(path), [path]):
        assert torch.equal(fixed.preprocess(given), expected)
    assert torch.equal(fixed.preprocess([page, path]), torch.cat([expected, expected]))
    official = fixer(encoder, normalization="official").preprocess(page)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in fixed._constants)
    assert torch.allclose(official, ((expected * std + mean) - 0.5) / 0.5, atol=1e-5)


def test_tensors_keep_their_size_and_their_gradient(page: Image.Image) -> None:
    import numpy

    encoder = make()
    fixed = fixer(encoder)
    square = page.resize((1024, 1024))
    whole = torch.from_numpy(numpy.array(square)).permute(2, 0, 1)
    expected = encoder._preproc_1024(square).unsqueeze(0)
    assert torch.allclose(fixed.preprocess(whole), expected, atol=1e-6)
    real = (whole / 255).requires_grad_()
    values = fixed.preprocess(real)
    assert torch.allclose(values, expected, atol=1e-6)
    values.sum().backward()
    assert torch.allclose(real.grad[0], torch.tensor(1 / 0.26862954).expand(1024, 1024))
    assert fixed.preprocess(torch.rand(2, 3, 64, 128)).shape == (2, 3, 64, 128)
    assert fixed.preprocess(torch.rand(3, 64, 128), resize=(128, 64)).shape == (1, 3, 128, 64)
    assert fixed(torch.rand(2, 3, 128, 192)).shape == (2, 6, 1024)


def test_every_page_of_a_pdf(tmp_path: Path, page: Image.Image) -> None:
    pytest.importorskip("pymupdf")
    path = tmp_path / "two.pdf"
    page.save(path, save_all=True, append_images=[page])
    assert fixer(make()).preprocess(path).shape == (2, 3, 1024, 1024)


BAD = [
    "0x0", "cannot be read as an image", "PDF", "no image file", "is no image", "empty", r"shape \(4, 5\)",
    r"shape \(4, 64, 64\)", "nothing in it", "NaN", "int64", "differ in size",
]  # fmt: skip


def bad_images(folder: Path) -> dict[str, Any]:
    (folder / "bad.png").write_bytes(b"\x89PNG no image")
    (folder / "bad.pdf").write_bytes(b"no pdf")
    return {
        "0x0": Image.new("RGB", (0, 0)),
        "cannot be read as an image": folder / "bad.png",
        "PDF": folder / "bad.pdf",
        "no image file": folder / "missing.png",
        "is no image": 3,
        "empty": [],
        r"shape \(4, 5\)": torch.zeros(4, 5),
        r"shape \(4, 64, 64\)": torch.zeros(4, 64, 64),
        "nothing in it": torch.zeros(1, 3, 0, 64),
        "NaN": torch.full((3, 64, 64), float("nan")),
        "int64": torch.zeros(3, 64, 64, dtype=torch.int64),
        "differ in size": [torch.zeros(3, 64, 64), torch.zeros(3, 64, 128)],
    }


@pytest.mark.parametrize("message", BAD)
def test_bad_images(message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        fixer(make())(bad_images(tmp_path)[message])
    assert "\n" not in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"trainable": "clipp.*"},
        {"normalization": "clip"},
        {"checkpoint": "some"},
        {"device": "nonsense"},
        {"compile": True, "checkpoint": "sam"},
    ],
)
def test_bad_options(options: Any) -> None:
    with pytest.raises(UsageError) as caught:
        DifferentiableEncoder(make(), **options)
    assert "\n" not in caught.value.message and caught.value.hint


def test_not_an_encoder() -> None:
    with pytest.raises(UsageError, match="Linear is not a DeepSeekOCREncoder"):
        DifferentiableEncoder(nn.Linear(1, 1))
