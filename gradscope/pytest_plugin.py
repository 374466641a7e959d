"""The pytest plugin: a fixture and a marker that ask whether the gradient arrives, and one report of a run.

Every pytest on a machine that has gradscope loads this module: it imports pytest and nothing else. torch, and what
traces, is imported by the first test that asks.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import textwrap
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gradscope.session import Session

MARKER = "grad_flow"
OPTIONS = ("wrt", "allow", "entry", "trainable", "mode", "device", "numeric", "verify", "loss")
MOST_LINES = 12
# Where a test's sessions travel: an attribute of its reports, which pytest-xdist sends to the controller as JSON.
ATTRIBUTE = "gradscope_sessions"
COLLECTED = pytest.StashKey["list[Session]"]()
# Whether the test itself is over: then no frame of it is left to show, and what the marker says stands alone.
RETURNED = pytest.StashKey[bool]()


class Tracer:
    """What the fixture gives: the calls of the library, bound to a test; what they find goes into the report.

    ``sessions`` are those of this test, in order. Options that the test's ``grad_flow`` marker has are the defaults.
    """

    def __init__(self, sessions: list[Session], defaults: dict[str, Any]) -> None:
        self.sessions = sessions
        self._defaults = defaults

    def trace(self, model: Any, *inputs: Any, **options: Any) -> Session:
        """Trace the model as ``gradscope.trace`` does, whatever comes out."""
        __tracebackhide__ = True
        return self._traced(model, inputs, options)

    def assert_flows(
        self, model: Any, *inputs: Any, wrt: str | Iterable[str] = (), allow: str | Iterable[str] = (), **options: Any
    ) -> Session:
        """Fail with the first cut's file and line unless the gradient arrives; see ``assert_gradients_flow``."""
        __tracebackhide__ = True
        from gradscope.assertion import require_flow

        asked = {name: value for name, value in (("wrt", wrt), ("allow", allow)) if value}
        return require_flow(self._traced(model, inputs, {**asked, **options}))

    assert_gradients_flow = assert_flows  # as the library calls it, whose name the fixture hides

    def _traced(self, model: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Session:
        __tracebackhide__ = True
        from gradscope.errors import GradscopeError, UsageError

        try:
            from gradscope.tracing.library import trace_allowing
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise UsageError("Tracing needs torch, which is not installed here.", hint="Install it.") from None
        try:
            session = trace_allowing(model, *inputs, **{**self._defaults, **options})
        except GradscopeError as error:
            # What it says is enough; where in gradscope it was noticed helps nobody.
            raise error.with_traceback(None) from None
        self.sessions.append(session)
        return session


@pytest.fixture
def gradscope(request: pytest.FixtureRequest) -> Tracer:
    """Trace models within a test: ``trace(model, *inputs)`` and ``assert_flows(model, *inputs, wrt=, allow=)``."""
    return _tracer(request.node)


def _tracer(item: pytest.Item) -> Tracer:
    return Tracer(item.stash.setdefault(COLLECTED, []), _marked(item) or {})


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--gradscope-report``."""
    parser.getgroup("gradscope").addoption(
        "--gradscope-report",
        action="append",
        default=[],
        metavar="PATH",
        help="Write what the traces of this run found; the suffix picks the format (.html, .json, ...). Repeatable.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker; refuse a report that could not be written, before any test runs."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}({', '.join(f'{name}=...' for name in OPTIONS)}): the gradient must arrive in the model that the "
        "test returns with its inputs: `return model, x`.",
    )
    wanted = config.getoption("gradscope_report", [])
    if wanted:
        from gradscope.report import formats

        for path in wanted:
            if not formats.format_of(Path(path)):
                known = ", ".join(suffix for each in formats.FORMATS.values() for suffix in each.suffixes)
                raise pytest.UsageError(f"--gradscope-report {path}: the suffix names no format; use one of {known}.")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Run(config, [Path(path) for path in wanted]), "gradscope-run")


# --- the marker ------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Ask about what a marked test returns; functions, methods and ``unittest`` tests alike are called through it."""
    if isinstance(item, pytest.Function) and item.get_closest_marker(MARKER):
        item.stash[RETURNED] = True
        item.obj = _judging(item.obj, item, _tracer(item))


def _marked(item: pytest.Item) -> dict[str, Any] | None:
    """Return the options of the marker, the closest one last; None for a test without it."""
    marks = list(item.iter_markers(MARKER))
    if not marks:
        return None
    options: dict[str, Any] = {}
    for mark in reversed(marks):
        unknown = [name for name in mark.kwargs if name not in OPTIONS]
        if mark.args or unknown:
            said = f"not {unknown[0]!r}" if unknown else "by name"
            raise pytest.UsageError(f"@pytest.mark.{MARKER} takes {', '.join(OPTIONS)}, {said}.")
        options |= mark.kwargs
    return options


def _judging(test: Callable[..., Any], item: pytest.Item, tracer: Tracer) -> Callable[..., None]:
    @functools.wraps(test)
    def judged(*args: Any, **kwargs: Any) -> None:
        __tracebackhide__ = True
        item.stash[RETURNED] = False
        returned = test(*args, **kwargs)
        if returned is None and tracer.sessions:
            return  # it asked by itself, through the fixture
        item.stash[RETURNED] = True
        model, inputs, named = _model_and_inputs(returned)
        tracer.assert_flows(model, *inputs, **named)

    return judged


def _model_and_inputs(returned: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Take apart ``model, x`` or ``model, x, y``, or ``model, (x, y)`` or ``model, {"pixels": x}``."""
    if not (isinstance(returned, tuple) and len(returned) > 1 and callable(returned[0])):
        raise pytest.UsageError(
            f"A test with @pytest.mark.{MARKER} returns the model and its inputs (return model, x), "
            f"not {type(returned).__name__}; or it calls the fixture gradscope."
        )
    model, *inputs = returned
    if len(inputs) == 1 and isinstance(inputs[0], dict):
        return model, (), inputs[0]
    if len(inputs) == 1 and type(inputs[0]) is tuple:
        return model, inputs[0], {}
    return model, tuple(inputs), {}


# --- the reports -----------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hang the sessions on the report, and show the test where the marker failed it after its last line."""
    report = yield
    sessions = item.stash.get(COLLECTED, None)
    if sessions and call.when == "teardown":
        whole = bool(item.config.getoption("gradscope_report"))
        setattr(report, ATTRIBUTE, json.dumps([_to_send(session, whole=whole) for session in sessions]))
    if call.when == "call" and call.excinfo is not None and item.stash.get(RETURNED, False):
        report.longrepr = _without_frames(item, call.excinfo)
    return report


def _to_send(session: Session, *, whole: bool) -> dict[str, Any]:
    data = session.to_dict()
    if not whole:
        data |= {"graph": {}, "healed": None}
    return data


def _without_frames(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:
    """Return the failure as pytest shows one: the test, its last line marked, and what is wrong below it."""
    shown: Any = excinfo.getrepr(style="value")
    lines, first = inspect.getsourcelines(inspect.unwrap(getattr(item, "obj")))  # noqa: B009 - items have none by type
    source = textwrap.dedent("".join(lines)).rstrip().splitlines()
    indent = " " * (len(source[-1]) - len(source[-1].lstrip()))
    entry = shown.reprtraceback.reprentries[-1]
    said = [f"E   {indent}{text}".rstrip() for text in excinfo.exconly().splitlines()]
    entry.lines = [f"    {line}".rstrip() for line in source[:-1]] + [f">   {source[-1]}", *said]
    entry.style = "long"
    shown.reprcrash.path, shown.reprcrash.lineno = item.location[0], first + len(source) - 1
    entry.reprfileloc = copy.copy(shown.reprcrash)
    entry.reprfileloc.message = excinfo.typename
    return shown


class _Run:
    """The whole run, on the controller: gathers what every test found, writes the reports, sums up."""

    def __init__(self, config: pytest.Config, paths: list[Path]) -> None:
        self.config = config
        self.paths = paths
        self.traces: list[tuple[str, Session]] = []
        self.written: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the sessions off a report; with pytest-xdist it came from a worker."""
        sent = getattr(report, ATTRIBUTE, None)
        if sent:
            from gradscope.session import Session

            self.traces += [(report.nodeid, Session.from_dict(data)) for data in json.loads(sent)]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the reports; one that cannot be written fails a run that would have passed."""
        if not (self.paths and self.traces):
            return
        from gradscope.errors import UsageError
        from gradscope.gathering import gathered
        from gradscope.report import formats

        whole = gathered(_named(self.traces))
        for path in self.paths:
            try:
                content = formats.render(whole, formats.format_of(path))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                self.written.append(f"wrote {path}")
            except (UsageError, OSError) as error:
                self.written.append(f"could not write {path}: {error}")
                if session.exitstatus == pytest.ExitCode.OK:
                    session.exitstatus = pytest.ExitCode.USAGE_ERROR

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Sum up the traces: those in which the gradient does not arrive, and the reports written."""
        if not self.traces:
            if self.paths:
                terminalreporter.section("gradscope")
                terminalreporter.line("no test traced a model: no report was written")
            return
        from gradscope.assertion import asked_in_vain, unmet

        failing = [(name, session, unmet(session)) for name, session in self.traces]
        shown = [each for each in failing if each[2] or each[1].verdict == "crashes" or asked_in_vain(each[1])]
        terminalreporter.section("gradscope")
        passed = len(failing) - len(shown)
        said = "1 trace" if len(failing) == 1 else f"{len(failing)} traces"
        terminalreporter.line(f"{said}: the gradient arrives in {passed}, does not in {len(shown)}")
        for name, session, findings in shown[:MOST_LINES]:
            first = findings[0] if findings else None
            where = f"  {first.path}:{first.line}: {first.rule} {first.name}" if first else ""
            what = "unused" if asked_in_vain(session) and not first else session.verdict
            terminalreporter.line(f"{what:<8} {name}{where}", red=True)
        if len(shown) > MOST_LINES:
            terminalreporter.line(f"and {len(shown) - MOST_LINES} more")
        for line in self.written:
            terminalreporter.line(line)


def _named(traces: list[tuple[str, Session]]) -> list[tuple[str, Session]]:
    """Name each trace by its test, without the file where all are in one."""
    files = {test.partition("::")[0] for test, _ in traces}
    return [(test.partition("::")[2] or test, session) for test, session in traces] if len(files) == 1 else traces
