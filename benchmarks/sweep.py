"""Trace every model of timm and torchvision, and many of transformers, and ask autograd itself beside it.

For each model: how it was traced (structural, or why not), whether the verdict of every parameter is what a
plain run without gradscope says (its own fake tensors, its own walk over ``grad_fn``), and whether a break
was reported where the plain run shows none. One line a model, a table at the end.

Run: ``python benchmarks/sweep.py timm|torchvision|transformers [-j N] [--only PATTERNS] [--every N] > sweep.txt``.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import inspect
import json
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gradscope.errors import UsageError
from gradscope.session import Session
from gradscope.targets.guesses import Guess, guess_inputs
from gradscope.targets.libraries import LIBRARIES
from gradscope.targets.request import Request
from gradscope.targets.spec import load_target
from gradscope.tracing.borrowed import Question, made_subject
from gradscope.tracing.library import trace_in_mode
from gradscope.tracing.structural import hollow
from gradscope.tracing.subject import Workshop

# Small sizes for every configuration of transformers, as its own tests use them.
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 128, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "n_layer": 2, "n_head": 4, "n_embd": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64, "d_kv": 8,
    "embed_dim": 32, "image_size": 64, "patch_size": 16, "max_position_embeddings": 128, "head_dim": 8,
    "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32, "embedding_size": 32,
    "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
}  # fmt: skip


# Address space of a process: a configuration that stays big raises MemoryError instead of taking the machine.
MOST_MEMORY = 12 << 30
# A configuration that stays big is not computed to its end either.
MOST_SECONDS = 120
# Models checked by one process before the next one starts.
A_PROCESS = 60


def names_of(library: str) -> list[str]:
    """Return the names of a library's models."""
    if library == "timm":
        return sorted(importlib.import_module("timm").list_models())
    if library == "torchvision":
        return sorted(importlib.import_module("torchvision.models").list_models())
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    return sorted(auto.CONFIG_MAPPING_NAMES)


def check(library: str, name: str) -> dict[str, Any]:
    """Trace one model and compare it with a plain run."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(MOST_SECONDS)
    started = time.perf_counter()
    row: dict[str, Any] = {"name": name}
    try:
        traced, plain = _transformers(name) if library == "transformers" else _named(library, name)
    except Exception as error:  # it cannot be built (here, this small), or nothing says what it takes
        row |= {"failed": f"not built: {type(error).__name__}: {str(error)[:160]}", "ours": False}
    else:
        try:
            row |= _compared(traced(), plain())
        except TimeoutError as error:
            row |= {"failed": str(error), "ours": False}
        except Exception as error:
            row |= {"failed": f"{type(error).__name__}: {str(error)[:160]}", "ours": _can_be_run(plain)}
    signal.alarm(0)
    row["seconds"] = round(time.perf_counter() - started, 2)
    row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)  # of this process so far
    return row


def _can_be_run(plain: Callable[[], set[str] | None]) -> bool:
    """Tell whether the plain run gets through where gradscope does not: then it is gradscope's failure."""
    try:
        return plain() is not None
    except Exception:  # the model does not fit, or its constructor fails without values
        return False


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {MOST_SECONDS} seconds")


def _compared(session: Session, reached: set[str] | None) -> dict[str, Any]:
    """Return what was said, and where it differs from what a plain run reached (None: it could not be run)."""
    row: dict[str, Any] = {"mode": session.target["mode"], "verdict": session.verdict}
    row["why"] = next((text for text in session.remarks if "could not follow" in text), "")
    row["findings"] = [[f.severity, f.rule, f"{f.path}:{f.line}", list(f.cuts[:2])] for f in session.findings]
    row["unseen"] = session.unseen
    said = {each.name: each.status for each in session.sources.values() if each.kind == "parameter"}
    row["statuses"] = dict(Counter(said.values()))
    if reached is None:
        return row | {"alone": "a plain run fails"}
    row["differs"] = [name for name, status in said.items() if status != "nondifferentiable"
                      and (status in ("flows", "partial", "zero")) != (name in reached)][:5]  # fmt: skip
    return row | {"false_break": session.verdict not in ("flows", "partial") and set(said) <= reached}


Case = tuple[Callable[[], Session], Callable[[], "set[str] | None"]]


def _named(library: str, name: str) -> Case:
    subject = load_target(f"{library}:{name}", Request())
    factory, guess = LIBRARIES[library](name)

    def plain() -> set[str] | None:
        model = hollow(factory)
        found = guess(model)
        assert found is not None
        return reached_plainly(model, factory, found)

    return lambda: trace_in_mode(subject, "auto", "cpu", verify=False), plain


