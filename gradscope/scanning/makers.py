"""What a function makes: of which classes its result is, as far as its own source shows that.

Most models are not made by their class's name: ``load_model("base")`` makes one, moves it and hands it out, perhaps
beside something else, and ``registry["vit_b"]()`` calls one function of several. Such a value is of no class that the
caller's source names, so it is written as what gave it: ``?load`` is what ``load`` gives, ``?load[0]`` the first of
what it gives side by side, ``?registry@vit_b`` what is made by what the table keeps under a key, and ``|A|?load`` one
of several. Which classes these are is told when the files are joined (``made.py``).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence

from gradscope.scanning.instances import class_named, is_factory, itself, of_the_scan
from gradscope.scanning.signatures import FunctionNode
from gradscope.scanning.switches import Names

# What gives out its first argument in another form: torch.compile(model), DataParallel(model).
_SAME_MODEL = ("torch.compile", "torch.jit.script", "torch.jit.trace", "torch.nn.DataParallel",
               "torch.nn.parallel.DistributedDataParallel")  # fmt: skip
# Torch's own ways to get a model of which nothing but a run tells the class.
LOADERS = frozenset({"torch.hub.load", "torch.jit.load"})
# Of a list, or a table, of instances; not part of the notation.
HOLDS = "*"
# What no table's key may hold, since the notation needs it.
_RESERVED = frozenset(".:|[]@?")


class Making:
    """Tells what expressions of one function make, by what it assigned before: in any order of its branches."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.held: dict[str, tuple[str, ...]] = {}  # what a local name is an instance of
        self.called: dict[str, tuple[str, ...]] = {}  # and what calling it makes

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        """Take note of what a name, or each of several, stands for from now on."""
        for part, given in side_by_side(target, value):
            if isinstance(part, ast.Name):
                for known, kinds in ((self.held, self.kinds(given)), (self.called, self.made_by_call(given))):
                    if kinds:
                        known[part.id] = tuple(dict.fromkeys((*known.get(part.id, ()), *kinds)))

    def kinds(self, value: ast.expr) -> tuple[str, ...]:
        """Return what a value may be an instance of."""
        value = itself(value)
        if isinstance(value, ast.Name):
            return self.held.get(value.id, ())
        if isinstance(value, (ast.Await, ast.NamedExpr)):
            return self.kinds(value.value)
        if isinstance(value, ast.IfExp):
            return (*self.kinds(value.body), *self.kinds(value.orelse))
        if isinstance(value, ast.Subscript):
            return self._items(value)
        if isinstance(value, ast.Call):
            is_other_form = self.names.dotted(value.func) in _SAME_MODEL and value.args
            return self.kinds(value.args[0]) if is_other_form else self.made_by_call(value.func)
        return tuple(f"{HOLDS}{kind}" for part in _kept_in(value) for kind in self.kinds(part))

    def _items(self, value: ast.Subscript) -> tuple[str, ...]:
        """Return what is held by a list or a table, and what a function gives at this place: ``load(...)[0]``."""
        item = _key(value.slice)
        known = self.kinds(value.value)
        held = [kind.removeprefix(HOLDS) for kind in known if kind.startswith(HOLDS)]
        return (*held, *(f"{kind}[{item}]" for kind in known if item and kind.startswith("?")))

    def made_by_call(self, func: ast.expr) -> tuple[str, ...]:
        """Return what a call of this makes an instance of."""
        if isinstance(func, ast.Name) and func.id in self.called:
            return self.called[func.id]
        if isinstance(func, ast.IfExp):
            return (*self.made_by_call(func.body), *self.made_by_call(func.orelse))
        if isinstance(func, ast.Lambda):
            return self.kinds(func.body)
        if isinstance(func, ast.Subscript):
            table = self.names.dotted(func.value)
            return (f"?{table}@{_key(func.slice) or '*'}",) if self.names.is_maker(table) else ()
        if isinstance(func, ast.Call):  # partial(load, "base"), registry.get(name)
            return self._from_call(func)
        return self._named(self.names.dotted(func))

    def _from_call(self, func: ast.Call) -> tuple[str, ...]:
        dotted = self.names.dotted(func.func)
        if dotted.rpartition(".")[2] == "partial" and func.args:
            return self.made_by_call(func.args[0])
        table, _, last = dotted.rpartition(".")
        if last == "get" and func.args and self.names.is_maker(table):
            return (f"?{table}@{_key(func.args[0]) or '*'}",)
        return ()

    def _named(self, dotted: str) -> tuple[str, ...]:
        home, _, last = dotted.rpartition(".")
        root = dotted.partition(".")[0]
        if dotted in ("cls", "self.__class__"):
            return ("cls",)
        if dotted in LOADERS:
            return (f"?{dotted}",)
        if not dotted or root in self.held or self.names.is_elsewhere(root) or root in ("torch", "super()"):
            return ()
        if last.startswith("from_") and not (is_factory(home) or self.names.is_maker(dotted)):
            return (home,) if of_the_scan(home, self.names) else ()
        made = of_the_scan(dotted, self.names)
        return (made or f"?{'cls.' + last if home in ('self', 'cls') else dotted}",)


