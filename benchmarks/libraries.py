"""Trace real libraries through their own way of being called, and ask a plain run beside each.

Small models with random weights, built by hand: nothing is downloaded. For each case: what gradscope says, what a
plain call followed by ``backward()`` says (which parameters have a ``.grad``), what is right and why, and whether the
two agree with it.

Run: ``python benchmarks/libraries.py [PATTERN ...]``. Needs sentence-transformers, segment-anything, diffusers,
open_clip_torch, transformers, torchvision, ultralytics, peft, torchdiffeq, performer-pytorch, lightning, torchmetrics,
captum, higher, gpytorch, pytorch-metric-learning, vector-quantize-pytorch and denoising-diffusion-pytorch; a case whose
library is missing is skipped and said.
"""

from __future__ import annotations

import fnmatch
import functools
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import gradscope
from gradscope.errors import GradscopeError
from gradscope.session import Session
from gradscope.tracing.holding import held_model


@dataclass
class Call:
    """One call of a library: what to trace, with what, and how to get a scalar out of the result."""

    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    entry: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A call with what is right about it: the verdict, and where the first error has to be."""

    build: Callable[[], Call]
    verdict: str
    place: str
    why: str


CASES: dict[str, Case] = {}


def case(verdict: str, place: str = "", why: str = "") -> Callable[[Callable[[], Call]], Callable[[], Call]]:
    """Register a case; ``place`` is ``RULE file function`` of the first finding, where there has to be one."""

    def register(build: Callable[[], Call]) -> Callable[[], Call]:
        CASES[build.__name__] = Case(build, verdict, place, why)
        return build

    return register


# --- sentence-transformers -----------------------------------------------------------------------------


@functools.cache
def sentence_model() -> Any:
    """Return a two-layer BERT with a word list of 30 words behind mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = Path(tempfile.mkdtemp())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the gradient does not arrive it is cut here".split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=64, max_position_embeddings=64)  # fmt: skip
    BertModel(config).save_pretrained(folder)
    transformer = Transformer(str(folder))
    return SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu")


ENCODE = "GS101 sentence_transformer/model.py SentenceTransformer.encode"


@case("blocked", ENCODE, "encode is decorated with inference_mode")
def sentence_encode_tensor() -> Call:
    return Call(sentence_model(), (["the gradient does not arrive"],), {"convert_to_tensor": True}, "encode")


@case("blocked", ENCODE, "and by default gives numpy arrays: nothing that torch could follow comes out")
def sentence_encode_numpy() -> Call:
    return Call(sentence_model(), (["the gradient does not arrive"],), {}, "encode")


@case("flows", "", "forward is the way to train it")
def sentence_forward() -> Call:
    model = sentence_model()
    return Call(model, (dict(model.tokenize(["the gradient does not arrive"])),))


# --- segment-anything ----------------------------------------------------------------------------------