def _transformers(name: str) -> Case:
    transformers = importlib.import_module("transformers")
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    config = small(getattr(transformers, auto.CONFIG_MAPPING_NAMES[name]))
    config._attn_implementation = "eager"

    def factory() -> nn.Module:
        made: nn.Module = transformers.AutoModel.from_config(config)
        return made

    pattern = hollow(factory)
    found = guess_inputs(pattern)
    if found is None:
        raise UsageError("what it takes is not known")

    def prepare(workshop: Workshop) -> nn.Module:
        return workshop.materialise(lambda filled: factory())

    subject = made_subject(name, prepare, found.args, found.kwargs, Question(), type(pattern))

    def plain() -> set[str] | None:
        return reached_plainly(hollow(factory), factory, found)

    return lambda: trace_in_mode(subject, "auto", "cpu", verify=False), plain


def small(kind: Any) -> Any:
    """Return a configuration of a class of transformers with small sizes, its parts included."""
    sizes: dict[str, Any] = {key: size for key, size in SMALL.items() if key in inspect.signature(kind).parameters}
    for part, cls in getattr(kind, "sub_configs", {}).items():
        if cls.__name__ != "AutoConfig":
            sizes[part] = small(cls).to_dict()
    return kind(**sizes)


# --- the oracle --------------------------------------------------------------------------------------


def reached_plainly(model: nn.Module, factory: Callable[[], nn.Module], given: Guess) -> set[str] | None:
    """Return the parameters that autograd reaches in a run of this script's own: on fake tensors, else computed.

    None where both fail.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                with mode:
                    fake = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype)
                # All of them are to require a gradient: a frozen one's status is what it would be if it were trained.
                trained = fake.is_floating_point()
                module._parameters[name] = made.setdefault(id(parameter), nn.Parameter(fake, trained))
    try:
        with mode:
            kwargs = {key: _faked(mode, value) for key, value in given.kwargs.items()}
            return walked(model, model(*_faked(mode, given.args), **kwargs))
    except Exception:
        pass
    try:
        model = factory().requires_grad_(True)
        return walked(model, model(*given.args, **given.kwargs))
    except Exception:
        return None


def walked(model: nn.Module, output: Any) -> set[str]:
    """Walk ``grad_fn`` from every floating output to the parameters."""
    pending = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    seen, leaves = set(pending), set()
    while pending:
        node = pending.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in leaves}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "values"):
        for item in value.values():
            yield from _tensors(item)


def _faked(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return mode.from_tensor(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_faked(mode, item) for item in value)
    return {key: _faked(mode, item) for key, item in value.items()} if isinstance(value, dict) else value


def checked(library: str, names: list[str], jobs: int) -> Iterator[dict[str, Any]]:
    """Check models in processes of their own, so that memory does not add up; one that kills its process is told."""
    while names:
        done = 0
        try:
            with ProcessPoolExecutor(jobs) as pool:
                for row in pool.map(partial(check, library), names):
                    done += 1
                    yield row
        except BrokenExecutor:
            yield {"name": names[done], "failed": "the process was ended", "ours": True, "seconds": 0.0, "peak_gb": 0.0}
            done += 1
        names = names[done:]


def main() -> None:
    """Sweep and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=["timm", "torchvision", "transformers"])
    parser.add_argument("-j", type=int, default=1)
    parser.add_argument("--only", default="*", help="patterns of names, separated by commas")
    parser.add_argument("--every", type=int, default=1, help="take every Nth model only")
    options = parser.parse_args()
    patterns = options.only.split(",")
    names = [name for name in names_of(options.library) if any(fnmatch.fnmatch(name, each) for each in patterns)]
    names = names[:: options.every]
    started = time.perf_counter()
    rows = []
    for first in range(0, len(names), A_PROCESS * options.j):
        for row in checked(options.library, names[first : first + A_PROCESS * options.j], options.j):
            rows.append(row)
            print(json.dumps(row), flush=True)
    traced = [row for row in rows if "failed" not in row]
    print(f"\n{len(names)} models in {time.perf_counter() - started:.0f} s: {len(traced)} traced", file=sys.stderr)
    print("by mode", dict(Counter(row["mode"] for row in traced)), file=sys.stderr)
    print("verdicts", dict(Counter(row["verdict"] for row in traced)), file=sys.stderr)
    compared = [row for row in traced if "differs" in row]
    wrong = [row["name"] for row in compared if row["differs"]]
    print(f"compared with a plain run {len(compared)}, differing {len(wrong)} {wrong[:20]}", file=sys.stderr)
    print("false breaks", [row["name"] for row in compared if row["false_break"]], file=sys.stderr)
    slowest = sorted(rows, key=lambda row: -row["seconds"])[:5]
    print("slowest", [(row["name"], row["seconds"]) for row in slowest], file=sys.stderr)
    print("biggest memory", max((row["peak_gb"], row["name"]) for row in rows), file=sys.stderr)
    ours = [row["name"] for row in rows if row.get("ours")]
    print(f"failed where a plain run does not {len(ours)} {ours[:20]}", file=sys.stderr)
    print("failed", Counter(row["failed"][:60] for row in rows if "failed" in row).most_common(12), file=sys.stderr)


if __name__ == "__main__":
    main()
