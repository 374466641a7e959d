# ruff: noqa: E501, UP031 - templates under test stay on one line
"""Names to files by path search alone: whatever kind of package, nothing of it runs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gradscope.errors import NotAnalysedError, UsageError
from gradscope.scanning.resolve import resolve
from gradscope.scanning.scanner import scan

# Any execution of the target leaves a file behind.
TRAP = "import pathlib; pathlib.Path(__file__).with_suffix('.ran').write_text('')\n"


def package(root: Path, name: str, *modules: str, init: bool = True) -> Path:
    folder = root.joinpath(*name.split("."))
    folder.mkdir(parents=True)
    if init:
        (folder / "__init__.py").write_text(TRAP)
    for module in modules:
        (folder / f"{module}.py").write_text(TRAP)
    return folder


def modules(*targets: str) -> set[str]:
    return {file.module for file in resolve(targets).files.values()}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder on ``sys.path``; the test fails if anything in it was run."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    assert list(tmp_path.rglob("*.ran")) == []
    assert not {name for name in set(sys.modules) - before if name.startswith("trap")}


def test_a_package_a_submodule_and_what_lies_below(site: Path) -> None:
    package(site, "trap_a", "one")
    package(site, "trap_a.inner", "two")
    assert modules("trap_a") == {"trap_a", "trap_a.one", "trap_a.inner", "trap_a.inner.two"}
    assert modules("trap_a.inner") == {"trap_a.inner", "trap_a.inner.two"}
    assert modules("trap_a.inner.two", "trap_a.one") == {"trap_a.inner.two", "trap_a.one"}


def test_a_namespace_package_over_two_folders(site: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    package(site, "trap_ns.left", "a", init=False)
    package(other, "trap_ns.right", "b", init=False)
    sys.path.insert(0, str(other))
    try:
        assert modules("trap_ns") == {"trap_ns.left.a", "trap_ns.right.b"}
        assert modules("trap_ns.left.a") == {"trap_ns.left.a"}
    finally:
        sys.path.remove(str(other))


def test_the_working_folder_wins(
    site: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(site, "trap_b", "installed")
    mine = tmp_path_factory.mktemp("mine")
    package(mine, "trap_b", "mine")
    monkeypatch.chdir(mine)
    assert modules("trap_b") == {"trap_b", "trap_b.mine"}
    assert modules("trap_b.mine") == {"trap_b.mine"}


def test_a_class_or_function_behind_the_module_is_an_entry(site: Path) -> None:
    package(site, "trap_c", "net")
    resolved = resolve(("trap_c.net.Net.forward",))
    assert [file.module for file in resolved.files.values()] == ["trap_c.net"]
    assert resolved.entries == ["Net.forward"]


@pytest.mark.parametrize("where", ["archive", "sys.path"])
def test_a_zipped_package(site: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = site / "packed.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("trap_z/__init__.py", "")
        opened.writestr("trap_z/net.py", "import torch\ntorch.set_grad_enabled(False)\n")
    if where == "sys.path":
        monkeypatch.syspath_prepend(str(archive))
        assert modules("trap_z") == {"trap_z", "trap_z.net"}
        assert modules("trap_z.net") == {"trap_z.net"}
    session = scan(str(archive) if where == "archive" else "trap_z", cache=False)
    assert [(each.rule, each.line) for each in session.findings] == [("GS105", 2)]


@pytest.mark.parametrize("kind", ["pth", "finder"])
def test_an_editable_install(tmp_path: Path, kind: str) -> None:
    """In an environment of its own: a path file, and a finder such as setuptools installs."""
    source = tmp_path / "src"
    package(source, "trap_e", "net")
    site_packages = tmp_path / "site"
    site_packages.mkdir()
    if kind == "pth":
        (site_packages / "trap_e.pth").write_text(str(source))
    else:
        (site_packages / "__editable___trap_e_finder.py").write_text(
            "import sys\nfrom importlib.util import spec_from_file_location\nMAPPING = {'trap_e': %r}\n"
            "class Finder:\n    @classmethod\n    def find_spec(cls, name, path=None, target=None):\n"
            "        if name in MAPPING:\n            root = MAPPING[name]\n"
            "            return spec_from_file_location(name, root + '/__init__.py', submodule_search_locations=[root])\n"
            "def install():\n    sys.meta_path.append(Finder)\n" % str(source / "trap_e")
        )
        (site_packages / "__editable__.trap_e.pth").write_text(
            "import __editable___trap_e_finder; __editable___trap_e_finder.install()"
        )
    program = (
        f"import site; site.addsitedir({str(site_packages)!r})\n"
        "from gradscope.scanning.resolve import resolve\n"
        "print(sorted(file.module for file in resolve(('trap_e.net', 'trap_e')).files.values()))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.strip() == "['trap_e', 'trap_e.net']"
    assert list(tmp_path.rglob("*.ran")) == []


def test_a_distribution_whose_package_has_another_name() -> None:
    pytest.importorskip("PIL")
    assert "PIL.Image" in modules("pillow")


def test_a_file_knows_the_package_it_is_in(site: Path) -> None:
    folder = package(site, "trap_f.sub", "net")
    (folder.parent / "__init__.py").write_text(TRAP)
    assert modules(str(folder / "net.py")) == {"trap_f.sub.net"}
    assert modules(str(folder)) == {"trap_f.sub", "trap_f.sub.net"}


def test_links_in_a_loop_end(tmp_path: Path) -> None:
    package(tmp_path, "trap_l", "net")
    (tmp_path / "trap_l" / "again").symlink_to(tmp_path / "trap_l", target_is_directory=True)
    (tmp_path / "trap_l" / "gone.py").symlink_to(tmp_path / "nowhere.py")
    resolved = resolve((str(tmp_path / "trap_l"),))
    assert {os.path.basename(path) for path in resolved.files} == {"__init__.py", "net.py"}
    assert [reason for _, reason in resolved.skipped] == [
        "a symbolic link that leads nowhere", "a symbolic link back to a folder above it",
    ]  # fmt: skip


def test_environments_and_hidden_folders_are_passed_over(tmp_path: Path) -> None:
    for folder in (".git", "venv", "node_modules", "src"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("")
    (tmp_path / "venv" / "pyvenv.cfg").write_text("")
    assert modules(str(tmp_path)) == {"src.a"}


@pytest.mark.parametrize("target", ["no.such.package", "nothing_here", "missing/file.py", "x.py", "", "a b"])
def test_what_does_not_exist_is_said(target: str) -> None:
    with pytest.raises(UsageError):
        resolve((target,))


def test_nothing_to_read_is_not_clean(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(NotAnalysedError):
        scan(str(tmp_path), cache=False)
    with pytest.raises(NotAnalysedError):
        scan("math", cache=False)


def test_an_old_namespace_package_over_two_folders(site: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    spread = "__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n" + TRAP
    for root, module in ((site, "left"), (other, "right")):
        folder = package(root, "trap_old", module)
        (folder / "__init__.py").write_text(spread)
    sys.path.append(str(other))
    try:
        assert modules("trap_old") == {"trap_old", "trap_old.left", "trap_old.right"}
        assert modules("trap_old.right") == {"trap_old.right"}
    finally:
        sys.path.remove(str(other))


def test_a_folder_without_python_hides_no_package(
    site: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(site, "trap_model", "net")
    work = tmp_path_factory.mktemp("work")
    (work / "trap_model").mkdir()
    (work / "trap_model" / "weights.bin").write_bytes(b"")
    monkeypatch.chdir(work)
    assert modules("trap_model") == {"trap_model", "trap_model.net"}


def test_folders_that_link_to_each_other_are_read(tmp_path: Path) -> None:
    for here in ("left", "right"):
        (tmp_path / here).mkdir()
    (tmp_path / "left" / "right").symlink_to(tmp_path / "right")
    (tmp_path / "right" / "left").symlink_to(tmp_path / "left")
    (tmp_path / "left" / "net.py").write_text("import torch\n")
    session = scan(str(tmp_path), cache=False)
    assert len(session.unseen) == 2 and session.stats["files"] == 2


def test_a_module_of_the_users_folder_is_not_run_by_the_command(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(TRAP)
    (tmp_path / "net.py").write_text("import torch\n")
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "gradscope", "scan", "net.py", "--no-cache"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, check=False)
    assert done.returncode == 0 and not (tmp_path / "json.ran").exists()
