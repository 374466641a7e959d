"""Why a run cannot be judged, said in a sentence: the line, what was fed, what the model takes, what to do next."""

from __future__ import annotations

import os
import re

from gradscope.errors import NotAnalysedError, in_words
from gradscope.paths import short_path
from gradscope.tracing.frames import raised_at, source_line
from gradscope.tracing.recording import Recording
from gradscope.tracing.refused import is_autograds
from gradscope.tracing.subject import Subject

# What fake tensors raise where numbers would have to be known (torch._subclasses.fake_tensor, fx.experimental).
NEEDS_NUMBERS = frozenset({
    "CannotFollow", "DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode",
})  # fmt: skip
NO_GRAD = (
    "Gradients gather at leaves: w = w - lr * w.grad makes a new tensor, x.to(device) too, and their .grad stays None. "
    "Update in place under torch.no_grad(), or trace the loss alone to see whether the gradient arrives."
)
# What a fake tensor says where its numbers are asked for: by torch.tensor([...]), by numpy().
NO_MEMORY_THERE = ("its data is not allocated yet", ".numpy() is not supported for tensor subclasses")
# So many tensors of a result are described.
MOST_NAMED = 3
# "... found at least two devices, cuda:0 and cpu!"; before torch 2.14 "... found two different devices cuda:0, cpu"; of
# a kernel of CUDA's "... but got mat1 is on cpu, different from other tensors on cuda:0".
TWO_DEVICES = re.compile(
    r"(?:found (?:at least )?two (?:different )?devices,?|but got \w+ is on) (\w+(?::\d+)?)"
    r"(?:, different from other tensors on|,| and) (\w+(?::\d+)?)"
)


class CannotTell(NotAnalysedError):
    """The mode of the run is the reason: another one may do."""


class MixedDevices(NotAnalysedError):
    """An operation is given tensors of two devices, as it would be on the real ones."""


def needs_numbers(error: BaseException) -> bool:
    """Tell whether a run in structural mode failed because nothing was computed."""
    return type(error).__name__ in NEEDS_NUMBERS or any(words in str(error) for words in NO_MEMORY_THERE)


def used_elsewhere(name: str) -> CannotTell:
    """Say that a run used a weight of the caller's own by another way than its place in the model."""
    return CannotTell(
        f"It uses {name}, or what was made of it before the run, from where it is not registered, and structural mode "
        "does not follow it there.",
        hint="Use --mode real.",
    )


def refuse_unanalysed(subject: Subject, recording: Recording) -> None:
    """Raise where a run failed for a reason that is not autograd's, or gave nothing to ask a gradient of."""
    error = recording.error
    if error is not None and not is_autograds(error):
        raise _refusal(subject, error, recording.loss_takes) from error
    if error is None and not recording.sinks:
        what = f"The loss of {subject.name}" if subject.loss is not None else f"{subject.name}.{subject.entry}"
        instead = f", but {', '.join(recording.gave[:MOST_NAMED])}" if recording.gave else ""
        raise NotAnalysedError(
            f"{what} returned no floating-point tensor{instead}: there is nothing to ask a gradient of.",
            hint="Let --loss, or a method named by --entry, return what is trained on.",
        )


def refuse_too_big(subject: Subject, why: str) -> None:
    """Raise where the weights of a model that has to be computed do not fit into this machine."""
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not told on this system
        return
    if subject.weight > there:
        raise NotAnalysedError(
            f"{subject.name} would have to be computed ({why}), and its weights alone take "
            f"{subject.weight / 1e9:.0f} GB where this machine has {there / 1e9:.0f}.",
            hint="Trace a smaller configuration of the same architecture: where gradients flow is the same.",
        )


def _refusal(subject: Subject, error: BaseException, loss_takes: str) -> NotAnalysedError:
    place = raised_at(error)
    where = f" at {short_path(place[0])}:{place[1]}" if place else ""
    mixed = TWO_DEVICES.search(str(error))
    if mixed is not None and "meta" not in mixed.groups():
        return MixedDevices(
            f"{subject.name} mixes devices{where}: one operation is given {mixed[1]} and {mixed[2]}.",
            hint="A real device would refuse it as well. Make the tensor where the others are (device=x.device), or "
            "register it as a buffer; --device cpu traces it as it is.",
        )
    if needs_numbers(error):
        return CannotTell(
            f"{subject.name} needs computed numbers{where}, and structural mode computes none.",
            hint="Use --mode real.",
        )
    if place is not None and "NoneType" in str(error) and ".grad" in source_line(*place):
        return NotAnalysedError(f"{subject.name} uses a gradient that is None: {in_words(error)}{where}.", hint=NO_GRAD)
    if loss_takes:
        return NotAnalysedError(
            f"The loss of {subject.name} could not be computed of {loss_takes}: {in_words(error)}{where}.",
            hint="A loss is called with what the model gives out, alone, and returns what is trained on.",
        )
    fed = f" with {', '.join(subject.inputs)}" if subject.inputs else ""
    return NotAnalysedError(
        f"{subject.name} could not be run{fed}: {in_words(error)}{where}.",
        hint=f"{subject.takes()} Check the input (--input), --entry, the device and the mode.".strip(),
    )
