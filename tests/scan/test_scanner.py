"""The whole scan: real packages, the cache, ignore comments, processes, and that torch stays out."""

from __future__ import annotations

import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FunctionType

import pytest

from gradscope.scanning.scanner import scan
from gradscope.session import Session

NET = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            return self.layer(x)
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADSCOPE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


def said(session: Session) -> dict[str, object]:
    data = session.to_dict()
    del data["stats"]
    return data


# --- the founding case -------------------------------------------------------------------------------


def test_the_founding_case() -> None:
    package = pytest.importorskip("deepseek_ocr_encoder")
    session = scan("deepseek_ocr_encoder", cache=False)
    lines = Path(package.__file__).with_name("encoder.py").read_text().split("\n")
    decorators = [number for number, line in enumerate(lines, 1) if line.strip() == "@torch.inference_mode()"]
    errors = [each for each in session.findings if each.severity == "error"]
    assert [each.line for each in errors] == decorators and len(decorators) == 3
    assert {each.function.rpartition(".")[2] for each in errors} == {"encode", "_forward_core", "capture_cudagraph"}
    assert session.verdict == "blocked"
    call = next(entry for entry in session.entries if entry["function"].endswith("__call__"))
    chain = [step["function"].rpartition(".")[2] for step in call["chain"]]
    assert call["status"] == "blocked"
    assert (chain[0], chain[1], chain[-1]) == ("__call__", "encode", "_forward_core")
    assert {"sam", "clip_pre", "clip_tr"} <= set(call["clean"])
    assert not {"encode", "_forward_core"} & set(call["clean"])


@pytest.mark.parametrize(("package", "at_least"), [("torchvision", 5), ("torch.nn", 2)])
def test_every_decorated_function_that_runs_has_a_site(package: str, at_least: int) -> None:
    """An oracle that shares nothing with the scan: import the package and look at what wraps its functions."""
    pytest.importorskip(package.partition(".")[0])
    decorated = {(each.path, each.function) for each in scan(package, cache=False).findings if each.how == "decorator"}
    wrapped = set(switched_functions(package))
    missed = {(path, name) for path, name in wrapped if not any(path.endswith(p) and f == name for p, f in decorated)}
    assert missed == set()
    assert len(wrapped) >= at_least


def switched_functions(package: str) -> Iterator[tuple[str, str]]:
    """Import every module of a package; yield file and name of each function in a grad-mode switch's wrapper."""
    top = importlib.import_module(package)
    names = [package, *(info.name for info in pkgutil.walk_packages(top.__path__, f"{package}."))]
    for name in names:
        try:
            members = list(vars(importlib.import_module(name)).values())
        except Exception:  # an optional dependency of theirs
            continue
        members += [item for each in members if inspect.isclass(each) for item in vars(each).values()]
        for member in filter(inspect.isfunction, members):
            inner = getattr(member, "__wrapped__", None)
            held = contents(member) if inspect.isfunction(inner) else []
            switches = ("torch.no_grad", "torch.autograd.grad_mode", "_NoParamDecoratorContextManager")
            is_switched = any(switch in str(value) for value in held for switch in switches)
            if is_switched and inner.__module__.startswith(package):
                yield inner.__code__.co_filename, inner.__qualname__


def contents(function: FunctionType) -> list[object]:
    """Return what a function's closure holds; a cell may still be empty."""
    held: list[object] = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            held.append(cell.cell_contents)
    return held


