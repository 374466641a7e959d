"""Targets of the model libraries: ``timm:NAME``, ``torchvision:NAME``, ``hf:ID_OR_DIR``, built without weights."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradscope.errors import NotAnalysedError, UsageError, in_words
from gradscope.targets.guesses import Guess, guess_inputs
from gradscope.targets.modules import asked_inputs, question_of
from gradscope.targets.request import Request
from gradscope.tracing.borrowed import made_subject, sentence_about
from gradscope.tracing.restoring import hushed
from gradscope.tracing.structural import hollow
from gradscope.tracing.subject import Subject, Workshop


def library_subject(library: str, name: str, request: Request) -> Subject:
    """Return the subject of a named model; it is built anew for the mode of the run, with random weights.

    Raises:
        UsageError: the library or the model is not there, or its inputs cannot be guessed.
        NotAnalysedError: the library cannot build it.
    """
    factory, guess = LIBRARIES[library](name)
    with torch.random.fork_rng(devices=[]):
        pattern = _built(name, lambda: hollow(factory))
    if request.inputs:
        args, kwargs = asked_inputs(request)
        said = ""
    else:
        found = guess(pattern)
        if found is None:
            raise UsageError(
                f"What {library}:{name} takes is not known. {sentence_about(pattern, request.entry)}",
                hint="Say it: --input 1x3x224x224, --input input_ids=1x16:int64.",
            )
        args, kwargs, said = found.args, found.kwargs, found.said

    def prepare(workshop: Workshop) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            return workshop.materialise(lambda filled: _built(name, factory))

    remarks = tuple(filter(None, (said, "The weights are random: where gradients flow does not depend on them.")))
    question = question_of(request, remarks)
    subject = made_subject(f"{library}:{name}", prepare, args, kwargs, question, type(pattern))
    weight = 4 * sum(parameter.numel() for parameter in pattern.parameters())
    takes = sentence_about(pattern, request.entry)
    return replace(subject, takes=lambda: takes, weight=weight)


def _built(name: str, factory: Callable[[], nn.Module]) -> nn.Module:
    try:
        return factory()
    except UsageError:
        raise
    except Exception as error:
        raise NotAnalysedError(f"{name} cannot be built: {in_words(error)}.") from error


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"{name} cannot be imported here: {error}.", hint=f"Install it: pip install {name}."
        ) from error


Recipe = tuple[Callable[[], nn.Module], Callable[[nn.Module], "Guess | None"]]


def _timm(name: str) -> Recipe:
    timm = _library("timm")
    if not timm.is_model(name.partition(".")[0]):
        raise UsageError(f"timm has no model {name!r}.", hint=_near(name, timm.list_models(), "timm.list_models()"))
    return lambda: timm.create_model(name, pretrained=False), guess_inputs


def _near(name: str, known: list[str], call: str) -> str:
    near = difflib.get_close_matches(name, known, 6)
    return f"Near it: {', '.join(near)}." if near else f"{call} lists what there is."


def _torchvision(name: str) -> Recipe:
    models = _library("torchvision.models")
    if name not in models.list_models():
        hint = _near(name, models.list_models(), "torchvision.models.list_models()")
        raise UsageError(f"torchvision has no model {name!r}.", hint=hint)
    options = {"weights": None}
    if any(part in name for part in ("rcnn", "retinanet", "fcos", "ssd", "deeplab", "fcn", "lraspp", "keypoint")):
        options["weights_backbone"] = None

    def guess(model: nn.Module) -> Guess | None:
        return _for_torchvision(models, name, model)

    return lambda: models.get_model(name, **options), guess


def _for_torchvision(models: Any, name: str, model: nn.Module) -> Guess:
    module = models.get_model_builder(name).__module__
    if ".detection" in module:
        target = {"boxes": torch.tensor([[20.0, 20.0, 200.0, 240.0]]), "labels": torch.tensor([1])}
        if "mask" in name:
            target["masks"] = torch.ones(1, 320, 320, dtype=torch.uint8)
        if "keypoint" in name:
            target["keypoints"] = torch.tensor([[[60.0, 60.0, 1.0]] * 17])
        said = "Input two 3x320x320 images, each with one box as its target: in training it gives its losses."
        images = [torch.rand(3, 320, 320), torch.rand(3, 320, 320)]
        return Guess((images, [target, dict(target)]), said)
    if ".optical_flow" in module:
        return Guess((torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)), "Inputs two 1x3x128x128 images.")
    weights = models.get_model_weights(name)
    transforms = next(iter(weights)).transforms() if len(weights) else None
    size = (getattr(transforms, "crop_size", None) or [224])[-1]
    own = getattr(model, "image_size", None)  # some of the weights are for a larger one
    size, origin = (own, "its image_size") if isinstance(own, int) else (size, "the transforms of its weights")
    # Two of them: some normalise what is left of one image, a single number per channel.
    shape = (2, 3, 16, size, size) if ".video" in module else (2, 3, size, size)
    return Guess((torch.rand(shape),), f"Input {'x'.join(map(str, shape))}, from {origin}.")


def _transformers(name: str) -> Recipe:
    transformers = _library("transformers")
    folder = Path(name).expanduser()
    if (folder.exists() or name[:1] in ("", ".", "/", "~")) and not (folder / "config.json").is_file():
        raise UsageError(f"There is no config.json in {name or 'hf:'}.", hint="Give a folder that has one, or an ID.")
    try:
        with hushed("huggingface_hub"):  # every retry; what came of them is reported
            config = transformers.AutoConfig.from_pretrained(str(folder) if folder.exists() else name)
    except Exception as error:
        raise UsageError(
            f"transformers finds no configuration at {name!r}: {in_words(error)}.",
            hint="Give a folder with a config.json, or an ID that can be reached.",
        ) from error
    architecture = next(iter(getattr(config, "architectures", None) or ()), "")
    kind = getattr(transformers, architecture, None) or transformers.AutoModel
    if architecture and kind is transformers.AutoModel:
        raise UsageError(
            f"The configuration names the class {architecture}, which transformers {transformers.__version__} does not "
            "have.",
            hint="If it comes with code of its own, write a function that builds it, and trace file.py:function.",
        )

    def factory() -> nn.Module:
        built: nn.Module = kind.from_config(config) if kind is transformers.AutoModel else kind(config)
        return built

    return factory, guess_inputs


LIBRARIES: dict[str, Callable[[str], Recipe]] = {"timm": _timm, "torchvision": _torchvision, "hf": _transformers}
