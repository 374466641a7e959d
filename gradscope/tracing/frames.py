"""From a Python frame to the user's own source: which line, which function, which decorator."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import linecache
import os
import re
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch

from gradscope.findings import Excerpt
from gradscope.tracing.recording import Place, Site

TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep
# The functions by which torch calls modules and their hooks.
MODULE_CALL = frozenset({"_wrapped_call_impl", "_call_impl", "inner"})
# Where torch hands calls on to what overrides or decorates them.
PASSING_ON = ("_contextlib.py", f"{os.sep}overrides.py")
# How an object answers calls of torch that it is given to.
ANSWERING = "__torch_function__"
# Names that say nothing of what was called.
WRAPPING = ("wrapper", "wrapped", "inner")
# Torch's modules; what calls them is not meant.
MODULES = os.path.join(TORCH_FOLDER, "nn", "modules") + os.sep
CALLING = (f"{os.sep}module.py", f"{os.sep}container.py")
OWN_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
STDLIB_FOLDER = sysconfig.get_path("stdlib") + os.sep
# The fixers are code under test when they are traced, not part of the tracer.
FIXER_FOLDER = os.path.join(OWN_FOLDER, "fix") + os.sep
# Where the tracer calls the model: what lies further out is the code that called gradscope.
CALLERS = frozenset(os.path.join(OWN_FOLDER, "tracing", name) for name in ("runner.py", "numeric.py"))


# Libraries that run kernels; the line that launches one is meant. A folder of that name may be anybody's.
LAUNCHERS = tuple(f"{os.sep}site-packages{os.sep}{name}{os.sep}" for name in ("triton", "cupy", "numba"))
# A line of a traceback in words.
_TRACED = re.compile(r'File "(.+?)", line (\d+), in (\S+)')
# Libraries whose frames only pass a call on.
WRAPPERS = frozenset({"typing_extensions.py", "decorator.py", "wrapt", "beartype", "jaxtyping", "typeguard"})


@functools.lru_cache(maxsize=4096)
def is_user_file(filename: str) -> bool:
    """Tell whether a file belongs to the model or a library, and not to torch or to the tracer."""
    if filename.startswith(FIXER_FOLDER):
        return True
    if filename.startswith(STDLIB_FOLDER) and "site-packages" not in filename:
        return False
    if filename.startswith((TORCH_FOLDER, OWN_FOLDER, "<")) or any(name in filename for name in LAUNCHERS):
        return False
    return not WRAPPERS.intersection(filename.split(os.sep)) and not filename.startswith("cupy" + os.sep)


def user_frame(frame: FrameType | None) -> FrameType | None:
    """Return the nearest frame, from this one outward, that is user code.

    A method by which an object answers calls of torch is passed over: the call that it answers is meant.
    Where there is none (a model made of torch's modules alone) it is torch's own nearest frame, in a module if there is
    one; None where the call was made by the tracer itself: the code that called gradscope is not meant.
    """
    inner = module = None
    while frame is not None:
        side = _SIDES[frame.f_code.co_filename]
        if side == "user" and frame.f_code.co_name != ANSWERING:
            return frame
        if side == "caller":
            return module or inner
        if side == "module" and module is None:
            module = frame
        if side == "torch" and inner is None:
            inner = frame
        frame = frame.f_back
    return frame


class _Sides(dict[str, str]):
    """On which side of a call a file is; asked for every frame above every call."""

    def __missing__(self, filename: str) -> str:
        if is_user_file(filename):
            side = "user"
        elif filename in CALLERS:
            side = "caller"
        else:
            side = "torch" if filename.startswith(TORCH_FOLDER) and not filename.endswith(PASSING_ON) else ""
            side = "module" if filename.startswith(MODULES) and not filename.endswith(CALLING) else side
        self[filename] = side
        return side


_SIDES = _Sides()


def user_place(frame: FrameType | None) -> Place | None:
    """Return where in user code ``frame`` was called from; see :func:`user_frame`."""
    found = user_frame(frame)
    return Place(found.f_code, found.f_lasti, found.f_lineno) if found else None


class Places:
    """The places of one run, each made once: the same lines are run over and over."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], Place] = {}

    def of(self, frame: FrameType | None) -> Place | None:
        """Return where in user code ``frame`` was called from; see :func:`user_frame`."""
        found = user_frame(frame)
        if found is None:
            return None
        key = (id(found.f_code), found.f_lasti)  # the place keeps the code, so that no other one has its id
        place = self._made.get(key)
        if place is None:
            place = self._made[key] = Place(found.f_code, found.f_lasti, found.f_lineno)
        return place


def function_place(function: Any) -> Place | None:
    """Return where a function is written; None where it has no source of its own."""
    code = getattr(inspect.unwrap(getattr(function, "func", function)), "__code__", None)
    return Place(code, 0, code.co_firstlineno) if code is not None else None


def is_running(code: CodeType, frame: FrameType | None) -> bool:
    """Tell whether a function is on the way to ``frame``, and not suspended."""
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def raised_at(error: BaseException) -> tuple[str, int] | None:
    """Return the innermost file and line of user code that an exception came through."""
    found = None
    step = error.__traceback__
    while step is not None:
        if is_user_file(step.tb_frame.f_code.co_filename):
            found = (step.tb_frame.f_code.co_filename, step.tb_lineno)
        step = step.tb_next
    return found


def call_chain(frame: FrameType | None) -> tuple[str, ...]:
    """Return the user functions that are active above ``frame``, outermost first.

    Ends at the tracer's own frame, so that the code that called gradscope is not part of it.
    """
    names: list[str] = []
    while frame is not None and (side := _SIDES[frame.f_code.co_filename]) != "caller":
        if side == "user":
            names.append(function_name(frame))
        frame = frame.f_back
    return tuple(names[::-1])


def function_name(frame: FrameType) -> str:
    """Return ``Class.method`` or ``function`` for a frame."""
    if sys.version_info < (3, 11):  # later the code says it, and to ask for the locals copies all of them
        owner = frame.f_locals.get("self")
        if owner is not None:
            return f"{type(owner).__name__}.{frame.f_code.co_name}"
    return code_name(frame.f_code)


def code_name(code: CodeType) -> str:
    """Return ``Class.method`` or ``function`` for a code object (without the class on Python 3.10)."""
    name: str = getattr(code, "co_qualname", code.co_name)
    return name.replace("<locals>.", "")


def region_site(frame: FrameType, mechanism: str) -> Site:
    """Return the place to blame for a grad-mode switch entered from ``frame``.

    Under a decorator that frame is torch's wrapper, which holds the decorated function as ``func``
    (``torch/utils/_contextlib.py``); otherwise it is the ``with`` itself or the bare call. Where torch itself
    switches (``Distribution.sample``, ``load_state_dict``), the mechanism is what the user called of it.
    """
    func = frame.f_locals.get("func")
    if frame.f_code.co_filename.endswith("_contextlib.py") and callable(func):
        return decorator_site(func, mechanism)
    found = user_frame(frame) or frame
    called = _called(frame, found)
    if called:
        return Site(found.f_code.co_filename, found.f_lineno, function_name(found), called, "call")
    statement = linecache.getline(found.f_code.co_filename, found.f_lineno).strip()
    how = "block" if statement.startswith(("with", "async with")) else "call"
    return Site(found.f_code.co_filename, found.f_lineno, function_name(found), mechanism, how)


def exported_site(graph: Any, mechanism: str) -> Site | None:
    """Return the line that a graph of an exported program begins with, as it remembers it; None where it does not."""
    nodes = graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ()
    for node in nodes:
        lines = _TRACED.findall(node.meta.get("stack_trace") or "")
        users = [line for line in lines if is_user_file(line[0])]
        if users:
            path, line, function = users[-1]
            return Site(path, int(line), function, mechanism, "call")
    return None


def inside_of(frame: FrameType | None, name: str) -> str:
    """Return torch's function that user code called and a call of ``name`` was made in; empty where it is that one."""
    if frame is None or _SIDES[frame.f_code.co_filename] == "user":  # nearly always: user code made the call itself
        return ""
    user = user_frame(frame)
    called = _called(frame, user) if user is not None and _SIDES[user.f_code.co_filename] == "user" else ""
    own = called.rpartition(".")[2]
    return "" if own in (name, name.strip("_"), *WRAPPING) or own.startswith("_") else called


def _called(frame: FrameType | None, user: FrameType) -> str:
    """Return the name of torch's function that ``user`` called and ``frame`` runs in; empty where they are the same.

    The call of a module only passes on: what counts is the hook that it runs (``SpectralNorm.__call__``).
    """
    name = ""
    while frame is not None and frame is not user:
        code = frame.f_code
        is_torchs = code.co_filename.startswith(TORCH_FOLDER) and not code.co_filename.endswith(PASSING_ON)
        if is_torchs and code.co_name not in MODULE_CALL:
            name = function_name(frame) if code.co_name.startswith(("__", "forward")) else code.co_name
        frame = frame.f_back
    return name


def decorator_site(func: Callable[..., Any], mechanism: str) -> Site:
    """Return the line of the decorator that names ``mechanism`` on ``func``, else its first line."""
    inner = inspect.unwrap(func)
    code: CodeType = inner.__code__
    line = code.co_firstlineno
    lines = linecache.getlines(code.co_filename)[line - 1 :]
    for decorator, text in _decorators(tuple(inspect.getblock(lines)) if lines else ()):
        if mechanism in text:
            line = code.co_firstlineno + decorator - 1
            break
    name = inner.__qualname__.replace("<locals>.", "")
    return Site(code.co_filename, line, name, mechanism, "decorator")


def _decorators(block: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    try:
        tree = ast.parse(textwrap.dedent("".join(block)))
    except SyntaxError:
        return
    for node in tree.body[:1]:
        for decorator in getattr(node, "decorator_list", ()):
            yield decorator.lineno, ast.unparse(decorator)


def source_line(path: str, line: int) -> str:
    """Return one line of source, stripped; empty where the file cannot be read."""
    return linecache.getline(path, line).strip()


def excerpt(path: str, line: int) -> Excerpt | None:
    """Return the lines around one line of source; None where the file cannot be read."""
    return Excerpt.around(linecache.getlines(path), line)


def expression(place: Place, lines: list[str] | None = None) -> str:
    """Return the source text of the call at a place (the whole line on Python 3.10); ``lines``: those of its file."""
    lines = linecache.getlines(place.code.co_filename) if lines is None else lines
    if sys.version_info >= (3, 11):
        line, end_line, column, end_column = _position(place.code, place.offset // 2)
        if line is not None and line == end_line:
            text = _line(lines, line).encode()
            return text[column:end_column].decode(errors="replace").strip()
    return _line(lines, place.line).strip()


def _line(lines: list[str], number: int) -> str:
    return lines[number - 1] if 1 <= number <= len(lines) else ""


@functools.lru_cache(maxsize=1024)
def _position(code: CodeType, number: int) -> tuple[int | None, int | None, int | None, int | None]:
    """Return the lines and columns of one instruction: Python goes through those of the whole function for it."""
    return next(itertools.islice(code.co_positions(), number, None))


@functools.lru_cache(maxsize=1024)
def is_constant(place: Place | None, name: str) -> bool:
    """Tell whether the calls of a name at a place are given numbers that stand there: ``torch.tensor([0.5, 1.0])``."""
    try:
        parts = ast.walk(ast.parse(expression(place) if place else ""))
        calls = [each for each in parts if isinstance(each, ast.Call) and ast.unparse(each.func).endswith(name)]
        given = [each.args[1:] if name == "full" else each.args for each in calls]  # full(size, number)
        return bool(calls) and all(map(_stand_there, given))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return False


def _stand_there(nodes: list[ast.expr]) -> bool:
    return bool(nodes) and all(isinstance(ast.literal_eval(each), (int, float, list, tuple)) for each in nodes)


def source_site(place: Place, mechanism: str) -> Site:
    """Return the site of a call that stops the gradient by itself."""
    return Site(place.code.co_filename, place.line, code_name(place.code), mechanism, "call")