@functools.cache
def sam() -> Any:
    """Return SAM with an image side of 64 and two blocks."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    encoder = ImageEncoderViT(
        depth=2, embed_dim=32, img_size=64, mlp_ratio=2, num_heads=2, patch_size=16, qkv_bias=True, use_rel_pos=True,
        global_attn_indexes=(1,), window_size=2, out_chans=32, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    prompts = PromptEncoder(embed_dim=32, image_embedding_size=(4, 4), input_image_size=(64, 64), mask_in_chans=8)
    decoder = MaskDecoder(
        num_multimask_outputs=3, transformer=TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=64, num_heads=4),
        transformer_dim=32, iou_head_depth=2, iou_head_hidden_dim=32,
    )  # fmt: skip
    return Sam(encoder, prompts, decoder).eval()


@case("blocked", "GS102 predictor.py SamPredictor.set_torch_image", "both steps are decorated, and numpy comes out")
def sam_predictor() -> Call:
    from segment_anything import SamPredictor

    predictor = SamPredictor(sam())

    def segment(image: np.ndarray) -> Any:
        predictor.set_image(image)
        return predictor.predict(point_coords=np.array([[20.0, 20.0]]), point_labels=np.array([1]))

    return Call(segment, (np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8),))


@case("blocked", "GS102 predictor.py SamPredictor.set_torch_image", "set_torch_image and predict_torch are decorated")
def sam_predictor_torch() -> Call:
    from segment_anything import SamPredictor

    predictor = SamPredictor(sam())

    def segment(image: torch.Tensor) -> Any:
        predictor.set_torch_image(image, (64, 64))
        return predictor.predict_torch(torch.tensor([[[20.0, 20.0]]]), torch.tensor([[1]]))

    return Call(segment, (torch.rand(1, 3, 64, 64) * 255,))


@case("blocked", "GS102 sam.py Sam.forward", "Sam.forward is decorated")
def sam_forward() -> Call:
    record = {"image": torch.rand(3, 64, 64) * 255, "original_size": (64, 64),
              "point_coords": torch.tensor([[[20.0, 20.0]]]), "point_labels": torch.tensor([[1]])}  # fmt: skip
    return Call(sam(), ([record],), {"multimask_output": False})


@case("flows", "", "its encoder called directly is the way to train it")
def sam_image_encoder() -> Call:
    return Call(sam().image_encoder, (torch.rand(1, 3, 64, 64),))


# --- diffusers -----------------------------------------------------------------------------------------


@functools.cache
def stable_diffusion() -> Any:
    """Return a Stable Diffusion pipeline whose parts have 32 channels."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=[32, 64], in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(hidden_size=32, intermediate_size=37, num_attention_heads=4,
                                        num_hidden_layers=2, vocab_size=100, max_position_embeddings=16))  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae, text, None, unet, PNDMScheduler(skip_prk_steps=True), None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _prompted() -> dict[str, Any]:
    return {"prompt_embeds": torch.randn(1, 16, 32), "negative_prompt_embeds": torch.randn(1, 16, 32),
            "num_inference_steps": 2, "height": 16, "width": 16}  # fmt: skip


PIPELINE = "GS102 pipeline_stable_diffusion.py StableDiffusionPipeline.__call__"


@case("blocked", PIPELINE, "__call__ is decorated")
def diffusers_latent() -> Call:
    return Call(stable_diffusion(), (), {**_prompted(), "output_type": "latent"})


@case("blocked", PIPELINE, "__call__ is decorated; images come out as tensors")
def diffusers_pt() -> Call:
    return Call(stable_diffusion(), (), {**_prompted(), "output_type": "pt"})


@case("blocked", PIPELINE, "__call__ is decorated; PIL images come out")
def diffusers_pil() -> Call:
    return Call(stable_diffusion(), (), _prompted())


@case("blocked", "GS102 pipeline_ddpm.py DDPMPipeline.__call__", "__call__ is decorated; numpy comes out")
def diffusers_ddpm() -> Call:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return Call(pipeline, (), {"num_inference_steps": 2, "output_type": "np"})


@case("flows", "", "the network called directly is the way to train it")
def diffusers_unet() -> Call:
    return Call(stable_diffusion().unet, (torch.randn(1, 4, 8, 8), 10, torch.randn(1, 16, 32)))


# --- open_clip -----------------------------------------------------------------------------------------


@functools.cache
def clip() -> Any:
    """Return an open_clip CLIP with an image side of 32."""
    from open_clip.model import CLIP

    vision = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2}
    return CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


@case("flows", "", "encode_image keeps the graph")
def open_clip_image() -> Call:
    return Call(clip(), (torch.rand(2, 3, 32, 32),), {}, "encode_image")


@case("flows", "", "encode_text keeps the graph; the argmax picks the position of the last token")
def open_clip_text() -> Call:
    return Call(clip(), (torch.randint(1, 64, (2, 16)),), {"normalize": True}, "encode_text")


