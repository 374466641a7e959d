"""What is meant to run without gradients: recognised by the names that the field gives it.

Weights are initialised, optimizers step, metrics count, checkpoints load: a region there is a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gradscope.scanning.package import Package, Place

_SETUP = re.compile(
    r"^(?:__init__|__post_init__|_?init(?:ialize|ialise)?(?:_.*)?|_?reset(?:_.*)?|_?load(?:_.*)?|from_.*|_?convert(?:_.*)?|"
    r"to_.*|_?fuse(?:_.*)?|_?merge(?:_.*)?|\w*_merge_(?:lora|adapter|weight)\w*|_?unmerge(?:_.*)?|_?(?:un)?freeze(?:_.*)?|_?resize_(?:token|position|pos).*|"
    r"_?tie_.*|_?set_(?!(?:\w+_)?(?:images?|video|audio|text|prompt)(?:_|$)).*|_?register.*|_?copy_.*|_?quantize.*|_?dequantize.*|_?prune.*|_?smart_.*|_?reparametri[sz]e.*|"
    r"switch_to_deploy|train|eval|to|half|cuda|cpu|float|apply|add_adapter|add_weighted_adapter|_?update_(?:layer|adapter).*|extra_repr|state_dict|_?save.*|"
    r"_?create_.*|_?build(?:_.*)?|_?make_.*|_?get_.*(?:pos|mask|anchor|grid|freq|table|coords?).*|_?compute_freqs.*|"
    r"_?precompute.*|_?dynamic_frequency_update|_?expand_.*)$"
)
_TRAINING_TOOL = re.compile(
    r"^(?:step|_?step_.*|_?(?:ema_|momentum_)?update(?:_.*)?|ema|zero_grad|clip_grad.*|_?(?:validate|validation|evaluate|"
    r"eval|test|benchmark|profile|bench|measure|calibrate|warmup|log(?!_(?:p|q)?(?:prob|lik|dens|pdf|cdf|det|abs|mel|spec|soft|sig|sum|scale|norm|evidence|partition|weight))|plot|visuali[sz]e|export|track|record)(?:_.*)?|"
    r"(?:accuracy|compute_metrics?|metric.*|get_acc|validation_step|test_step|training_step_end|on_.*|add_noise_sample.*)|"
    r"main|preprocess.*|_?post_?process.*|collate.*|get_(?:targets|targets_single|assigned.*)|_?assign.*|match.*|"
    r"_?get_(?:src|tgt)_permutation_idx|select_(?:topk|candidates|highest).*|_?sample_.*indices?|_?sinkhorn.*|_?k_?means.*|"
    r"\w*_(?:assignments?|matching))$"
)
# Public methods that touch modules and are no way to compute with them.
_HANDLING = re.compile(
    r"^(?:push_to_hub|get_optimizers?|get_params|get_(?:input|output)_embeddings|configure_.*|format_batch.*|parameters.*|"
    r"named_.*|clone.*|copy.*|prepare_.*|compile.*|setup.*|collect_.*)$"
)
_CLASSES = re.compile(
    r"(?:Optimizer|Optim|Scheduler|Metrics?|Matcher|Miner|Assigner|ImageProcessor\w*|Processor|FeatureExtractor|Tokenizer|EMA|"
    r"Quantizer|Observer|Tester|Testing|Test|Tests|TestCase|Validator|Callback|Benchmark|Profiler|Exporter|Trainer|"
    r"Attack(?:er)?|Explainer|Post[Pp]rocess\w*|SinkhornKnopp|Calculator|Calibrator|TemperatureSetter|Searcher|BeamSearch\w*|Quant\w*|Evaluator|Evaluation|DataLoader|DataGenerator|Dataset|Sampler|Logger|Converter|Ops|Conversion\w*|Augment(?:ation\w*|er)?|SpecAugment\w*|Cutout|CutOut)$"
)
_FILES = re.compile(
    r"(?:^|/)(?:tests?|testing|test_utils|examples?|scripts?|benchmarks?|tools|conversion|convert\w*|quantizers?|"
    r"optim(?:izers?)?|metrics?|commands|cli|data|datasets|evaluation|export\w*)(?:/|$)|(?:^|/)(?:test_|convert_|conftest|"
    r"benchmark)[^/]*$|_test\.py$|(?:^|/)(?:train|validate|benchmark|metrics?|trainer\w*|val|export\w*)\.py$"
)
_WITH_HOOK = frozenset({"LightningModule"})
_OPTIMIZERS = frozenset({"Optimizer", "Metric", "TrainerCallback", "LRScheduler", "_LRScheduler", "Quantizer"})


def meant_by_class(place: Place, package: Package) -> str:
    """Return why a class runs without gradients by its nature (a metric, a matcher); empty where it does not."""
    owner = place.name.rpartition(".")[0]
    facts = package.files.get(place.module)
    klass = facts.classes.get(owner) if facts else None
    if (
        klass and any(name.startswith("backward") for name in klass.methods)
        and not package.has_base(Place(place.module, owner), _WITH_HOOK)  # called with a loss, to go backward from it
    ):  # fmt: skip
        return f"{owner} has a hand-written backward"
    if "quant" in place.module.rpartition(".")[2]:
        return "quantisation works with integers and scales"
    for part in owner.split("."):
        if part.endswith("FeatureExtractor") and package.is_module(Place(place.module, part)):
            continue  # a network; the others prepare data
        if _CLASSES.search(part) or package.has_base(Place(place.module, part), _OPTIMIZERS):
            return f"{part} is no part of a differentiable forward pass"
    return ""


_NOT_TRAINED = re.compile(
    r"label|target|teacher|(?:^|_)gt(?:_|$)|mask|ind(?:ex|ices)|(?:^|_)idx|(?:^|_)ids?$|reference|(?:^|_)ref_|matched|assign|"
    r"(?:^|_)(?:row|col|column|batch)_(?:offsets?|ptr)$|(?:^|_)(?:rois?|proposals?)(?:_|$)"
)
_DECODED = re.compile(r"(?:^|_)(?:predicted_(?:words|tokens)|transcripts?|transcriptions?|hyps|hypotheses)$")
_TEACHERS = re.compile(
    r"(?:^|_)teacher(?:_|$)|(?:^|_)target_(?:encoder|net|model|actor|critic|policy|q)|_(?:ema|mmt|target)$|"
    r"(?:^|_)(?:ema|momentum|reference|ref)_(?:\w+_)?(?:encoder|net(?:work)?|model|policy|backbone|branch|proj\w*|head)$|"
    r"_(?:encoder|decoder|proj|model|net|head)_m$"
)
_KEPT_TEACHERS = re.compile(r"^ema$|(?:^|_)teacher(?:_model)?$")  # called by a method of theirs
_TABLES = re.compile(r"Rotary|Rope|RoPE|Sinusoid|Position\w*(?:Embedding|Encoding)|RandomFourier")


def meant_by_result(names: tuple[str, ...]) -> str:
    """Return why a block's results are not to be trained (targets, masks, indices), judged by their names."""
    if names and all(_NOT_TRAINED.search(name) for name in names):
        return f"it computes {', '.join(names)}, which nothing is trained through"
    return ""


