"""From what the user names to source files, by path search alone: nothing of the target is imported.

``importlib.util.find_spec("a.b")`` would import ``a``; so the first name is looked up with the finders of
``sys.meta_path`` (which include those of editable installs) and every further one in the folders found.
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path, PurePosixPath

from gradscope.errors import UsageError

SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules", ".git", ".hg", ".svn", ".tox", ".nox", ".venv"})


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to scan; ``archive`` is the zip file that holds it, ``path`` is then the member's name.

    ``is_outside``: of no target, but followed from one.
    """

    path: str
    module: str
    is_package: bool = False
    archive: str = ""
    is_outside: bool = False

    @property
    def shown(self) -> str:
        """The path as the user sees it."""
        return os.path.join(self.archive, self.path) if self.archive else self.path

    def read(self) -> bytes:
        """Return the file's bytes; raise ``OSError`` where it cannot be read."""
        if not self.archive:
            with open(self.path, "rb", buffering=0) as stream:  # a buffer of thousands of files, each read whole
                return stream.readall()
        try:
            with zipfile.ZipFile(self.archive) as archive:
                return archive.read(self.path)
        except (zipfile.BadZipFile, KeyError) as error:
            raise OSError(str(error)) from error


@dataclass(slots=True)
class Resolved:
    """The files of all targets, what was skipped and why, and the entry where a target names one."""

    files: dict[str, SourceFile] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)


def resolve(targets: tuple[str, ...]) -> Resolved:
    """Return the source files that the targets mean.

    A target is a path, a dotted module or package (also with a class or function behind it), or the name
    of an installed distribution.

    Raises:
        UsageError: nothing of that name is found.
    """
    resolved = Resolved()
    for target in targets:
        if not target.strip():
            raise UsageError("A target is empty.", hint="Give a module, a file, a folder or a distribution.")
        path = Path(target)
        if target.endswith((".zip", ".whl")) and path.is_file():
            _add_archive(resolved, str(path), PurePosixPath(), "")
        elif (path.exists() and not _is_only_a_name(path)) or os.sep in target or target.endswith(".py"):
            _add_path(resolved, path)
        elif not (_add_dotted(resolved, target) or _add_distribution(resolved, target)):
            if path.exists():
                _add_path(resolved, path)
                continue
            raise UsageError(
                f"There is no file, module or installed package called {target!r}.",
                hint="Give a path, or run the Python that has the package: python -m gradscope scan ...",
            )
    return resolved


def _is_only_a_name(path: Path) -> bool:
    """Tell whether a folder holds no Python at all: ``timm``, where the user keeps weights, hides no package."""
    return path.is_dir() and next(path.rglob("*.py"), None) is None


# --- paths -------------------------------------------------------------------------------------------


def _add_path(resolved: Resolved, path: Path) -> None:
    if path.is_file():
        _add_file(resolved, path, _module_of(path))
    elif path.is_dir():
        prefix = _module_of(path) if (path / "__init__.py").is_file() else ""
        _add_folder(resolved, path, prefix)
    else:
        raise UsageError(f"There is no file or folder {path}.", hint="Check the path, or give a dotted module name.")


def _module_of(path: Path) -> str:
    """Return the dotted name that Python would import a file or package folder under."""
    path = path.absolute()
    parts = [] if path.name == "__init__.py" else [path.stem if path.suffix == ".py" else path.name]
    folder = path.parent
    while (folder / "__init__.py").is_file() and folder != folder.parent:
        parts.append(folder.name)
        folder = folder.parent
    return ".".join(reversed(parts)) or path.parent.name


def _add_file(resolved: Resolved, path: Path, module: str) -> None:
    resolved.files.setdefault(str(path), SourceFile(str(path), module, path.name == "__init__.py"))


def _add_folder(resolved: Resolved, folder: Path, prefix: str) -> None:
    """Add every ``.py`` file below a folder; a link that leads back up is skipped and named."""
    pending: list[tuple[str, str, frozenset[str]]] = [(str(folder), prefix, frozenset())]
    while pending:
        current, package, above = pending.pop()
        real = os.path.realpath(current)
        if real in above:
            resolved.skipped.append((current, "a symbolic link back to a folder above it"))
            continue
        try:
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            resolved.skipped.append((current, error.strerror or "cannot be read"))
            continue
        for entry in entries:
            dotted = f"{package}." if package else ""
            if entry.name.endswith(".py"):
                name = package if entry.name == "__init__.py" else f"{dotted}{entry.name[:-3]}"
                _add_entry(resolved, entry, name or "__init__")
            elif entry.is_dir() and not _is_skipped(entry):
                pending.append((entry.path, f"{dotted}{entry.name}", above | {real}))