def gives(node: FunctionNode, names: Names) -> dict[str, str]:
    """Return the classes of what a function gives, of each of several by its position or its key."""
    making = Making(names)
    found: dict[str, tuple[str, ...]] = {}
    for part in own_statements(node.body):
        if isinstance(part, ast.Assign):
            for target in part.targets:
                making.assign(target, part.value)
        elif isinstance(part, ast.AnnAssign) and part.value is not None:
            making.assign(part.target, part.value)
        elif isinstance(part, ast.Return) and part.value is not None:
            for key, value in _parts(part.value):
                found[key] = (*found.get(key, ()), *making.kinds(value))
    told = {key: some_of(kinds) for key, kinds in found.items() if some_of(kinds)}
    said = of_the_scan(class_named(node.returns, names), names)
    return told or ({"": f"|{said}"} if said else {})


def table(value: ast.expr, names: Names) -> dict[str, str]:
    """Return what is made by what a table keeps, by its keys; of another name for a function under no key."""
    making = Making(names)
    if isinstance(value, ast.Dict):
        kept = zip(value.keys, value.values, strict=True)
        found = {_key(key) or str(number): making.made_by_call(each) for number, (key, each) in enumerate(kept)}
    else:
        found = {"": making.made_by_call(value)} if isinstance(value, (ast.Name, ast.Attribute)) else {}
    return {key: some_of(kinds) for key, kinds in found.items() if kinds}


def some_of(kinds: Iterable[str]) -> str:
    """Return the notation for one of several; nothing where there is none."""
    return "".join(f"|{each}" for each in dict.fromkeys(kinds) if not each.startswith(HOLDS))


def one_of(kinds: Sequence[str]) -> str:
    """Return the notation for one of several, and as it is that of a single one."""
    return kinds[0] if len(kinds) == 1 and not kinds[0].startswith(HOLDS) else some_of(kinds)


def is_named(maker: str, module: str, source: str) -> bool:
    """Tell whether the source of a module may use what a model is got from, or define it."""
    root, _, rest = maker.partition(".")
    if maker in LOADERS:
        return rest in source
    is_known = module.partition(".")[0] == root or f"import {root}" in source or f"from {root}" in source
    return is_known and maker.rpartition(".")[2] in source


def definitions_of(maker: str) -> tuple[str, ...]:
    """Return how the line may begin that defines what a model is got from."""
    last = maker.rpartition(".")[2]
    return () if maker in LOADERS else (f"def {last}", f"{last} =", f"{last}:")


def side_by_side(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """``tower, size = Tower(), 4`` are two assignments, and so are ``tower, size = build()``."""
    if isinstance(target, (ast.Tuple, ast.List)):
        if isinstance(value, (ast.Tuple, ast.List)) and len(target.elts) == len(value.elts):
            yield from zip(target.elts, value.elts, strict=True)
            return
        if isinstance(value, ast.Call):
            for number, part in enumerate(target.elts):
                if isinstance(part, ast.Starred):
                    return
                yield part, ast.copy_location(ast.Subscript(value, ast.Constant(number), ast.Load()), value)
            return
    yield target, value


def _kept_in(value: ast.expr) -> list[ast.expr]:
    if isinstance(value, (ast.List, ast.Tuple, ast.Set)):
        return value.elts
    if isinstance(value, ast.Dict):
        return value.values
    if isinstance(value, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
        return [value.elt]
    return [value.value] if isinstance(value, ast.DictComp) else []


def _parts(value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(value, (ast.Tuple, ast.List)):
        yield from ((str(number), part) for number, part in enumerate(value.elts))
    elif isinstance(value, ast.Dict):
        yield from ((name, part) for key, part in zip(value.keys, value.values, strict=True) if (name := _key(key)))
    else:
        yield "", value


def _key(node: ast.expr | None) -> str:
    """Return a literal key as the notation writes it; nothing where only a run tells it."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, (str, int)):
        return ""
    return "".join("_" if each in _RESERVED else each for each in str(node.value))


def own_statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a function without those of functions and classes in it."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        yield node
        for part in ("body", "orelse", "finalbody"):
            yield from own_statements(getattr(node, part, ()))
        for arm in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
            yield from own_statements(arm.body)
