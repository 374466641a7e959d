"""A file as text: what it defines, what its names are imported from, and what its functions give, by expressions.

Which files a scan follows is told before any of them is parsed: most of them are not worth it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from gradscope.scanning.blanking import BLOCK, METHOD
from gradscope.scanning.instances import is_factory, loads_models
from gradscope.scanning.reading import decode
from gradscope.scanning.resolve import SourceFile
from gradscope.scanning.switches import add_imports

# Modules imported with a star that are looked into for one name.
MOST_STARRED = 20
# torch's own functions are known by their rules; in the standard library and in these no tensor is computed with.
KNOWN = frozenset({
    "torch", "__future__", *sys.stdlib_module_names,
    *("numpy scipy pandas PIL cv2 matplotlib sklearn tqdm yaml requests packaging typing_extensions einops "
    "datasets wandb").split(),
})  # fmt: skip

# These begin with a line break, not with ``^``: a literal lets the search leap from line to line.
_IMPORT = re.compile(
    r"\n[ \t]*(?:from[ \t]+([.\w]+)[ \t]+import[ \t]*(?:\([^)]*\)|(?:[^\n\\]|\\\n)*)|"
    r"import[ \t]+(\w+)(?:[^\n\\]|\\\n)*)"
)
_DEFINITION = re.compile(r"\n(?:class|def|async[ \t]+def)[ \t]+(\w+)")
# ``registry = {...}``, ``build = build_large``.
_TABLE = re.compile(r"\n([A-Za-z_]\w*)[ \t]*(?::[^=\n]+)?=[ \t]*(?:\{|[A-Za-z_]\w*(?=[ \t]*(?:\n|#)))")
# What a function gives back, and what it assigns: the names, and the first word of the value.
_RETURNED = re.compile(r"\n[ \t]+return\b([^\n]*)")
_ASSIGNED = re.compile(
    r"\n[ \t]+([A-Za-z_][\w, \t]*?)[ \t]*(?::[^=\n]+)?=[ \t]*(?:await[ \t]+)?\(?\s*([A-Za-z_][\w.]*\(?)"
)
IS_MODEL = re.compile(r"def forward\b|no_grad|inference_mode")
_COMMENT = re.compile(r"#[^\n]*")
WORD = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_WRITTEN = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*[(\[]?")


@dataclass(frozen=True, slots=True)
class Source:
    """A file as text: where its definitions begin, and what its names are imported from."""

    file: SourceFile
    text: str
    blocks: dict[str, str]
    imports: dict[str, str]


def source_of_file(file: SourceFile, data: bytes | None = None) -> Source:
    try:
        text = f"\n{decode(file.read() if data is None else data).source}"
    except OSError:
        text = ""
    starts = list(_DEFINITION.finditer(text))
    ends = [*(match.start() for match in starts[1:]), len(text)]
    blocks = {match[1]: text[match.start() : end] for match, end in zip(starts, ends, strict=False)}
    for name, statement in _tables(text):
        blocks.setdefault(name, statement)
    imports: dict[str, str] = {}
    module = f"{file.module}.__init__" if file.is_package else file.module
    for match in _IMPORT.finditer(text):
        base = match[1] or match[2]
        several = match[2] and "," in match[0]  # import torch, whisper
        if several or base.partition(".")[0] not in KNOWN or not base.partition(".")[0]:
            _add(imports, match, module)
    return Source(file, text, blocks, imports)


def _add(imports: dict[str, str], match: re.Match[str], module: str) -> None:
    """Take note of what an import binds, as :func:`add_imports` does with its syntax tree."""
    text = _COMMENT.sub("", match[0]).replace("\\\n", " ")
    names = text.partition("import")[2].strip().strip("()") if match[1] else text.strip()[len("import") :]
    found = [each.split(" as ") for each in names.replace("\n", " ").split(",")]
    aliases = [ast.alias(name[0].strip(), name[1].strip() if name[1:] else None) for name in found if name[0].strip()]
    if match[1]:
        home = match[1].lstrip(".")
        node: ast.Import | ast.ImportFrom = ast.ImportFrom(home, aliases, len(match[1]) - len(home))
    else:
        node = ast.Import(aliases)
    add_imports(imports, node, module)


def meanings(source: Source, name: str) -> list[str]:
    """Return what a name may mean that a file does not define: what it is imported as, else what a star may bring."""
    return [source.imports[name]] if name in source.imports else _starred(source, name)


def _starred(source: Source, name: str) -> list[str]:
    """Return what a name may be in the modules that a file imports everything from, the likeliest first.

    transformers has four hundred of them, and ``BertModel`` is in the one called ``bert``.
    """
    bases = [base for key, base in source.imports.items() if key.startswith("*")]
    lower = name.lower()

    def unlikely(base: str) -> int:
        last = base.rpartition(".")[2].replace("_", "")
        return -len(last) if last in lower else 0

    return [f"{base}.{name}" for base in sorted(bases, key=unlikely)[:MOST_STARRED]]


def names_used(text: str, imports: dict[str, str]) -> dict[str, str]:
    """Return the imported names that a text uses, dotted as far as it writes them, each with how it is written.

    Where one is called, or something is taken of it by a key, this ends in the bracket.
    """
    found: dict[str, str] = {}
    for written in dict.fromkeys(_WRITTEN.findall(text)):
        root, _, rest = written.rstrip("([").partition(".")
        if root in imports:
            dotted = ".".join(filter(None, (imports[root], rest)))
            found[dotted] = max(found.get(dotted, ""), written)
    return found


def _tables(text: str) -> Iterator[tuple[str, str]]:
    """Yield what a text keeps under names of its own: tables, and functions by other names."""
    for match in _TABLE.finditer(text):
        end = BLOCK.search(text, match.end()) if match[0].endswith("{") else None
        yield match[1], text[match.start() : end.start() if end else match.end()]


def gives_others(block: str, name: str, method: str) -> bool:
    """Tell whether a method of a class gives models, for all that is told of other classes than this one."""
    begun = rf"@(?:static|class)method\s+(?:@[^\n]+\s+)*(?=def {re.escape(method)}\b)"
    found = re.search(begun, block) if method else None
    if found is None or not method.startswith("from_"):
        return found is not None and IS_MODEL.search(block) is not None
    if not loads_models(f"{name}.{method}"):
        return False
    end = METHOD.search(block, found.end())
    given = {word.partition(".")[0] for word in words_given(block[found.end() : end.start() if end else len(block)])}
    return given.isdisjoint(("cls", "super", name))


def may_give_any(source: Source, name: str, rest: str) -> bool:
    """Tell whether calling this may give a model of whatever class, judged by its name."""
    if source.blocks[name].startswith("\nclass"):
        return rest.startswith("from_") and is_factory(name) and loads_models(f"{name}.{rest}")
    return not rest and loads_models(name)


def words_given(block: str) -> list[str]:
    """Return the words that what a function gives is made by, or all that a table holds."""
    if not _DEFINITION.match(f"\n{block.lstrip()}"):
        return list(dict.fromkeys(WORD.findall(block)))
    values: dict[str, list[str]] = {}
    for match in _ASSIGNED.finditer(block):
        for name in match[1].split(","):
            values.setdefault(name.strip(), []).append(match[2])
    pending = [word for line in _RETURNED.findall(block) for word in _WRITTEN.findall(line)]
    found: dict[str, None] = {}
    seen: set[str] = set()
    while pending:
        word = pending.pop()
        name = word.rstrip("([")
        root = name.partition(".")[0]
        if root not in values:
            found[name] = None
        elif word not in seen:
            seen.add(word)
            # What a model gives is none: of what is called, only what was not made by a call.
            pending += [each for each in values[root] if not (word == f"{root}(" and each.endswith("("))]
    return list(found)


def makes_models(text: str, local: str, *, in_script: bool) -> bool:
    """Tell whether a text with modules or training in it makes an instance of a class that an import gave a name.

    In a script what a function loads counts as well.
    """
    is_trained = "nn.Module" in text or ".backward(" in text
    found = re.search(rf"=[ \t]*({re.escape(local)}(?:\.\w+)*)\(", text) if is_trained else None
    is_class = found is not None and any(part[:1].isupper() for part in found[1].split("."))
    return is_class or (found is not None and in_script and loads_models(found[1]))
