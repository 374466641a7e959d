"""Targets of the user's own: ``pkg.mod:attr`` and ``path/file.py:attr``, imported and built."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradscope.errors import NotAnalysedError, UsageError, in_words
from gradscope.paths import short_path
from gradscope.targets.guesses import guess_inputs
from gradscope.targets.inputs import make_input, parse_input
from gradscope.targets.request import Request
from gradscope.tracing.borrowed import Question, sentence_about, subject_of
from gradscope.tracing.frames import raised_at
from gradscope.tracing.holding import Holder, goes_backward, held_model
from gradscope.tracing.structural import hollow
from gradscope.tracing.subject import Subject, Workshop

# Bytes of parameters from which on a factory's model is traced without values where nothing is to be computed.
LARGE = 2 << 30


def module_subject(target: str, request: Request) -> Subject:
    """Return the subject of a target.

    The attribute is a module, a class of modules, or a factory that gives a module or ``(module, inputs)``; in the
    place of a module also an object that holds some (a pipeline), or a function that makes a step of training.

    Raises:
        UsageError: no such file, module or attribute, or it is none of these.
        NotAnalysedError: importing or building it failed.
    """
    found = load_attribute(target)

    def built() -> tuple[nn.Module, str | None, Any]:
        return _taken_apart(target, _built(target, found), request)

    large = _without_values(built) if _is_factory(found) and request.mode != "real" else None
    model, entry, inputs = large or built()
    args, kwargs, said = _arguments(model, inputs, request)
    question = replace(question_of(request, said), entry=entry)
    subject = subject_of(model, args, kwargs, question, name=target)
    if large is None:
        return subject

    def prepare(workshop: Workshop) -> nn.Module:
        return model if workshop.mode == "structural" else built()[0]

    return replace(subject, prepare=prepare, weight=_weight(model))


def _taken_apart(target: str, made: Any, request: Request) -> tuple[nn.Module, str | None, Any]:
    """Return the model, the method to enter, and the inputs of what a target gives."""
    inputs: Any = ()
    if isinstance(made, tuple) and len(made) == 2:
        made, inputs = made
    try:
        return *held_model(made, request.entry), inputs
    except UsageError as error:
        raise UsageError(
            f"{target} gives no nn.Module, but {type(made).__name__}. {error.message}",
            hint="Name a module, its class, a function that returns one (or a module and its inputs), or one that "
            "makes a step of training.",
        ) from error


def _without_values(built: Callable[[], tuple[nn.Module, str | None, Any]]) -> tuple[nn.Module, str | None, Any] | None:
    """Return what a factory gives with a large model that has no values; None where it is small or needs them.

    A model of 70 billion parameters fits nowhere; what a small one's constructor computes is better known.
    """
    try:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
            made = hollow(built)
    except Exception:  # it reads its own weights: the run for real says what is wrong, if anything is
        return None
    return made if _weight(made[0]) > LARGE else None


def _weight(model: nn.Module) -> int:
    """Return how many bytes the parameters take."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def question_of(request: Request, said: tuple[str, ...]) -> Question:
    """Return what is asked, with the loss loaded."""
    loss = load_attribute(request.loss) if request.loss else None
    if loss is not None and not callable(loss):
        raise UsageError(f"--loss {request.loss} is no function.", hint="It takes the output and returns a tensor.")
    return Question(request.entry, request.wrt, request.trainable, loss, said)


def load_attribute(target: str) -> Any:
    """Import what ``pkg.mod:attr`` or ``file.py:attr`` names."""
    where, _, attribute = target.rpartition(":")
    if not where or not attribute:
        raise UsageError(
            f"{target!r} names no attribute.",
            hint="Write package.module:name or path/to/file.py:name, such as model.py:build.",
        )
    module = _import_file(Path(where)) if where.endswith(".py") else _import_name(where)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{where} has no {attribute!r}.", hint=f"It has: {', '.join(_names_in(module)[:12])}.")
        found = getattr(found, part)
    return found