def test_torch_is_never_imported(net: Path) -> None:
    program = (
        "import sys, gradscope.cli.main\nsys.argv = ['gradscope', 'scan', 'net.py']\n"
        "try:\n    gradscope.cli.main.main()\nexcept SystemExit as error:\n    code = error.code\n"
        "print(code, 'torch' in sys.modules, 'net' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[-2] == "1 False False"


# --- the cache -----------------------------------------------------------------------------------------


def test_a_second_scan_comes_from_the_cache_and_says_the_same(net: Path) -> None:
    first, second = scan("net.py"), scan("net.py")
    assert (first.stats["parsed"], second.stats["parsed"], second.stats["cached"]) == (1, 0, 1)
    assert said(first) == said(second) == said(scan("net.py", cache=False))


def test_a_changed_file_is_read_again(net: Path) -> None:
    assert scan("net.py").verdict == "blocked"
    stat = net.stat()
    net.write_text(NET.replace("torch.no_grad()", "torch.ones(1) ")[: len(NET)])
    os.utime(net, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # content decides, not the clock
    net.write_text(NET.replace("with torch.no_grad():", "if True:"))
    assert scan("net.py").findings == []


@pytest.mark.parametrize("damage", [b"", b"not a database", b"SQLite format 3\0" + b"\0" * 2000])
def test_a_damaged_cache_is_put_aside(net: Path, tmp_path: Path, damage: bytes) -> None:
    before = said(scan("net.py"))
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    (tmp_path / "cache" / "scan.sqlite").write_bytes(damage)
    assert said(scan("net.py")) == before
    assert said(scan("net.py")) == before


@pytest.mark.parametrize("damaged", ["'{\"half'", "'{}'", "replace(value, 'error', 'note')", "x'00ff'", "null"])
def test_a_wrong_value_in_the_cache_is_a_miss(net: Path, tmp_path: Path, damaged: str) -> None:
    before = said(scan("net.py"))
    with sqlite3.connect(tmp_path / "cache" / "scan.sqlite") as database:
        assert database.execute(f"update entries set value = {damaged}").rowcount > 0
    database.close()
    assert said(scan("net.py")) == before


def test_a_cache_that_cannot_be_written_is_no_error(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRADSCOPE_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert scan("net.py").verdict == "blocked"


def test_scans_at_the_same_time(net: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = [task.result() for task in [pool.submit(scan, "net.py") for _ in range(12)]]
    assert len({json.dumps(said(result)) for result in results}) == 1


@pytest.mark.parametrize("begun_by", multiprocessing.get_all_start_methods())
def test_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun_by: str) -> None:
    monkeypatch.setattr("gradscope.scanning.collect.WORTH_A_PROCESS", 100)
    for number in range(12):
        (tmp_path / f"net{number}.py").write_text(NET.replace("Net", f"Net{number}"))
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(begun_by, force=True)
    try:
        one, many = scan(str(tmp_path), jobs=1, cache=False), scan(str(tmp_path), jobs=3, cache=False)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert said(one) == said(many)
    assert len(one.findings) == 12


def test_a_killed_worker_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradscope.scanning.collect.WORTH_A_PROCESS", 100)
    for number in range(12):
        (tmp_path / f"net{number}.py").write_text(NET.replace("Net", f"Net{number}"))
    expected = said(scan(str(tmp_path), jobs=1, cache=False))
    monkeypatch.setattr(
        "gradscope.scanning.collect.Collector._processes",
        lambda _: ProcessPoolExecutor(2, initializer=os._exit, initargs=(1,)),
    )
    assert said(scan(str(tmp_path), jobs=2, cache=False)) == expected


# --- ignore comments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("comment", ["", "[GS104]", "[no-grad-block] frozen tower", "[GS101, GS104]", "[GS1]"])
def test_an_ignore_comment_hides_its_finding(net: Path, comment: str) -> None:
    switch = "with torch.no_grad():"
    for source in (
        NET.replace(switch, f"{switch}  # gradscope: ignore{comment}"),
        NET.replace(switch, f"# gradscope: ignore{comment}\n        {switch}"),
    ):
        net.write_text(source)
        session = scan("net.py")
        assert session.findings == [] and session.verdict == "flows"
        assert session.remarks == ["1 finding is hidden by ignore comments."]


def test_an_ignore_that_hides_nothing_is_named(net: Path) -> None:
    net.write_text(NET.replace("torch.no_grad():", "torch.no_grad():  # gradscope: ignore[GS101]"))
    session = scan("net.py")
    assert len(session.findings) == 1
    assert session.remarks == ["net.py:11: this ignore comment hides nothing; remove it."]
    net.write_text(NET + "TEXT = '# gradscope: ignore'\n# gradscope: ignore[GS999]\n")
    assert [remark.split(": ")[1] for remark in scan("net.py").remarks] == ["the ignore comment is not understood"]
