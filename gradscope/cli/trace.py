"""``gradscope trace``: run a model once, under observation, and report."""

from __future__ import annotations

import warnings

import click

from gradscope.cli.options import gate_options, report_options
from gradscope.cli.output import TRACE_FORMATS, Reporting
from gradscope.cli.progress import staged
from gradscope.errors import UsageError
from gradscope.gate import Gate
from gradscope.session import Session
from gradscope.stages import tell
from gradscope.targets.request import Request
from gradscope.targets.spec import load_preset, load_target


@click.command("trace", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("target", required=False, metavar="TARGET")
@click.option("--model", "model", metavar="NAME", help="A preset, such as deepseek-ocr, in place of a TARGET.")
@click.option("--entry", metavar="METHOD", help="The method to call instead of the model itself.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="SPEC",
    help="What to feed: page.png, 1x3x512x512, 1x3x64x64:bfloat16, tensor.pt.",
)
@click.option(
    "--mode",
    type=click.Choice(["auto", "structural", "real"]),
    default="auto",
    show_default=True,
    help="structural: no weights, no arithmetic, any device pretended; real: compute.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    help="Where the model runs, by default where it is built; in structural mode only pretended.",
)
@click.option(
    "--dtype",
    default=None,
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    help="Cast the model and its float inputs to this; by default they stay what they are.",
)
@click.option(
    "--weights",
    metavar="ID_OR_DIR",
    help="Load this checkpoint instead of random weights (runs the checkpoint's own code).",
)
@click.option("--wrt", multiple=True, metavar="PATTERN", help="Ask about these sources: input.0, encoder.*")
@click.option("--trainable", multiple=True, metavar="PATTERN", help="These parameters count as trained.")
@click.option("--loss", metavar="FILE.py:FUNCTION", help="Turns the output into what is differentiated.")
@click.option("--head", is_flag=True, help="Put a trainable Linear(1024, 1280) behind the output.")
@click.option("--fixed", is_flag=True, help="Trace the model through its reference fixer.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Prove the fix by running it.")
@click.option("--numeric", is_flag=True, help="Also compare autograd with finite differences, in float64 on a copy.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random weights and inputs.")
@gate_options()
@report_options(TRACE_FORMATS)
def command(
    target: str | None, model: str | None, entry: str | None, inputs: tuple[str, ...], mode: str, device: str,
    dtype: str | None, weights: str | None, wrt: tuple[str, ...], trainable: tuple[str, ...], loss: str | None,
    head: bool, fixed: bool, verify: bool, numeric: bool, seed: int, gate: Gate, reporting: Reporting,
) -> int:  # fmt: skip
    """Run a model once and say for every parameter and input whether the gradient arrives.

    TARGET is package.module:name or path/to/file.py:name (a module, its class, or a function that returns
    one, or a module and its inputs), timm:NAME, torchvision:NAME, or hf:ID_OR_FOLDER.

    \b
    Examples:
      gradscope trace train.py:build_model --input 2x3x224x224 --wrt 'encoder.*'
      gradscope trace timm:resnet50
      gradscope trace --model deepseek-ocr
      gradscope trace --model deepseek-ocr --input 1x3x512x512 --mode real
      gradscope trace --model deepseek-ocr --fixed -o healed.svg
    """
    if (target is None) == (model is None):
        raise UsageError("Name one target: TARGET or --model NAME.", hint="gradscope trace --help shows both.")
    if target is not None and (weights or head or fixed):
        raise UsageError("--weights, --head and --fixed belong to a preset.", hint="Give them with --model.")
    request = Request(
        inputs=inputs, weights=weights, seed=seed, fixed=fixed, head=head, entry=entry, wrt=wrt, trainable=trainable,
        loss=loss, mode="real" if numeric and mode == "auto" else mode,
    )  # fmt: skip
    with staged(reporting.progress(), f"Tracing {target or model}", "loading torch"):
        session = trace_target(target, model, request, mode, device, dtype, verify=verify, numeric=numeric)
    return reporting.finish(session, gate)


def trace_target(
    target: str | None,
    model: str | None,
    request: Request,
    mode: str,
    device: str,
    dtype: str | None,
    *,
    verify: bool,
    numeric: bool,
) -> Session:
    """Trace a target or a preset as the options of the command say; torch is imported here and not before."""
    try:
        from gradscope.tracing.library import trace_in_mode
        from gradscope.tracing.tracer import trace_subject
        from gradscope.tracing.workshops import open_workshop
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UsageError(
            "`gradscope trace` runs models and needs torch, which is not installed here.",
            hint="Install it: pip install 'torch-gradscope[trace]'.",
        ) from error
    tell("loading the model")
    if target is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subject = load_target(target, request)
            return trace_in_mode(subject, mode, device, dtype, verify=verify, numeric=numeric)
    preset = load_preset(model or "")
    with warnings.catch_warnings():
        # The traced libraries' own warnings are not about the gradient and would bury the report.
        warnings.simplefilter("ignore")
        subject = preset(request)
        if request.weights is not None and mode == "auto":
            mode = "real"
        workshop = open_workshop(mode, device, dtype)
        return trace_subject(subject, workshop, verify=verify, numeric=numeric)