@case("flows", "", "both towers together")
def open_clip_forward() -> Call:
    return Call(clip(), (torch.rand(2, 3, 32, 32), torch.randint(1, 64, (2, 16))))


# --- transformers --------------------------------------------------------------------------------------


@functools.cache
def gpt2() -> Any:
    """Return a two-layer GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4,
                                      bos_token_id=0, eos_token_id=63)).eval()  # fmt: skip


@case("blocked", "GS102 generation/utils.py GenerationMixin.generate", "generate is decorated; its tokens are argmax's")
def transformers_generate_scores() -> Call:
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return Call(gpt2(), (torch.randint(0, 60, (1, 5)),), options, "generate")


@case("not analysed", "", "only token numbers come out: there is nothing that could have a gradient, and that is said")
def transformers_generate_tokens() -> Call:
    return Call(gpt2(), (torch.randint(0, 60, (1, 5)),), {"max_new_tokens": 3, "do_sample": False}, "generate")


@case("flows", "", "with labels, a ModelOutput with the loss, the logits and a cache")
def transformers_gpt2_loss() -> Call:
    ids = torch.randint(0, 60, (1, 8))
    return Call(gpt2(), (), {"input_ids": ids, "labels": ids, "output_hidden_states": True})


@case("flows", "", "an encoder-decoder with labels, in train mode")
def transformers_t5() -> Call:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return Call(T5ForConditionalGeneration(config).train(), (),
                {"input_ids": torch.randint(1, 60, (2, 7)), "labels": torch.randint(1, 60, (2, 5))})  # fmt: skip


@case("blocked", "GS101 modeling_sam2_video.py Sam2VideoModel.forward", "forward is decorated with inference_mode")
def transformers_sam2_video() -> Call:
    from transformers import Sam2HieraDetConfig, Sam2VideoConfig, Sam2VideoModel, Sam2VisionConfig
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    widths = [8, 16, 32, 64]
    trunk = Sam2HieraDetConfig(hidden_size=8, num_attention_heads=1, blocks_per_stage=[1, 2, 7, 2],
                               embed_dim_per_stage=widths, num_attention_heads_per_stage=[1, 1, 2, 2],
                               image_size=[128, 128])  # fmt: skip
    vision = Sam2VisionConfig(backbone_config=trunk, backbone_channel_list=widths[::-1], fpn_hidden_size=32,
                              backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]])  # fmt: skip
    config = Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 32, "image_size": 128, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                             "iou_head_hidden_dim": 32},
        image_size=128, memory_attention_hidden_size=32, memory_attention_num_layers=2,
        memory_attention_feed_forward_hidden_size=64, memory_encoder_hidden_size=32, memory_encoder_output_channels=16,
        memory_attention_rope_feat_sizes=[8, 8], mask_downsampler_embed_dim=32, memory_fuser_embed_dim=32,
        memory_fuser_intermediate_dim=64,
    )  # fmt: skip
    session = Sam2VideoInferenceSession(torch.rand(2, 3, 128, 128), 128, 128, dtype=torch.float32)
    index = session.obj_id_to_idx(1)
    points = {"point_coords": torch.tensor([[[[60.0, 60.0]]]]), "point_labels": torch.tensor([[[1]]])}
    session.add_point_inputs(index, 0, points)
    session.obj_with_new_inputs.append(1)
    return Call(Sam2VideoModel(config).eval(), (session,), {"frame_idx": 0})


# --- torchvision ---------------------------------------------------------------------------------------


@case("partial", "", "no error: every parameter gets a gradient; a warning: the path through the proposals is cut")
def torchvision_detection() -> Call:
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3).train()
    target = {"boxes": torch.tensor([[20.0, 20.0, 200.0, 240.0]]), "labels": torch.tensor([1])}
    return Call(model, ([torch.rand(3, 320, 320)], [target]))


@case("flows", "", "batch statistics are taken and written under no gradient; the statistics are no parameters")
def torchvision_batchnorm() -> Call:
    from torchvision.models import resnet18

    return Call(resnet18(weights=None).train(), (torch.rand(4, 3, 64, 64),))


# --- ultralytics ---------------------------------------------------------------------------------------


@functools.cache
def yolo() -> Any:
    """Return the smallest YOLO with random weights."""
    from ultralytics import YOLO

    return YOLO("yolov8n.yaml", task="detect", verbose=False)


@case("blocked", "GS104 torch_utils.py smart_inference_mode", "predict copies and fuses the model under no_grad first")
def ultralytics_predict() -> Call:
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return Call(yolo(), (image,), {"imgsz": 64, "verbose": False, "device": "cpu", "conf": 1e-6}, "predict")


@case("flows", "", "the network in train mode")
def ultralytics_forward() -> Call:
    model = yolo().model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return Call(model, (torch.rand(1, 3, 64, 64),))


# --- peft ----------------------------------------------------------------------------------------------


def lora(checkpointing: bool | None) -> Any:
    """Return a LoRA model; ``checkpointing`` says whether its checkpointing is reentrant."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2))  # fmt: skip
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    if checkpointing is not None:
        base._set_gradient_checkpointing(
            True, functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=checkpointing)
        )
    return model.train()