def _add_entry(resolved: Resolved, entry: os.DirEntry[str], module: str) -> None:
    if entry.is_file():
        resolved.files.setdefault(entry.path, SourceFile(entry.path, module, entry.name == "__init__.py"))
    elif entry.is_symlink():
        resolved.skipped.append((entry.path, "a symbolic link that leads nowhere"))


def _is_skipped(entry: os.DirEntry[str]) -> bool:
    return (
        entry.name in SKIPPED_FOLDERS
        or entry.name.startswith(".")
        or os.path.isfile(os.path.join(entry.path, "pyvenv.cfg"))
    )


# --- names -------------------------------------------------------------------------------------------


def _add_dotted(resolved: Resolved, dotted: str) -> bool:
    """Add the module that the longest part of a dotted name means; the rest is an entry in it."""
    names = dotted.split(".")
    if not all(name.isidentifier() for name in names):
        return False
    spec, depth = _find(names)
    if spec is None:
        return False
    module = ".".join(names[:depth])
    if names[depth:]:
        resolved.entries.append(".".join(names[depth:]))
    _add_spec(resolved, spec, module)
    return True


def _find(names: list[str]) -> tuple[ModuleSpec | None, int]:
    spec = find_first(names[0])
    depth = 1
    while spec is not None and depth < len(names):
        locations = locations_of(spec)
        deeper = PathFinder.find_spec(names[depth], locations) if locations else None
        if deeper is None:
            break
        spec, depth = deeper, depth + 1
    return spec, depth


def find_first(name: str) -> ModuleSpec | None:
    """Ask the finders for a top-level name, with the working folder first as ``python -m`` has it."""
    path = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(name, None) if find else None
            if spec is not None:
                return spec  # type: ignore[no-any-return]
    finally:
        sys.path[:] = path
    return None


def locations_of(spec: ModuleSpec) -> list[str]:
    """Return the folders in which the modules of a package lie."""
    found = spec.submodule_search_locations
    if spec.origin and "." not in spec.name and found and _is_spread(spec.origin):
        return list(dict.fromkeys([*found, *filter(os.path.isdir, (os.path.join(at, spec.name) for at in sys.path))]))
    # A namespace package's own object would look its parent up in sys.modules when it is iterated.
    return list(getattr(found, "_path", None) or found or ())


def _is_spread(init: str) -> bool:
    """Tell an old namespace package, whose ``__init__`` adds the folders of its name elsewhere on the path."""
    try:
        with open(init, "rb") as stream:
            text = stream.read(4000)
    except OSError:
        return False
    return b"extend_path" in text or b"declare_namespace" in text


def _add_spec(resolved: Resolved, spec: ModuleSpec, module: str) -> None:
    for location in locations_of(spec):
        archive, inner = _split_archive(location)
        if archive:
            _add_archive(resolved, archive, PurePosixPath(inner), module)
        else:
            _add_folder(resolved, Path(location), module)
    if locations_of(spec) or not spec.origin:
        return
    archive, inner = _split_archive(spec.origin)
    if archive:
        resolved.files[spec.origin] = SourceFile(inner, module, archive=archive)
    elif spec.origin.endswith(".py"):
        _add_file(resolved, Path(spec.origin), module)
    else:
        resolved.skipped.append((spec.origin, "has no Python source"))


def _split_archive(path: str) -> tuple[str, str]:
    """Return the zip file and the member that a path inside one means, or two empty strings."""
    head = path
    while head and not os.path.exists(head) and os.path.dirname(head) != head:
        head = os.path.dirname(head)
    if head != path and os.path.isfile(head) and zipfile.is_zipfile(head):
        return head, os.path.relpath(path, head).replace(os.sep, "/")
    return ("", "")


def _add_archive(resolved: Resolved, archive: str, folder: PurePosixPath, module: str) -> None:
    try:
        with zipfile.ZipFile(archive) as opened:
            names = opened.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        resolved.skipped.append((archive, str(error)))
        return
    for name in names:
        path = PurePosixPath(name)
        if path.suffix == ".py" and path.is_relative_to(folder):
            parts = list(path.relative_to(folder).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            dotted = ".".join([*filter(None, [module]), *(parts[:-1] if is_package else parts)])
            resolved.files[f"{archive}/{name}"] = SourceFile(name, dotted or "__init__", is_package, archive)


def _add_distribution(resolved: Resolved, name: str) -> bool:
    """Add the top-level modules of an installed distribution, whose name need not be theirs."""
    # Most targets are none, and importing it takes longer than scanning a file.
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found = distribution(name)
    except (PackageNotFoundError, ValueError):
        return False
    tops = sorted({top for top in _tops(found.files or []) if top.isidentifier()})
    added = [top for top in tops if _add_dotted(resolved, top)]
    return bool(added)


def _tops(files: Iterable[object]) -> Iterator[str]:
    for file in files:
        path = PurePosixPath(str(file))
        if path.suffix == ".py" and ".." not in path.parts:
            yield path.parts[0] if len(path.parts) > 1 else path.stem