def are_decoded(names: tuple[str, ...]) -> bool:
    """Tell whether a block's results are the words or tokens that a model was made to say, judged by their names."""
    return bool(names) and all(_DECODED.search(name) for name in names)


def meant_by_module(called: Iterable[str], read: Iterable[str] = ()) -> str:
    """Return why a block is not to be trained through if it runs a teacher, judged by the names of its modules."""
    teachers = [*filter(_TEACHERS.search, sorted(called)), *filter(_KEPT_TEACHERS.search, sorted(read))]
    return f"it runs {teachers[0]}, which is updated and not trained" if teachers else ""


def is_table(place: Place) -> bool:
    """Tell whether a class is a positional table by its name."""
    return bool(_TABLES.search(place.name))


def is_tool(name: str) -> bool:
    """Tell whether a function by this name prepares a model or is a tool around training, not a way through it."""
    return bool(_SETUP.match(name) or _TRAINING_TOOL.match(name) or _HANDLING.match(name))


def meant_by_name(place: Place) -> str:
    """Return why a function or its file is not meant to be differentiated; empty where nothing says so."""
    name = place.name.rpartition(".")[2]
    if _FILES.search(place.module.replace(".", "/") + ".py"):
        return "a tool or a test, not a model's forward pass"
    if _SETUP.match(name):
        return f"{name} prepares the model once"
    if _TRAINING_TOOL.match(name):
        return f"{name} is a tool around training"
    return ""
