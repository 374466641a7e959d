"""What a class keeps on ``self``: parameters, buffers, parts and callables, read off its body and its constructor.

A part may be one of several classes, and a container holds several: what is called there leads to each of them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence

from gradscope.scanning.facts import Class, FileFacts, classes_in
from gradscope.scanning.instances import class_named, is_factory, itself
from gradscope.scanning.makers import Making, one_of, side_by_side, some_of
from gradscope.scanning.signatures import FunctionNode
from gradscope.scanning.switches import Names
from gradscope.scanning.torch_ops import is_weightless
from gradscope.scanning.values import is_own
from gradscope.scanning.wrappers import statements

_REGISTERED = {
    "register_buffer": "buffer", "register_parameter": "parameter", "add_module": "module", "register_module": "module",
}  # fmt: skip
# What runs all that it is given, of torch; and what gives out a faster form of its first argument.
_CONTAINERS = ("Sequential", "ModuleList", "ModuleDict", "DataParallel", "DistributedDataParallel")
_FASTER = ("torch.compile", "torch.jit.script", "torch.jit.trace")
_GROW = ("append", "insert", "extend", "add_module")
_CERTAIN = ("module", "parameter", "buffer")
_PLAIN_TYPES = ("int", "float", "bool", "str", "list", "dict", "tuple")
_SETTINGS = ("config", "cfg", "args")


class Keeping:
    """Fills ``attributes`` and ``aliases`` of one class (see :class:`gradscope.scanning.facts.Class`)."""

    def __init__(self, klass: Class, names: Names, facts: FileFacts) -> None:
        self.klass = klass
        self.names = names
        self.facts = facts
        self._local: dict[str, str] = {}  # what the constructor's own names hold
        self._making = Making(names)

    def read_body(self, body: Sequence[ast.stmt]) -> None:
        """Read what the statements of the class itself give it: ``run = _run``, the fields of a dataclass."""
        for item in body:
            if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
                dotted = self.names.dotted(item.value)
                if dotted:
                    own = f"{self.klass.name}.{dotted}" if dotted in self.klass.methods else dotted
                    self.klass.aliases[item.targets[0].id] = own
                self.klass.attributes.setdefault(item.targets[0].id, "plain")
            elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                kind = self._class_named(item.annotation)
                if self._is_in_scan(kind):
                    self.klass.attributes.setdefault(item.target.id, kind)

    def read_constructor(self, method: FunctionNode) -> None:
        """Read what a constructor keeps: parts, parameters, buffers, and callables under other names."""
        arguments = (*method.args.args, *method.args.kwonlyargs)
        self._local = {each.arg: self._class_named(each.annotation) for each in arguments if each.annotation}
        outside = {*(each.arg for each in arguments), "self", "config"}
        made = {part.name for part in statements(method.body) if isinstance(part, ast.FunctionDef)}
        for part in map(_assignment, statements(method.body)):
            if isinstance(part, ast.Assign):
                meant = self._function(part.value, made, method.name)
                for target in part.targets if meant and meant.split(".")[0] not in outside else ():
                    name = self.names.dotted(target).removeprefix("self.")
                    if isinstance(target, ast.Attribute) and name.isidentifier():
                        self._callable(name, meant, always=part in method.body)
            self._attribute(part)

    def read_registered(self, method: FunctionNode) -> None:
        """A buffer is one wherever it is registered."""
        self._local = {}
        for part in statements(method.body):
            if isinstance(part, ast.Expr):
                self._attribute(part)

    # --- callables ------------------------------------------------------------------------------

    def _callable(self, name: str, meant: str, *, always: bool) -> None:
        if meant == f"{self.klass.name}.{name}":  # self.run = torch.compile(self.run)
            return
        self.klass.aliases.setdefault(name, meant)
        if always:  # self.forward = self.fast: what an object has comes before what its class has
            self.klass.methods = tuple(method for method in self.klass.methods if method != name)

    def _function(self, value: ast.expr, made: set[str], where: str) -> str:
        """Return the function that a value stands for, also partly applied or compiled; several are joined by ``|``."""
        if isinstance(value, (ast.List, ast.Tuple, ast.Dict)):
            parts = value.values if isinstance(value, ast.Dict) else value.elts
            return "|".join(filter(None, (self._method_meant(part) for part in parts)))
        if isinstance(value, ast.Lambda):
            called = (part.func for part in ast.walk(value.body) if isinstance(part, ast.Call))
            return next(filter(None, map(self._method_meant, called)), "")
        if isinstance(value, ast.Call) and value.args:
            dotted = self.names.dotted(value.func)
            if dotted.endswith("partial"):
                value = value.args[0]
            elif dotted in _FASTER:
                return self._method_meant(value.args[0])
        if not isinstance(value, (ast.Name, ast.Attribute)):
            return ""
        dotted = self.names.dotted(value)
        if dotted in made:
            return f"{self.klass.name}.{where}.{dotted}"
        return self._method_meant(value) or dotted

    def _method_meant(self, value: ast.expr) -> str:
        """``self.run``, where the class has such a method."""
        root, _, rest = self.names.dotted(value).partition(".")
        return f"{self.klass.name}.{rest}" if root == "self" and rest in self.klass.methods else ""

    # --- attributes -----------------------------------------------------------------------------

    def _attribute(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Expr):
            self._registered(node.value)
        elif isinstance(node, ast.AugAssign):
            self._grow(node.target, [node.value])
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if self.names.is_glue:
                    self._making.assign(target, node.value)
                together = side_by_side if self.names.is_glue else _side_by_side
                for part, value in together(target, node.value):
                    self._assigned(part, value)

    def _assigned(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            kind = self._kind(value)
            if kind not in ("", "plain"):
                self._local[target.id] = _either(self._local.get(target.id, ""), kind)
        elif isinstance(target, ast.Subscript):
            self._grow(target.value, [value])
        elif is_own(target):
            known = self.klass.attributes.get(target.attr, "")
            self.klass.attributes[target.attr] = _either(known, self._kind(value))

    def _registered(self, node: ast.expr) -> None:
        """``self.register_buffer("table", ...)``, ``self.layers.append(Block())``."""
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
            return
        first, kind = node.args[0], _REGISTERED.get(node.func.attr)
        name = first.value if isinstance(first, ast.Constant) else None
        if kind and isinstance(name, str):
            classes = self._classes(node.args[1:]) if kind == "module" else []
            self.klass.attributes[name] = some_of(classes) or kind
        elif node.func.attr in _GROW:
            self._grow(node.func.value, node.args)

    def _grow(self, target: ast.expr, values: Sequence[ast.expr]) -> None:
        """Take note of what a container gets later."""
        if isinstance(target, ast.Name):
            known = self._local.get(target.id, "")
        elif is_own(target):
            known = self.klass.attributes.get(target.attr, "")
        else:
            return
        classes = self._classes(values)
        if not classes:
            return
        grown = some_of([*classes_in(known), *classes])
        if isinstance(target, ast.Name):
            self._local[target.id] = grown
        else:
            self.klass.attributes[target.attr] = grown

    # --- what a value is ------------------------------------------------------------------------

    def _kind(self, value: ast.expr) -> str:
        """Return what a value is, as in ``Class.attributes``."""
        value = itself(value)
        if isinstance(value, ast.Constant):
            return "plain" if value.value is not None else ""
        if isinstance(value, ast.IfExp):
            return self._kind(value.body) or self._kind(value.orelse)
        if isinstance(value, ast.BoolOp):
            return next(filter(None, map(self._kind, value.values)), "")
        if isinstance(value, (ast.List, ast.Tuple, ast.ListComp, ast.Dict, ast.DictComp)):
            return some_of(self._classes([value]))
        if isinstance(value, ast.Call):
            return self._made(value) or self._given(value)
        if isinstance(value, ast.Subscript):
            return self._given(value)
        dotted = self.names.dotted(value)
        if dotted in self._local:  # self.model = model, where the constructor says what it takes
            return self._local[dotted]
        return "plain" if dotted.split(".")[0] in _SETTINGS else ""

    def _given(self, value: ast.expr) -> str:
        """Return what a value is that a function, or one of a table, gives."""
        return one_of(self._making.kinds(value)) if self.names.is_glue else ""

    def _made(self, call: ast.Call) -> str:
        """Return what a call makes."""
        dotted = self.names.dotted(call.func)
        if dotted.startswith("self."):  # kind = Tower; ...; self.tower = self.kind()
            dotted = self.klass.aliases.get(dotted[5:], dotted)
        home, _, last = dotted.rpartition(".")
        if last.startswith("from_"):  # Tower.from_pretrained(...); another package's may give anything
            is_maker = self.names.is_maker(dotted)
            return f"?{dotted}" if is_maker else home if self._is_own_class(home) else ""
        if last in ("Parameter", "Buffer"):
            return last.lower()
        if dotted in _FASTER and call.args:
            return self._kind(call.args[0])
        if dotted.startswith("torch.nn."):
            kind = "weightless" if is_weightless(last) else "module"
            return (some_of(self._classes(call.args)) if last in _CONTAINERS else "") or kind
        if last[:1].isupper():
            return dotted
        return f"?{dotted}" if self._is_in_scan(dotted) or f"\ndef {dotted}(" in self.names.source else ""

    def _classes(self, values: Iterable[ast.expr]) -> list[str]:
        """Return the classes of the scan that are made in expressions: the parts of a container."""
        return [each for value in values for each in self._classes_of(value)]

    def _classes_of(self, node: ast.expr) -> Iterator[str]:
        node = itself(node)
        parts: list[ast.expr] = []
        if isinstance(node, (ast.List, ast.Tuple)):
            parts = node.elts
        elif isinstance(node, (ast.Dict, ast.DictComp)):
            parts = node.values if isinstance(node, ast.Dict) else [node.value]
        elif isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            parts = [node.elt]
        elif isinstance(node, ast.Starred):
            parts = [node.value]
        elif isinstance(node, ast.Call) and not (found := self._own(self._made(node) or self._given(node))):
            parts = node.args  # list(...), OrderedDict(...), a container of another package
        else:
            yield from found if isinstance(node, ast.Call) else self._own(self._kind(node))
        yield from self._classes(parts)

    def _own(self, kind: str) -> list[str]:
        return [each for each in classes_in(kind) if each[0] == "?" or self._is_in_scan(each)]

    def _is_in_scan(self, dotted: str) -> bool:
        root = dotted.partition(".")[0]
        return bool(dotted) and (dotted in self.facts.headers or ("." in dotted and root in self.names.roots))

    def _is_own_class(self, dotted: str) -> bool:
        """Tell whether a class is of the scan and gives out itself, judged by its name."""
        return not is_factory(dotted) and self._is_in_scan(dotted)

    def _class_named(self, annotation: ast.expr) -> str:
        dotted = class_named(annotation, self.names)
        last = dotted.rpartition(".")[2]
        if last == "Module":
            return "module"
        if last in _PLAIN_TYPES:
            return "plain"
        return dotted if last[:1].isupper() else ""


def called_on_self(method: FunctionNode) -> Iterator[str]:
    """Yield the methods that are called as statements: ``self.build_layers()``."""
    for part in statements(method.body):
        func = part.value.func if isinstance(part, ast.Expr) and isinstance(part.value, ast.Call) else None
        if func is not None and is_own(func):
            yield func.attr


def _assignment(node: ast.stmt) -> ast.stmt:
    """``setattr(self, "run", self.fast)`` is an assignment."""
    call = node.value if isinstance(node, ast.Expr) else None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "setattr"):
        return node
    if len(call.args) != 3 or not isinstance(call.args[1], ast.Constant):
        return node
    target = ast.Attribute(call.args[0], str(call.args[1].value), ast.Store())
    return ast.copy_location(ast.Assign([target], call.args[2]), node)


def _side_by_side(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """``self.tower, self.size = Tower(), 4`` are two assignments."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        yield from zip(target.elts, value.elts, strict=True)
    else:
        yield target, value


def _either(known: str, kind: str) -> str:
    """Return what is told of an attribute that is given another value, perhaps on another way."""
    return known if known in _CERTAIN or not kind else kind
