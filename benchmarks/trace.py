"""Measure what a trace costs beside the plain forward pass, and what other tools cost on the same models.

Time: alternating pairs of plain and traced runs in one process, on one thread. The runs are warm: each was made twice
before, which is not counted; the very first traced run (imports, caches) stands in a column of its own. Printed are
the median ratio of CPU time with its range, that of wall time, and the ratio of the shortest runs, which a busy
machine disturbs least. ``gradscope forward`` records and diagnoses the forward pass; ``gradscope`` is
``gradscope.trace(mode="real", verify=False)``, which runs a true backward pass too, and is held against a plain
forward and backward. A batch of 1 in eval mode for all tools, then one of 8 in training mode for gradscope.

Verification: the same models with one block under ``no_grad``; how many runs a verified trace made, and which share of
its CPU time the runs after the first took.

Memory: the kernel's high-water mark of a fresh process that runs the tool, less that of one that makes the plain
run; both have imported and warmed up the tool, so that what counts is the run. Linux only.

Run: ``python benchmarks/trace.py [PAIRS]`` (default 15; needs torchvision and transformers; torchlens, torchview
and torchviz are measured where they are installed).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = ("resnet50", "vit_b_16", "gpt2_6_layers")
TOOLS = ("gradscope forward", "gradscope", "torchlens trace", "torchlens record", "torchview", "torchviz")
OWN = TOOLS[:2]
# A block in the middle of each model, to be put under no_grad.
BLOCKS = {"resnet50": "layer3", "vit_b_16": "encoder.layers.encoder_layer_6", "gpt2_6_layers": "h.3"}
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


def high_water() -> float:
    """Return the greatest resident size of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1e3


def built(name: str, batch: int = 1) -> tuple[Any, tuple[Any, ...]]:
    """Return a model with random weights and its inputs; in eval mode for a batch of 1, else in training mode."""
    import torch

    torch.manual_seed(0)
    if name == "tiny":
        return torch.nn.Linear(4, 4), (torch.randn(2, 4),)
    if name == "gpt2_6_layers":
        import transformers

        model = transformers.GPT2Model(transformers.GPT2Config(n_layer=6))
        return model.train(batch > 1), (torch.randint(0, 50000, (batch, 64)),)
    import torchvision

    return torchvision.models.get_model(name).train(batch > 1), (torch.randn(batch, 3, 224, 224),)


def runner(tool: str) -> Callable[[Any, tuple[Any, ...]], object]:
    """Return what runs a tool on a model and its inputs; ``plain`` is the forward pass alone."""
    if tool == "plain":
        return lambda model, inputs: model(*inputs)
    if tool == "plain and back":
        return _and_back
    if tool == "gradscope forward":
        return _recorded()
    if tool == "gradscope":
        import gradscope

        return lambda model, inputs: gradscope.trace(model, *inputs, mode="real", verify=False)
    if tool.startswith("torchlens"):
        import torchlens

        if tool == "torchlens record":  # by itself it would keep nothing, and refuses that
            return lambda model, inputs: torchlens.record(model, list(inputs), default_op=True)
        return lambda model, inputs: torchlens.trace(model, list(inputs))
    if tool == "torchview":
        import torchview

        return lambda model, inputs: torchview.draw_graph(model, input_data=inputs, depth=20)
    import torchviz

    return lambda model, inputs: torchviz.make_dot(_tensor(model(*inputs)), params=dict(model.named_parameters()))


def reference(tool: str) -> str:
    """Return the plain run that a tool is held against."""
    return "plain and back" if tool == "gradscope" else "plain"


def _and_back(model: Any, inputs: tuple[Any, ...]) -> None:
    output = _tensor(model(*inputs))
    output.backward(output.detach())
    model.zero_grad()


def _recorded() -> Callable[[Any, tuple[Any, ...]], object]:
    from gradscope.tracing.borrowed import Question, subject_of
    from gradscope.tracing.diagnose import diagnose
    from gradscope.tracing.drawing import draw
    from gradscope.tracing.restoring import unhurried_collector
    from gradscope.tracing.runner import Runner
    from gradscope.tracing.workshops import open_workshop

    def run(model: Any, inputs: tuple[Any, ...]) -> object:
        with unhurried_collector():  # as trace_subject does
            return drawn(model, inputs)

    def drawn(model: Any, inputs: tuple[Any, ...]) -> object:
        seen = Runner(subject_of(model, inputs, {}, Question()), open_workshop("real", "cpu", "float32")).run()
        return draw(seen.recording, diagnose(seen.recording), {}, seen.frozen)

    return run


def _tensor(output: Any) -> Any:
    return getattr(output, "last_hidden_state", output)


# --- one measurement, in a process of its own --------------------------------------------------------


def measure_time(tool: str, name: str, batch: int, pairs: int) -> dict[str, Any]:
    """Return the ratios of CPU and wall time, tool to plain, of alternating pairs."""
    run, plain = runner(tool), runner(reference(tool))
    model, inputs = built(name, batch)

    def taken(call: Callable[[Any, tuple[Any, ...]], object]) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        call(model, inputs)
        return time.process_time() - cpu, time.perf_counter() - wall

    taken(plain)
    first = taken(run)[0]
    taken(plain), taken(run)
    alone, used = zip(*[(taken(plain), taken(run)) for _ in range(pairs)], strict=True)
    cpu, wall = ([b[clock] / a[clock] for a, b in zip(alone, used, strict=True)] for clock in (0, 1))
    least = min(alone)[0]
    return {"cpu": statistics.median(cpu), "least": min(cpu), "most": max(cpu), "wall": statistics.median(wall),
            "shortest": min(used)[0] / least, "first": first / least,
            "plain": statistics.median(taken for taken, _ in alone)}  # fmt: skip


