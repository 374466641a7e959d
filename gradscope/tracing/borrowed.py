"""A caller's own model as the subject of a trace: which method to enter, which tensors go in, given back as it was."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import nn

from gradscope.errors import UsageError
from gradscope.tracing.contents import describe
from gradscope.tracing.holding import Holder
from gradscope.tracing.subject import Built, Subject, Workshop

# Where a class has no forward: what its users call, most likely first.
USUAL_ENTRIES = ("encode", "encode_image", "predict", "generate", "transform", "extract_features")

# Brings an input to where the run has it.
Moving: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"

# Parts of a list or a dict that are named where an input is described.
MOST_PARTS = 3


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a model: where to enter, which sources, which of them train, what the loss is.

    ``given``: the inputs are the caller's, who has put them on a device; others follow the model.
    """

    entry: str | None = None
    wrt: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    loss: Callable[[Any], Any] | None = None
    remarks: tuple[str, ...] = field(default=())
    given: bool = False


def subject_of(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], question: Question, *, name: str = ""
) -> Subject:
    """Return the subject for a model that exists; the run leaves it as it is."""
    own = model.name if isinstance(model, Holder) else type(model).__name__
    subject = made_subject(name or own, lambda workshop: model, args, kwargs, question, type(model))
    subject = replace(subject, takes=lambda: sentence_about(model, question.entry))
    return replace(subject, entry=model.entry) if isinstance(model, Holder) else subject


def made_subject(
    name: str,
    prepare: Callable[[Workshop], nn.Module],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    question: Question,
    kind: type[nn.Module],
) -> Subject:
    """Return the subject for a model that ``prepare`` makes, of class ``kind``."""
    entry, said = _entry(kind, question.entry)

    def build(workshop: Workshop, prepared: nn.Module) -> Built:
        inputs: dict[str, torch.Tensor] = {}
        wanted: set[str] = set()
        like = functools.partial(workshop.like, given=question.given)
        given = [_taken(f"input.{index}", value, like, inputs, wanted) for index, value in enumerate(args)]
        named = {key: _taken(f"input.{key}", value, like, inputs, wanted) for key, value in kwargs.items()}
        call = prepared if entry == "forward" else getattr(prepared, entry)
        return Built(prepared, lambda: call(*given, **named), inputs, frozenset(wanted))

    return Subject(
        name=name,
        entry=entry,
        prepare=prepare,
        build=build,
        inputs=tuple(_described(args, kwargs)),
        remarks=(*question.remarks, *said),
        borrowed=True,
        wrt=question.wrt,
        trainable=question.trainable,
        loss=question.loss,
        given=(*args, *kwargs.values()),
    )


def sentence_about(model: nn.Module, entry: str | None) -> str:
    """Return what the signature of the method entered says, in a sentence."""
    method: Any = getattr(model, entry or "forward", None)
    if isinstance(model, Holder):
        method, entry = model.call, model.entry
    try:
        names = list(inspect.signature(method).parameters) if method is not None else []
    except (TypeError, ValueError):
        names = []
    first = next(
        (module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding))), None
    )
    shape = ""
    if isinstance(first, nn.Conv2d):
        shape = f"; its first convolution takes [B, {first.in_channels}, H, W]"
    elif isinstance(first, nn.Linear):
        shape = f"; its first linear layer takes [..., {first.in_features}]"
    elif isinstance(first, nn.Embedding):
        shape = f"; its first embedding takes integers below {first.num_embeddings}"
    return f"Its {entry or 'forward'} takes ({', '.join(names)}){shape}."


def _entry(kind: type[nn.Module], asked: str | None) -> tuple[str, tuple[str, ...]]:
    """Return the method to enter, and what to say where it was guessed."""
    if asked is not None:
        if not callable(getattr(kind, asked, None)):
            own = [name for base in kind.__mro__ if base not in nn.Module.__mro__ for name, value in vars(base).items()
                   if inspect.isroutine(value) and not name.startswith("_")]  # fmt: skip
            known = ", ".join(list(dict.fromkeys(own))[:12]) or "none of its own"
            raise UsageError(f"{kind.__name__} has no method {asked!r}.", hint=f"It has: {known}.")
        return asked, ()
    # Statically: a script has its forward in each object, and its class raises where it is asked.
    forward = inspect.getattr_static(kind, "forward")
    if forward is not nn.Module.forward or kind.__call__ is not nn.Module.__call__:
        return "forward", ()
    for name in USUAL_ENTRIES:
        if callable(getattr(kind, name, None)):
            return name, (f"{kind.__name__} has no forward; entered at {name}. Another one: --entry NAME.",)
    raise UsageError(f"{kind.__name__} has no forward.", hint="Say which method to call: --entry NAME.")


def _taken(name: str, value: Any, like: Moving, inputs: dict[str, torch.Tensor], wanted: set[str]) -> Any:
    """Return an argument as the run takes it; floating tensors in it become sources."""
    if isinstance(value, torch.Tensor):
        taken = like(value)
        if taken.is_floating_point() or taken.is_complex():
            inputs[name] = taken
            if value.requires_grad:
                wanted.add(name)
        return taken
    if type(value) is dict:
        return {key: _taken(f"{name}.{key}", item, like, inputs, wanted) for key, item in value.items()}
    if isinstance(value, MutableMapping):  # of another class, which may hold more than its items
        alike = copy.copy(value)
        for key, item in value.items():
            alike[key] = _taken(f"{name}.{key}", item, like, inputs, wanted)
        return alike
    named = getattr(value, "_fields", None)
    if isinstance(value, tuple) and named is not None:
        items = zip(named, value, strict=True)
        return type(value)._make(_taken(f"{name}.{key}", item, like, inputs, wanted) for key, item in items)  # type: ignore[attr-defined]
    if isinstance(value, (list, tuple)):
        return type(value)(_taken(f"{name}.{i}", item, like, inputs, wanted) for i, item in enumerate(value))
    return value


def _described(args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    """Return what each argument is, in words."""
    return [*map(_in_words, args), *(f"{name}={_in_words(value)}" for name, value in kwargs.items())]


def _in_words(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return describe(value)
    if isinstance(value, MutableMapping):
        parts = [f"{key}: {_in_words(item)}" for key, item in list(value.items())[:MOST_PARTS]]
    elif isinstance(value, (list, tuple)):
        parts = [_in_words(item) for item in value[:MOST_PARTS]]
    else:
        return type(value).__name__
    more = ", ..." if len(value) > MOST_PARTS else ""
    said = ", ".join(parts) + more
    return f"{{{said}}}" if isinstance(value, MutableMapping) else f"[{said}]"