def _tokens() -> dict[str, Any]:
    ids = torch.randint(0, 60, (1, 8))
    return {"input_ids": ids, "labels": ids}


@case("flows", "", "frozen is not blocked")
def peft_lora() -> Call:
    return Call(lora(None), (), _tokens())


@case("flows", "", "checkpointing that is not reentrant changes nothing")
def peft_lora_checkpointed() -> Call:
    return Call(lora(False), (), _tokens())


@case("blocked", "GS604", "no input of a reentrant checkpoint requires a gradient: the embeddings are frozen")
def peft_lora_reentrant() -> Call:
    return Call(lora(True), (), _tokens())


# --- solvers, reversible blocks, derivatives of derivatives ----------------------------------------------


def ordinary_equation(solver: str, **options: Any) -> Call:
    """Return the call of a network whose layer is the solution of a differential equation."""
    import torchdiffeq

    class Equation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.right_side = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
            self.rate = lambda time, state: self.right_side(state)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            solve = getattr(torchdiffeq, solver)
            return solve(self.rate, self.encode(x), torch.linspace(0, 1, 5), **options)[-1]

    return Call(Equation(), (torch.randn(2, 3),))


@case("partial", "", "a warning: the size of the steps is chosen under no_grad; unchecked writes do no harm")
def torchdiffeq_adaptive() -> Call:
    return ordinary_equation("odeint", method="dopri5")


@case("blocked", "GS501 adjoint.py odeint_adjoint", "the adjoint is not told of the parameters")
def torchdiffeq_adjoint_untold() -> Call:
    return ordinary_equation("odeint_adjoint", method="rk4", adjoint_params=())


@case("flows", "", "reversible blocks go backward through a graph of their own")
def performer_reversible() -> Call:
    from performer_pytorch import PerformerLM

    model = PerformerLM(num_tokens=64, max_seq_len=32, dim=32, depth=2, heads=2, dim_head=16, reversible=True)
    return Call(model, (torch.randint(0, 64, (1, 32)),))


@case("blocked", "GS207 gradient.py compute_gradients", "an attribution is a derivative taken without create_graph")
def captum_attribution() -> Call:
    from captum.attr import IntegratedGradients

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def attributed(x: torch.Tensor) -> Any:
        return IntegratedGradients(model).attribute(x, target=1, n_steps=4)

    return Call(attributed, (torch.rand(2, 4),))