def measure_verification(name: str) -> dict[str, Any]:
    """Trace a model with one block under no_grad, with and without the proof of the fix."""
    import torch

    import gradscope

    class Frozen(torch.nn.Module):
        def __init__(self, block: Any) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return self.block(*args, **kwargs)

    model, inputs = built(name)
    model.set_submodule(BLOCKS[name], Frozen(model.get_submodule(BLOCKS[name])))

    def trace(verify: bool) -> tuple[float, Any]:
        start = time.process_time()
        session = gradscope.trace(model, *inputs, mode="real", verify=verify)
        return time.process_time() - start, session

    trace(True)
    pairs = [(trace(False)[0], *trace(True)) for _ in range(5)]
    session = pairs[-1][2]
    share = statistics.median(1 - alone / verified for alone, verified, _ in pairs)
    return {"runs": session.stats["runs"], "share": share, "verdict": session.verdict, "proved": session.fix_verified}


def measure_memory(tool: str, name: str, used: bool) -> dict[str, Any]:
    """Return the high-water mark after three runs; with ``used`` off of the plain forward, the tool imported."""
    run = runner(tool)
    run(*built("tiny"))
    model, inputs = built(name)
    for _ in range(3):
        (run if used else runner(reference(tool)))(model, inputs)
    return {"peak": high_water()}


def measure_llama() -> dict[str, Any]:
    """Trace the shape of Llama-70B from its configuration, as ``gradscope trace hf:FOLDER`` does."""
    from transformers import AutoConfig, LlamaForCausalLM  # noqa: F401 (imported here, so that it is not timed)

    import gradscope.tracing.library
    from gradscope.targets.request import Request
    from gradscope.targets.spec import load_target

    warnings.simplefilter("ignore")
    before = high_water()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_70B))
        start, cpu = time.perf_counter(), time.process_time()
        subject = load_target(f"hf:{folder}", Request())
        session = gradscope.tracing.library.trace_in_mode(subject, "structural", "cuda", verify=False)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "peak": high_water(), "imports": before, "verdict": session.verdict,
            "sources": len(session.sources), "operations": session.stats["operations"]}  # fmt: skip


# --- all of them -------------------------------------------------------------------------------------


def apart(*arguments: str) -> dict[str, Any]:
    """Run one measurement in a fresh process; a tool that fails gives the last line of what it said."""
    command = [sys.executable, __file__, "--one", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:120]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def extra_memory(tool: str, name: str, pairs: int) -> float:
    """Return the median over pairs of processes of what the tool needs more than the plain forward, in MB."""
    found = [[apart("memory", tool, name, used)["peak"] for used in ("used", "plain")] for _ in range(pairs)]
    return statistics.median(with_tool - plain for with_tool, plain in found)


def main() -> None:
    """Measure every tool on every model and print one row each."""
    pairs = sys.argv[1] if len(sys.argv) > 1 else "15"
    print(f"Times as a multiple of the plain run; {pairs} warm pairs, medians.")
    print(f"{'model':<16}{'batch':<7}{'tool':<20}{'CPU time':>20}{'wall':>7}{'shortest':>10}{'first':>8}{'plain':>11}")
    for batch, tools in (("1", TOOLS), ("8", OWN)):
        for name in MODELS:
            for tool in tools:
                print(f"{name:<16}{batch:<7}{tool:<20}{_in_a_row(apart('time', tool, name, batch, pairs))}", flush=True)
    print("\nMore memory than the plain run:")
    for name in MODELS:
        for tool in TOOLS:
            found = apart("memory", tool, name, "used")
            more = found.get("failed") or f"{extra_memory(tool, name, 3 if tool in OWN else 1):>8.1f} MB"
            print(f"{name:<16}{tool:<20}{more}", flush=True)
    print("\nVerification, one block under no_grad:")
    for name in MODELS:
        print(f"{name:<16}{_shown(apart('verification', name))}", flush=True)
    print(f"\nLlama-70B shape, structural: {_shown(apart('llama'))}")


def _in_a_row(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"  {found['failed']}"
    spread = f"{found['cpu']:.2f} [{found['least']:.2f}-{found['most']:.2f}]"
    rest = f"{found['wall']:>7.2f}{found['shortest']:>10.2f}{found['first']:>8.1f}{found['plain'] * 1e3:>8.0f} ms"
    return f"{spread:>20}{rest}"


def _shown(found: dict[str, Any]) -> str:
    return ", ".join(f"{key} {round(value, 2) if isinstance(value, float) else value}" for key, value in found.items())


def one(what: str, *arguments: str) -> dict[str, Any]:
    """Make the one measurement that this process was started for."""
    warnings.simplefilter("ignore")
    if what == "llama":
        return measure_llama()
    import torch

    torch.set_num_threads(1)
    if what == "verification":
        return measure_verification(*arguments)
    if what == "time":
        tool, name, batch, pairs = arguments
        return measure_time(tool, name, int(batch), int(pairs))
    tool, name, how = arguments
    return measure_memory(tool, name, how == "used")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(*sys.argv[2:])))
    else:
        main()
