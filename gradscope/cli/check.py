"""``gradscope check``: everything that the configuration names, one report, one exit code."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from gradscope.cli.options import configuration, gate_options, report_options
from gradscope.cli.output import SCAN_FORMATS, Reporting
from gradscope.cli.progress import staged
from gradscope.config import Config
from gradscope.errors import GradscopeError, UsageError, in_words
from gradscope.expectations import Run
from gradscope.gate import Gate
from gradscope.merging import Part, merged
from gradscope.session import Comparison, Session

Analysis = Callable[[], Session]


@click.command("check", context_settings={"help_option_names": ["-h", "--help"]})
@gate_options()
@report_options(SCAN_FORMATS)
def command(gate: Gate, reporting: Reporting) -> int:
    """Scan and trace everything that [tool.gradscope] in pyproject.toml names, and hold it against what is expected.

    Works from the folder of that file, and paths are relative to it. A target that cannot be analysed stops none of
    the others. Of the exit codes of all targets the gravest counts: 2, then 1, then 3, then 0.

    \b
    Examples:
      gradscope check
      gradscope check --format github -o report.json
      gradscope check --update-baseline
    """
    config = configuration()
    orders = _orders(config)
    if not orders:
        raise UsageError(
            "There is nothing to check: no pyproject.toml from here upward names targets, traces or expectations.",
            hint="Add them under [tool.gradscope]: targets = ['src'], [[tool.gradscope.trace]], "
            "[[tool.gradscope.expect]]. docs/ci.md shows how.",
        )
    with _working_in(config.folder):
        parts = _run_all(orders, reporting)
    gate = _updated(gate, parts, config.folder, source=reporting.source)
    judged = [_judged(part, gate, config.folder) for part in parts]
    name = config.path.name if config.path is not None else ""
    return reporting.conclude(merged(judged, name, _comparison(gate, parts, config.folder)), gate)


def _orders(config: Config) -> dict[tuple[str, str], Analysis]:
    """Return what to run by kind and name: one scan of all targets, and each trace once."""
    orders: dict[tuple[str, str], Analysis] = {}
    if config.targets:
        orders["scan", f"scan {' '.join(config.targets)}"] = lambda: _scan(config.targets)
    for run in dict.fromkeys((*config.traces, *(each.run for each in config.expectations))):
        name = " ".join(filter(None, ("trace", run.name, run.entry)))
        if ("trace", name) in orders:
            name = " ".join((name, *run.input, str(len(orders))))
        orders["trace", name] = lambda run=run: _trace(run)  # type: ignore[misc]
    return orders


def _run_all(orders: dict[tuple[str, str], Analysis], reporting: Reporting) -> list[Part]:
    parts = []
    for number, ((kind, name), analysis) in enumerate(orders.items(), start=1):
        started = time.perf_counter()
        session: Session | None = None
        failure: GradscopeError | None = None
        with staged(reporting.progress(), f"[{number}/{len(orders)}] {name}", "starting"):
            try:
                session = analysis()
            except GradscopeError as error:
                failure = error
            except Exception as error:  # one target's trouble is not the others'
                failure = UsageError(f"gradscope failed: {in_words(error)}.", hint=f"See: gradscope {name}")
        parts.append(Part(name, kind, session, failure, time.perf_counter() - started))
    return parts


def _scan(targets: tuple[str, ...]) -> Session:
    from gradscope.scanning.scanner import scan

    return scan(*targets)


def _trace(run: Run) -> Session:
    from gradscope.cli.trace import trace_target
    from gradscope.targets.request import Request

    request = Request(
        inputs=run.input, weights=run.weights, seed=run.seed, fixed=run.fixed, head=run.head, entry=run.entry,
        wrt=run.wrt, trainable=run.trainable, loss=run.loss,
    )  # fmt: skip
    return trace_target(
        run.target or None, run.model or None, request, run.mode, run.device, run.dtype,
        verify=run.verify, numeric=run.numeric,
    )  # fmt: skip


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Work in a folder for a while: the configuration names its targets from where it lies."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _judged(part: Part, gate: Gate, root: Path) -> Part:
    """Return the part as the gate sees it, expectations too named from the root."""
    if part.session is None:
        return part
    return dataclasses.replace(part, session=_seen_from(root, gate.judged(part.session)))


def _seen_from(root: Path, session: Session) -> Session:
    findings = [
        dataclasses.replace(each, path=os.path.relpath(each.path, root)) if each.how == "expectation" else each
        for each in session.findings
    ]
    return dataclasses.replace(session, findings=findings)


def _updated(gate: Gate, parts: list[Part], root: Path, *, source: bool) -> Gate:
    """Write the baseline of the whole project where that is asked for: what no target has is not in it any more."""
    baseline = gate.baseline
    if baseline is None or not gate.update:
        return gate
    failed = [part.name for part in parts if part.session is None or (part.kind == "trace" and part.session.in_doubt)]
    if failed:
        click.echo(f"{baseline.path} was not written: {', '.join(failed)} could not be analysed.", err=True)
        return gate
    sessions = _to_write_down(gate, parts, root)
    renewed = baseline.only_of(sessions)
    for session in sessions:
        renewed = renewed.updated(session if source else session.without_source())
    renewed.save()
    click.echo(f"wrote {baseline.path}", err=True)
    return dataclasses.replace(gate, baseline=renewed)


def _comparison(gate: Gate, parts: list[Part], root: Path) -> Comparison | None:
    if gate.baseline is None:
        return None
    return Comparison(str(gate.baseline.path), gate.baseline.gone(_to_write_down(gate, parts, root)))


def _to_write_down(gate: Gate, parts: list[Part], root: Path) -> list[Session]:
    return [_seen_from(root, gate.to_write_down(part.session)) for part in parts if part.session is not None]