@case("blocked", "GS201 higher/utils.py _copy_tensor", "by default the inner loop starts from copies")
def higher_inner_loop() -> Call:
    import higher

    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def adapted(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with higher.innerloop_ctx(net, optimizer) as (inner, steps):
            steps.step(nn.functional.mse_loss(inner(x), y))
            return nn.functional.mse_loss(inner(x), y)

    return Call(adapted, (torch.rand(5, 4), torch.rand(5, 1)))


# --- metrics, losses, steps of training ------------------------------------------------------------------


@case("blocked", "GS105 torchmetrics/metric.py", "a metric's update records nothing; forward is what gives a gradient")
def torchmetrics_update() -> Call:
    from torchmetrics import MeanSquaredError

    net, metric = nn.Linear(4, 3), MeanSquaredError()

    def measured(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        metric.update(net(x), y)
        return metric.compute()

    return Call(measured, (torch.rand(5, 4), torch.rand(5, 3)))


@case("flows", "", "the weight is cast through .data first, which is no cut")
def metric_learning_arcface() -> Call:
    from pytorch_metric_learning.losses import ArcFaceLoss

    loss = ArcFaceLoss(num_classes=3, embedding_size=3)
    net = nn.Linear(4, 3)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    return Call(lambda x: loss(net(x), labels), (torch.rand(6, 4),))


@case("flows", "", "a step of training of its own, by hand, in the forward pass")
def lightning_manual_step() -> Call:
    import lightning

    class Manual(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
            optimizer = torch.optim.Adam(self.parameters(), foreach=True)
            nn.functional.cross_entropy(self.net(batch[0]), batch[1]).backward()
            optimizer.step()
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    return Call(Manual(), ((torch.rand(5, 4), torch.randint(0, 3, (5,))), 0), entry="training_step")


@case("blocked", "GS201 exact_prediction_strategies.py _mean_cache", "predictions use a mean that is cached detached")
def gpytorch_prediction() -> Call:
    import gpytorch

    x = torch.rand(20)

    class Process(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(x, torch.sin(6 * x), gpytorch.likelihoods.GaussianLikelihood())
            self.mean, self.kernel = gpytorch.means.ConstantMean(), gpytorch.kernels.RBFKernel()

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    return Call(Process().eval(), (torch.rand(5),), {}, None, {"loss": lambda predicted: predicted.mean})


# --- quantisation, sampling ------------------------------------------------------------------------------


@case("flows", "", "straight through: the gradient goes around the nearest neighbour")
def vector_quantize_straight() -> Call:
    from vector_quantize_pytorch import VectorQuantize

    encoder, quantizer = nn.Linear(8, 8), VectorQuantize(dim=8, codebook_size=16, rotation_trick=False)
    return Call(lambda x: quantizer(encoder(x))[0], (torch.rand(2, 10, 8),))


@case("blocked", "GS401 vector_quantize_pytorch.py gumbel_sample", "the number of the nearest neighbour is an argmax's")
def vector_quantize_projection() -> Call:
    from vector_quantize_pytorch import RandomProjectionQuantizer

    encoder, embedding = nn.Linear(8, 8), nn.Embedding(16, 4)
    quantizer = RandomProjectionQuantizer(dim=8, num_codebooks=1, codebook_dim=4, codebook_size=16)
    return Call(lambda x: embedding(quantizer(encoder(x))), (torch.rand(2, 10, 8),))


@case("blocked", "GS101 denoising_diffusion_pytorch.py GaussianDiffusion.sample", "three decorators, one in the other")
def denoising_diffusion_sample() -> Call:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    model = GaussianDiffusion(Unet(dim=8, dim_mults=(1, 2), flash_attn=False), image_size=16, timesteps=4)
    return Call(model, (), {"batch_size": 1}, "sample")


# --- the two answers -----------------------------------------------------------------------------------


def floats_in(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Yield the floating tensors of a result, by a walk of its own."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif depth < 5:
        items = value.values() if hasattr(value, "values") else value if isinstance(value, (list, tuple)) else ()
        for item in items:
            yield from floats_in(item, depth + 1)


def plain_gradients(call: Call) -> tuple[set[str], set[str], str]:
    """Call without gradscope and go backward: the parameters asked about, those with a gradient, what went wrong."""
    model, entry = held_model(call.target, call.entry)
    function = model if entry is None else getattr(model, entry)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    asked = {name for name, parameter in parameters.items() if parameter.requires_grad}
    problem = ""
    try:
        out = function(*call.args, **call.kwargs)
        out = call.options["loss"](out) if "loss" in call.options else out
        sinks = [tensor for tensor in floats_in(out) if tensor.requires_grad]
        if sinks:
            sum(tensor.double().sum() for tensor in sinks).backward()
        else:
            problem = "nothing requires grad"
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    reached = {name for name, parameter in parameters.items() if parameter.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return asked, reached & asked, problem


def said_by_gradscope(call: Call) -> tuple[str, Session | None, str]:
    """Return the verdict, the session, and the message where there is none."""
    try:
        session = gradscope.trace(call.target, *call.args, entry=call.entry, **call.options, **call.kwargs)
    except GradscopeError as error:
        return "not analysed" if error.exit_code == 3 else "usage", None, str(error)
    return session.verdict, session, ""


def check(name: str) -> dict[str, Any]:
    """Return everything about one case."""
    spec = CASES[name]
    torch.manual_seed(0)
    try:
        call = spec.build()
    except ImportError as error:
        return {"case": name, "skipped": str(error)}
    started = time.perf_counter()
    verdict, session, message = said_by_gradscope(call)
    seconds = time.perf_counter() - started
    asked, reached, problem = plain_gradients(spec.build())
    found = session.findings if session else []
    findings = [(f.severity, f.rule, f"{f.path}:{f.line}", f.function, f.verified) for f in found]
    flows = {n for n, s in session.sources.items() if s.status in ("flows", "partial")} if session else set()
    first = next((f for f in found if f.severity == "error"), None)
    rule, _, rest = spec.place.partition(" ")
    file, _, function = rest.partition(" ")
    at = not rule or (first is not None and first.rule == rule and file in first.path and function in first.function)
    return {
        "case": name, "verdict": verdict, "wanted": spec.verdict, "place": at, "findings": findings,
        "autograd": f"{len(reached)}/{len(asked)}", "gradscope": f"{len(flows & asked)}/{len(asked)}",
        "agree": session is None or (flows & asked) == reached, "problem": problem, "message": message,
        "missed": sorted(reached - flows)[:4], "extra": sorted((flows & asked) - reached)[:4],
        "seconds": round(seconds, 1), "why": spec.why, "mode": session.target["mode"] if session else "",
        "remarks": session.remarks + session.unseen if session else [],
    }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """Print one case: a line of its own, then what was found."""
    right = row["verdict"] == row["wanted"] and row["place"] and row["agree"]
    judged = "right" if right else f"WRONG (wanted {row['wanted']})"
    print(f"{row['case']:30}{row['verdict']:13}{row['mode']:11}{row['gradscope']:>10}{row['autograd']:>9}"
          f"{row['seconds']:6}  {judged}: {row['why']}")  # fmt: skip
    for severity, rule, place, function, verified in row["findings"]:
        print(f"    {severity:8}{rule} {place}  {function}{'  (fix, verified)' if verified else ''}")
    for key in ("message", "problem", "missed", "extra", "remarks"):
        if row[key]:
            print(f"    {key}: {row[key]}")


def main() -> None:
    """Print every case whose name matches one of the patterns."""
    warnings.simplefilter("ignore")
    patterns = sys.argv[1:] or ["*"]
    print(f"{'case':30}{'says':13}{'mode':11}{'gradscope':>10}{'autograd':>9}{'s':>6}  judged")
    for name in CASES:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            row = check(name)
            if "skipped" in row:
                print(f"{name:30}skipped: {row['skipped']}")
            else:
                show(row)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