def _names_in(module: Any) -> list[str]:
    """Return the public names of a module: what it defines, and where that is nothing, whatever it has."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    home = module.__name__.partition(".")[0]
    own = [name for name, value in public.items() if str(getattr(value, "__module__", "")).partition(".")[0] == home]
    return own or list(public)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"There is no file {path}.", hint="Give the path of a Python file, then : and a name in it.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
    except SystemExit as error:
        raise NotAnalysedError(
            f"{path} ends the program when it is imported: {_told(error)}.",
            hint='Put what it does as a script (its arguments, its training) behind if __name__ == "__main__":',
        ) from error
    except Exception as error:
        raise NotAnalysedError(f"{path} cannot be imported: {_told(error)}.", hint=f"See: python {path}") from error
    finally:
        sys.path.pop(0)
    return module


def _import_name(name: str) -> Any:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(
                f"There is no module {name!r} here.", hint="Check the name, or install the package."
            ) from error
        raise NotAnalysedError(f"{name} cannot be imported: {error}.", hint="Install what it needs.") from error
    except (Exception, SystemExit) as error:
        raise NotAnalysedError(
            f"{name} cannot be imported: {_told(error)}.", hint=f'See: python -c "import {name}"'
        ) from error
    finally:
        sys.path.pop(0)


def _is_factory(found: Any) -> bool:
    makes = inspect.isclass(found) or inspect.isroutine(found) or isinstance(found, functools.partial)
    return makes and not goes_backward(found)


def _built(target: str, found: Any) -> Any:
    if not _is_factory(found):
        return found
    needed = _needed(found)
    if needed:
        raise UsageError(
            f"{target} needs arguments to be built: {', '.join(needed)}.",
            hint="Write a function without arguments that returns the model, and name that.",
        )
    return _called(found, f"{target} cannot be built")


def _needed(function: Any) -> list[str]:
    """Return the names of the arguments that a function cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.items()
    except (TypeError, ValueError):
        return []
    return [name for name, parameter in parameters if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)]  # fmt: skip


def _called(function: Any, failure: str) -> Any:
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise NotAnalysedError(f"{failure}: {_told(error)}.", hint="Mend that line, or name another target.") from error


def _told(error: BaseException) -> str:
    """Return what an exception says and the line of the user's that it came through."""
    place = raised_at(error)
    return in_words(error) + (f" at {short_path(place[0])}:{place[1]}" if place else "")


def _arguments(
    model: nn.Module, inputs: Any, request: Request
) -> tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]:
    """Return what the model is called with: ``--input``, what the factory gave, or a guess from its own metadata."""
    if request.inputs:
        args, kwargs = asked_inputs(request)
        return args, kwargs, ()
    if isinstance(inputs, dict):
        return (), inputs, ()
    if inputs is not None and not (isinstance(inputs, tuple) and not inputs):
        return (inputs if isinstance(inputs, tuple) else (inputs,)), {}, ()
    if isinstance(model, Holder) and not _needed(model.call):
        return (), {}, ()
    guessed = guess_inputs(model)
    if guessed is None:
        raise UsageError(
            f"What {type(model).__name__} takes is not known. {sentence_about(model, request.entry)}",
            hint="Say it: --input 1x3x224x224, --input 1x128:int64, --input pixels=1x3x64x64; "
            "or let the factory return (model, inputs).",
        )
    return guessed.args, guessed.kwargs, (guessed.said,)


def asked_inputs(request: Request) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the named inputs of a request (``file.py:function`` gives both)."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for text in request.inputs:
        if ".py:" in text:
            made = load_attribute(text)
            made = _called(made, f"--input {text} failed") if callable(made) else made
            if made is None:
                raise UsageError(f"--input {text} gives None.", hint="Return a tensor, a tuple of inputs, or a dict.")
            if isinstance(made, dict):
                kwargs.update(made)
            else:
                args += made if isinstance(made, tuple) else [made]
            continue
        spec = parse_input(text)
        value = make_input(spec, seed=request.seed)
        if spec.name:
            kwargs[spec.name] = value
        else:
            args.append(_as_tensor(value))
    return tuple(args), kwargs


def _as_tensor(value: Any) -> Any:
    """An image file becomes ``[1, 3, H, W]`` in 0..1: models take tensors; presets take images themselves."""
    if isinstance(value, torch.Tensor):
        return value
    flat = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8)
    return flat.view(1, value.height, value.width, 3).permute(0, 3, 1, 2).float() / 255
