"""Cut the gradient at random places of real architectures and see whether the very line is named, and nothing else.

A random module of a random model gets its output cut in a random way; the expected answer is the line of
the cut in this file. Judged beside it: a plain backward pass says which parameters still get a gradient.
What is not counted: a cut with no parameter in front of it that the output depends on ("nothing to lose"),
and one that makes the model itself raise (in place on a leaf).

Run: ``python benchmarks/random_cuts.py [CUTS] [SEED]`` (default 200; needs timm, torchvision, transformers).
"""

from __future__ import annotations

import copy
import inspect
import pickle
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

import gradscope
from gradscope.session import Session

Cut = Callable[[torch.Tensor], torch.Tensor]


def no_grad_block(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():  # here
        return x * 1


def inference_block(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():  # here
        y = x * 1
    return y.clone()


def switched_off(x: torch.Tensor) -> torch.Tensor:
    with torch.set_grad_enabled(False):  # here
        return x * 1


def switched_off_for_a_while(x: torch.Tensor) -> torch.Tensor:
    torch.set_grad_enabled(False)  # here
    y = x * 1
    torch.set_grad_enabled(True)
    return y


def chosen_at_run_time(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad() if x.dim() else torch.enable_grad():  # here
        return x * 1


def from_an_exit_stack(x: torch.Tensor) -> torch.Tensor:
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())  # here
        return x * 1


@torch.no_grad()  # here
def no_grad_decorator(x: torch.Tensor) -> torch.Tensor:
    return x * 1


@torch.inference_mode()  # here
def _inference(x: torch.Tensor) -> torch.Tensor:
    return x * 1


def inference_decorator(x: torch.Tensor) -> torch.Tensor:
    return _inference(x).clone()


def detached(x: torch.Tensor) -> torch.Tensor:
    return x.detach()  # here


def data(x: torch.Tensor) -> torch.Tensor:
    return x.data  # here


def new_leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_()  # here


def rewrapped(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x)  # here


def as_parameter(x: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(x)  # here


def through_numpy(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.detach().numpy() * 1)  # here


def through_a_list(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x.tolist())  # here


def view_under_no_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():  # here
        return x.view(x.shape)


def deep_copied(x: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(x.detach())  # here


def pickled(x: torch.Tensor) -> torch.Tensor:
    return pickle.loads(pickle.dumps(x.detach()))  # type: ignore[no-any-return]  # here


def written_into_room(x: torch.Tensor) -> torch.Tensor:
    room = torch.empty_like(x)
    room.data.copy_(x)  # here
    return room


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.round()  # here


def compared(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).to(x.dtype)  # here


def to_integers(x: torch.Tensor) -> torch.Tensor:
    return x.long().to(x.dtype)  # here


def biggest(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x).scatter(-1, x.argmax(-1, keepdim=True), 1.0)  # here


LOSE_IT: list[Cut] = [
    no_grad_block, inference_block, switched_off, switched_off_for_a_while, chosen_at_run_time, from_an_exit_stack,
    no_grad_decorator, inference_decorator, detached, data, new_leaf, rewrapped, as_parameter, through_numpy,
    through_a_list, view_under_no_grad, deep_copied, pickled, written_into_room,
]  # fmt: skip
HAVE_NONE: list[Cut] = [rounded, compared, to_integers, biggest]


def line_of(cut: Cut) -> int:
    """Return the line marked ``# here`` in a cut, or in the decorated function that it calls."""
    lines, start = inspect.getsourcelines(_inference if cut is inference_decorator else inspect.unwrap(cut))
    return start + next(number for number, line in enumerate(lines) if "# here" in line)


def models() -> dict[str, Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]]:
    """Return small real models with their inputs, each made anew on call."""
    import timm
    import torchvision
    import transformers

    def vision(make: Callable[..., nn.Module], size: int, **options: Any) -> Callable[[], Any]:
        return lambda: (make(**options), {"x": torch.randn(2, 3, size, size)})

    found: dict[str, Callable[[], Any]] = {}
    for name, size in {
        "resnet18": 64, "vit_tiny_patch16_224": 64, "convnext_atto": 64, "mobilenetv3_small_050": 64, "levit_128s": 224,
        "mixer_s32_224": 224, "efficientnet_b0": 64, "regnetx_002": 64, "deit_tiny_patch16_224": 64,
        "swin_tiny_patch4_window7_224": 224, "densenet121": 64, "ghostnet_050": 64, "poolformer_s12": 64,
        "coat_tiny": 64, "gmlp_ti16_224": 224,
    }.items():  # fmt: skip
        options = {"img_size": size} if "vit_" in name or "deit" in name or "coat_" in name else {}
        found[f"timm {name}"] = vision(timm.create_model, size, model_name=name, num_classes=10, **options)
    for name in ("squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "alexnet"):
        found[f"torchvision {name}"] = vision(torchvision.models.get_model, 96, name=name, num_classes=10)

    def text(kind: str, **sizes: int) -> Callable[[], Any]:
        config = getattr(transformers, f"{kind}Config")(vocab_size=99, **sizes)
        make = getattr(transformers, f"{kind}Model")
        return lambda: (make(config), {"input_ids": torch.randint(3, 90, (2, 12))})

    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    }
    for kind in ("Bert", "Roberta", "Llama", "Qwen2", "Mistral", "Electra"):
        found[f"transformers {kind}"] = text(kind, **small)
    found["transformers GPT2"] = text("GPT2", n_embd=32, n_layer=2, n_head=4)
    t5 = transformers.T5Config(vocab_size=99, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4)
    found["transformers T5"] = lambda: (transformers.T5EncoderModel(t5), {"input_ids": torch.randint(3, 90, (2, 12))})
    return found


def insert(model: nn.Module, cut: Cut, name: str) -> None:
    """Cut what a module gives out: its floating tensor, or those in its tuple."""
    module = model.get_submodule(name)
    forward = module.forward

    def cut_forward(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return tuple(map(cut_one, output)) if type(output) is tuple else cut_one(output)

    def cut_one(value: Any) -> Any:
        return cut(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    module.forward = cut_forward  # type: ignore[method-assign]


def reached(model: nn.Module, inputs: dict[str, torch.Tensor]) -> set[str]:
    """Return the parameters that a plain backward pass gives a gradient."""
    output = model(*inputs.values()) if "x" in inputs else model(**inputs)
    tensors = [t for t in ([output] if isinstance(output, torch.Tensor) else list(output.values()))
               if isinstance(t, torch.Tensor) and t.requires_grad]  # fmt: skip
    if tensors:
        torch.autograd.backward(tensors, [torch.randn_like(t) for t in tensors])
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def one(rng: random.Random, makers: dict[str, Any]) -> tuple[str, str]:
    """Make one cut; return the outcome and the words that tell it."""
    name, cut = rng.choice(sorted(makers)), rng.choice(LOSE_IT + HAVE_NONE)
    seed = rng.randrange(10**6)

    def made(*, cut_at: str = "") -> tuple[nn.Module, dict[str, torch.Tensor]]:
        torch.manual_seed(seed)
        model, inputs = makers[name]()
        if cut_at:
            insert(model, cut, cut_at)
        return model, inputs

    model, inputs = made()
    place = rng.choice([name for name, each in model.named_modules() if name and any(True for _ in each.parameters())])
    where = f"{name} {place} {cut.__name__}"
    healthy = reached(model, inputs)
    try:
        arriving = reached(*made(cut_at=place))
    except RuntimeError:
        return "the model itself raises", where
    model, inputs = made(cut_at=place)
    args, kwargs = ((*inputs.values(),), {}) if "x" in inputs else ((), inputs)
    session = gradscope.trace(model, *args, verify=False, **kwargs)
    uncut, inputs = made()
    args = (*inputs.values(),) if args else ()
    own = gradscope.trace(uncut, *args, mode=session.target["mode"], verify=False, **({} if args else inputs))
    return judged(session, places(own), cut, healthy, arriving, where)


def places(session: Session) -> set[tuple[str, int]]:
    """Return what was named, notes aside."""
    return {(finding.path, finding.line) for finding in session.findings if finding.severity != "note"}


def judged(
    session: Session, own: set[tuple[str, int]], cut: Cut, healthy: set[str], arriving: set[str], where: str
) -> tuple[str, str]:
    """Compare what was said with the line of the cut, and with what a plain backward pass showed.

    ``own`` is what the model without the cut has: layers that start at zero give zero gradients behind them.
    """
    statuses = {name: session.sources[name].status for name in healthy}
    flat = {name for name, status in statuses.items() if status == "nondifferentiable"} if cut in HAVE_NONE else set()
    said = {name for name, status in statuses.items() if status in ("flows", "partial", "zero")}
    wrong = said ^ ((arriving & healthy) - flat)
    if wrong:
        return "wrong status", f"{where}: {[(name, statuses[name]) for name in sorted(wrong)[:3]]}"
    named = places(session) - own
    expected = {(path, line) for path, line in named if path.endswith("random_cuts.py") and line == line_of(cut)}
    if named - expected:
        return "another place named", f"{where}: {sorted(named - expected)[:2]}"
    if not expected:
        return ("nothing to lose" if arriving == healthy and not flat else "missed"), where
    return "named exactly", where


NOT_COUNTED = ("nothing to lose", "the model itself raises")


def main() -> None:
    """Run and print the outcomes."""
    warnings.simplefilter("ignore")
    wanted, seed = int(sys.argv[1]) if len(sys.argv) > 1 else 200, int(sys.argv[2]) if len(sys.argv) > 2 else 0
    rng, makers = random.Random(seed), models()
    outcomes: Counter[str] = Counter()
    architectures: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    started = time.perf_counter()
    while sum(outcomes.values()) - sum(outcomes[each] for each in NOT_COUNTED) < wanted:
        outcome, words = one(rng, makers)
        outcomes[outcome] += 1
        if outcome not in NOT_COUNTED:
            architectures[" ".join(words.split(" ")[:2])] += 1
            kinds[words.split(" ")[3].removesuffix(":")] += 1
        if outcome != "named exactly":
            print(f"{outcome}: {words}", flush=True)
    print(f"{dict(outcomes)} in {len(architectures)} architectures, {time.perf_counter() - started:.0f} s")
    print(f"{len(kinds)} kinds: {dict(kinds)}")


if __name__ == "__main__":
    main()
