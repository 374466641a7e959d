"""The calls of the library: ``gradscope.trace`` and ``gradscope.assert_gradients_flow``."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from gradscope.assertion import require_flow
from gradscope.errors import NotAnalysedError, in_words
from gradscope.findings import matches
from gradscope.paths import short_path
from gradscope.session import Session
from gradscope.tracing.borrowed import Question, subject_of
from gradscope.tracing.contents import tensors_in
from gradscope.tracing.frames import raised_at
from gradscope.tracing.holding import held_model
from gradscope.tracing.subject import Subject
from gradscope.tracing.tracer import trace_subject
from gradscope.tracing.unanalysed import CannotTell, MixedDevices, refuse_too_big
from gradscope.tracing.workshops import open_workshop

Mode = Literal["auto", "structural", "real"]
# What `trace` takes by name for itself; all else goes to the model.
OPTIONS = ("entry", "trainable", "mode", "device", "numeric", "verify", "loss")


def trace(
    model: nn.Module | Callable[..., Any],
    *inputs: Any,
    entry: str | None = None,
    wrt: str | Iterable[str] = (),
    trainable: str | Iterable[str] = (),
    mode: Mode = "auto",
    device: str = "auto",
    numeric: bool = False,
    verify: bool = True,
    loss: Callable[[Any], Any] | None = None,
    **kwargs: Any,
) -> Session:
    """Run a model once and say for every parameter and input whether the gradient arrives.

    Args:
        model: the module, one of its methods, or something that holds modules and is called (a pipeline, a
            function); it, torch and the random state are left as they were.
        *inputs: what it is called with (tensors of any shape, images, nested lists and dicts).
        entry: the method to call instead of the module itself.
        wrt: patterns of source names to ask about (``input.0``, ``encoder.*``); all that train by default.
        trainable: patterns of the parameters that count as trained; by default those that require a gradient.
        mode: ``structural`` computes nothing (fake tensors), ``real`` computes, ``auto`` tries them in this order.
        device: ``auto`` leaves the model and the inputs on the devices that they are on, which may be several; the
            name of one moves copies of all there, pretended ones in structural mode.
        numeric: also compare autograd with finite differences, in float64 on a copy.
        verify: prove the smallest fix by running it.
        loss: turns the result into what is differentiated; by default every floating output is.
        **kwargs: keyword arguments of the call.

    Raises:
        UsageError: the request cannot be carried out.
        NotAnalysedError: the forward pass failed for a reason that is not autograd's.
    """
    module, entry = held_model(model, entry)
    question = Question(entry, _patterns(wrt), _patterns(trainable), loss, given=True)
    subject = subject_of(module, inputs, kwargs, question)
    return trace_in_mode(subject, mode, device, verify=verify, numeric=numeric)


def trace_in_mode(
    subject: Subject, mode: str, device: str, dtype: str | None = None, *, verify: bool = True, numeric: bool = False
) -> Session:
    """Trace in one mode; ``auto`` is structural, and real where numbers are asked for or cannot be done without."""

    def traced(asked: Subject, chosen: str, place: str, why: str = "it is to run for real") -> Session:
        if chosen == "real":
            refuse_too_big(subject, why)
        # Nobody asked for a dtype: the model and its inputs have theirs.
        stays = place == "auto"
        place = "cpu" if stays else place
        workshop = open_workshop(chosen, place, dtype or "float32", casts=dtype is not None, stays=stays)
        return trace_subject(asked, workshop, verify=verify, numeric=numeric)

    with warnings.catch_warnings():
        # The traced libraries' own warnings are not about the gradient and would bury the report.
        warnings.simplefilter("ignore")
        if numeric and mode == "auto":
            mode, device = "real", _computing(device)
        if mode != "auto":
            return traced(subject, mode, device)
        try:
            return traced(subject, "structural", device)
        except MixedDevices:
            raise
        except NotAnalysedError as error:
            why = _reason(error)
        remark = f"Structural mode could not follow this model ({why}), so it was computed."
        subject = dataclasses.replace(subject, remarks=(*subject.remarks, remark))
        return traced(subject, "real", _computing(device), why)


def _computing(device: str) -> str:
    return device if device != "cuda" or torch.cuda.is_available() else "cpu"


def _reason(error: NotAnalysedError) -> str:
    cause = error.__cause__
    if cause is None:
        return error.message.rstrip(".")
    place = raised_at(cause)
    what = "it needs computed numbers" if isinstance(error, CannotTell) else in_words(cause)
    return f"{what} at {short_path(place[0])}:{place[1]}" if place else what


def assert_gradients_flow(
    model: nn.Module | Callable[..., Any],
    *inputs: Any,
    wrt: str | Iterable[str] = (),
    allow: str | Iterable[str] = (),
    **options: Any,
) -> Session:
    """Raise ``AssertionError`` with the first cut's file and line unless the gradient arrives.

    Args:
        model, *inputs, wrt, **options: as for :func:`trace`.
        allow: patterns of sources that may be cut (a teacher, a frozen tower under no_grad); findings that
            concern no others are marked as expected.
    """
    __tracebackhide__ = True
    return require_flow(trace_allowing(model, *inputs, wrt=wrt, allow=allow, **options))


def trace_allowing(
    model: nn.Module | Callable[..., Any],
    *inputs: Any,
    wrt: str | Iterable[str] = (),
    allow: str | Iterable[str] = (),
    **options: Any,
) -> Session:
    """Trace, and mark as expected the findings that cut off nothing that is asked about but what ``allow`` names."""
    session = trace(model, *inputs, wrt=wrt, **options)
    allowed = _patterns(allow)
    if not allowed:
        return session
    # An input that requires no gradient is not asked about as long as something trains.
    train = any(source.kind == "parameter" and not source.frozen for source in session.sources.values())
    given = [*inputs, *(value for name, value in options.items() if name not in OPTIONS)]
    spared = train and not _patterns(wrt) and not any(tensor.requires_grad for tensor in tensors_in(given))
    asked = {name for name, source in session.sources.items() if not (spared and source.kind == "input")}
    findings = [
        dataclasses.replace(each, state="expected")
        if each.cuts and all(matches(name, allowed) for name in each.cuts if name in asked)
        else each
        for each in session.findings
    ]
    return dataclasses.replace(session, findings=findings)


def _patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
