"""What the result of a call depends on, and which calls lose a gradient: of torch, of tensors, of ``self``."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

from gradscope.scanning import torch_ops
from gradscope.scanning.detaches import compared, is_computed, is_discriminator
from gradscope.scanning.facts import NOTHING, Atoms, Call, Class, classes_in
from gradscope.scanning.instances import GIVE_THEMSELVES
from gradscope.scanning.switches import Switch
from gradscope.scanning.values import (
    INDEX,
    PLAIN,
    UNKNOWN,
    Expressions,
    Value,
    as_array,
    carries,
    cuts_of,
    is_own,
    joined,
)


class Calls(Expressions):
    """Evaluates calls."""

    def call(self, node: ast.Call) -> Value:
        """Return what the result of a call depends on."""
        applied = None if self.names.none_here else self.names.applied(node)
        if applied is not None:
            return self.apply(node, applied)
        if isinstance(node.func, ast.Name) and node.func.id == "self" and self.klass is not None:
            return self._called_itself(node, self.klass)
        dotted = self.names.dotted(node.func)
        given = self._given(node, dotted)
        self._note_given(node, dotted)
        return self._called(node, dotted, given)

    def _called(self, node: ast.Call, dotted: str, given: list[Value]) -> Value:
        """Return the value of a call by what is called."""
        root = dotted.partition(".")[0]
        is_local = root in self.env or root == "self"
        if root == "super()" or (dotted and not is_local and not (self.calls and self.names.is_elsewhere(root))):
            self._note_call(dotted, node)
        if dotted.startswith("torch.nn.") and _MAKES_MODULE.match(dotted):
            return Value(joined(given).atoms, "module")
        if root in ("torch", "torchvision") and not is_local:
            return self._torch_call(node, dotted, given)
        if isinstance(node.func, ast.Attribute) and root != "super()":
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "self":
                self._note_call(dotted, node)
                return self._own_call(node, node.func.attr, given)
            if root == "self" and dotted.count(".") in (1, 2):  # type(self).run(self, x), self.part.run(x)
                self._note_call(dotted.removesuffix(".__call__"), node)
            if is_local or not dotted or root not in self.names.imports.values():
                value = self._method(node, node.func, given)
                return self._run_by(dotted, value) if self.is_step and is_local and dotted else value
        if dotted == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            return self._looked_up(node, str(node.args[1].value))
        return self._function(node, dotted, given)

    def _given(self, node: ast.Call, dotted: str) -> list[Value]:
        """Return the values of a call's arguments."""
        before = len(self.sites)
        given = [self.value(argument) for argument in node.args]
        given += [self.value(keyword.value) for keyword in node.keywords]
        if is_discriminator(dotted):
            self.pairs.note_shown(dotted, self.sites[before:])
        elif len(self.sites) > before:
            atoms = [value.atoms for value in given]
            self.sites[before:] = self.pairs.judged(compared(node, dotted), atoms, self.sites[before:])
        return given

    def _called_itself(self, node: ast.Call, klass: Class) -> Value:
        """``self(x)`` is ``self.forward(x)``."""
        given = [self.value(argument) for argument in (*node.args, *(keyword.value for keyword in node.keywords))]
        name = "__call__" if "__call__" in klass.methods else "forward"
        self._note_call(f"self.{name}", node)
        return Value(self._own_call(node, name, given).atoms, "tensor")

    def _note_call(self, target: str, node: ast.Call) -> None:
        sometimes = self.sometimes or ("evaluation" if self.conditions and _INFERS.search(target) else "")
        is_used = node is not self.discarded and not _asks_for_indices(target)  # for a gradient
        self.calls.append(Call(target, is_used, sometimes))

    def _note_given(self, node: ast.Call, dotted: str) -> None:
        """``checkpoint(self.run, x)`` calls ``self.run``, and so does ``in_chunks(self.run, x)``."""
        if not dotted.endswith(_CALL_THEIR_ARGUMENT):
            for given in node.args if self.klass is not None else ():
                if is_own(given) and self._is_called_by(given.attr, dotted):
                    self._note_call(f"self.{given.attr}", node)
            return
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Attribute) and first.attr == "__call__":
            first = first.value
        target = self.names.dotted(first) if isinstance(first, (ast.Name, ast.Attribute)) else ""
        if target and target not in self.env:
            self._note_call(target, node)

    def _is_called_by(self, name: str, function: str) -> bool:
        """Tell whether a method that is given to a function is called by it, and not kept for another time."""
        is_method = self.klass is not None and name in self.klass.methods
        return is_method and function not in torch_ops.PLAIN_FUNCTIONS and not _keeps(function)

    def _own_call(self, node: ast.Call, name: str, given: list[Value]) -> Value:
        if name == "requires_grad_" and _switches_off(node):
            self.report(node, "GS901", "requires_grad_(False)", harmless=FROZEN)
        self.reads.add(name)
        if _gives_indices(name):
            return INDEX
        known = self.klass.attributes.get(name, "") if self.klass else ""
        atoms = _through(node, f"self.{name}", given) | {f"call:self.{name}"}
        # What is called on self and is no method of the class is a module, as far as the class shows.
        is_told = known and not known.startswith(("|", "?"))
        is_module = known in ("module", "weightless") or (
            not is_told and self.klass is not None and name not in self.klass.methods
        )
        is_packed = is_module and any(value.kind == "packed" for value in given)
        return Value(atoms, "packed" if is_packed else "tensor" if is_module else "unknown")

    def _torch_call(self, node: ast.Call, dotted: str, given: list[Value]) -> Value:
        name = dotted.rpartition(".")[2]
        value = joined(given if not self.has_numbers else [cuts_of(v) if v.kind == "number" else v for v in given])
        if name in torch_ops.SHAPE_ONLY or name in torch_ops.PACKING:
            return Value(NOTHING, "tensor") if name in torch_ops.SHAPE_ONLY else Value(value.atoms, "packed")
        if name in torch_ops.INDEX_VALUED:
            self._index_valued(node, name, value)
            return INDEX
        if name in torch_ops.PIECEWISE_CONSTANT:
            self.report(node, "GS402", name, value)
        if name == "detach":
            return Value(self.report(node, "GS201", "torch.detach()", value), "tensor")
        if name == "Parameter" and carries(value):
            return Value(self.report(node, "GS203", "nn.Parameter", value), "tensor")
        if given and _makes_anew(node, name):
            value = given[0]  # the others say which dtype and device
            if carries(value) or (self.is_step and value.kind == "unknown" and is_computed(value.atoms)):
                return Value(self.report(node, "GS203", f"torch.{name}", value), "tensor")
            made_of = {f"from:{found[1]}" for atom in value.atoms if (found := _RESULT.search(atom))}
            return Value(cuts_of(value).atoms | made_of, "tensor")
        if dotted in torch_ops.DERIVATIVES and not _keeps_graph(node):
            given_out = self.report(node, "GS207", f"{name} without create_graph", value)
            return Value(given_out - value.atoms, "tensor")  # a constant
        if name == "checkpoint" and _is_reentrant(node):
            self.report(node, "GS604", "reentrant checkpoint", value)
        return Value(value.atoms, "tensor")

    def _index_valued(self, node: ast.Call, name: str, value: Value) -> None:
        if value.kind == "tensor" and name in ("argmax", "argmin", "multinomial"):
            self.report(node, "GS401", name, value)
        elif value.kind == "tensor" and name in ("long", "int"):
            self.report(node, "GS403", "integer cast", value)

    def _is_integer_type(self, node: ast.expr) -> bool:
        return self.names.dotted(node) in torch_ops.INTEGER_TYPES

    def _hard_mask(self, node: ast.Compare) -> None:
        """``(score > 0.5).float()``: numbers again, and no gradient into the score."""
        compared = joined(self._silently([node.left, *node.comparators]))
        if carries(compared):
            self.report(node, "GS402", "comparison", compared)

    def _function(self, node: ast.Call, dotted: str, given: list[Value]) -> Value:
        value = joined(given)
        if dotted in torch_ops.PLAIN_FUNCTIONS:
            return PLAIN
        if dotted in ("float", "int", "round"):
            if value.kind == "tensor" and dotted == "float":
                self.report(node, "GS302", "float()", value)
            return PLAIN
        last = dotted.rpartition(".")[2]
        known = self._made_new(dotted, last, value)
        if known is not None:
            return known
        if last[:1].isupper() or dotted == "dict":
            self.hand_out(given)
        if last == "Parameter" and carries(value):
            self.report(node, "GS203", "nn.Parameter", value)
        if isinstance(node.func, ast.Name) and (node.func.id in self.env or node.func.id in self.made):
            return self._local(node, node.func.id, given)
        if not dotted:
            return self._unnamed(node, value)
        return Value(_through(node, dotted, given) | {f"call:{dotted}"}, "unknown")

    def _made_new(self, dotted: str, last: str, value: Value) -> Value | None:
        """Return the value of a call whose result is no part of the graph of what it is given."""
        if last == "deepcopy":
            return Value(NOTHING, value.kind)  # a copy is a leaf of its own
        if last in _INDEX_FUNCTIONS or _gives_indices(last) or _unpacks(last):
            return INDEX
        if dotted.startswith(torch_ops.ARRAY_LIBRARIES) and dotted.partition(".")[0] not in self.env:
            return as_array(value)
        return None

    def _kept_called(self, atoms: Atoms, node: ast.Call, method: str = "") -> Atoms:
        """Note the call of what ``self`` keeps, under a local name or in a container; return the atoms of the results.

        With ``method`` that is called on it, of parts only.
        """
        if self.klass is None:
            return NOTHING
        found: set[str] = set()
        for atom in sorted(atoms):
            kind, _, name = atom.removeprefix("off:").partition(":")
            is_part = name not in self.klass.attributes or bool(classes_in(self.klass.attributes[name]))
            is_callable = not method and (name in self.klass.methods or name in self.klass.aliases)
            if kind == "attr" and (is_part or is_callable):
                target = f"self.{name}.{method}" if method else f"self.{name}"
                self._note_call(target, node)
                found.add(f"call:{target}")
        return frozenset(found)

    def _part_called(self, name: str, node: ast.Call) -> Atoms:
        """Note the call of a part of unknown kind under a local name."""
        parts = [part for part in self.renamed.get(name, ()) if self.klass and not self.klass.attributes.get(part)]
        for part in parts:
            self._note_call(f"self.{part}", node)
        return frozenset(f"call:self.{part}" for part in parts)

    def _unnamed(self, node: ast.Call, value: Value) -> Value:
        """Return the value of calling what has no name: ``Tower()(x)``, ``self.layers[0](x)``, ``getattr(...)(x)``."""
        made = self.names.dotted(node.func.func) if isinstance(node.func, ast.Call) else ""
        given = self.class_of(node.func) if self.making is not None else ""
        if given.startswith(("?", "|")):
            self._note_call(f"{given}.__call__", node)
        elif made.rpartition(".")[2][:1].isupper():
            self._note_call(f"{made}.forward", node)
        callee = self.value(node.func)
        atoms = value.atoms | callee.atoms | self._kept_called(callee.atoms, node)
        return Value(atoms, "tensor" if callee.kind == "module" else "unknown")

    def _looked_up(self, node: ast.Call, name: str) -> Value:
        """``getattr(self, "run")`` is ``self.run``."""
        return self.value(ast.copy_location(ast.Attribute(node.args[0], name, ast.Load()), node))

    def _local(self, node: ast.Call, name: str, given: list[Value]) -> Value:
        """Return the value of calling a parameter, a function defined here, or whatever else a local name holds."""
        callee = self.env.get(name, UNKNOWN)
        if callee.kind == "function" or name in self.parameters:
            self._note_call(name, node)
        if name in self.made:
            atoms = self._of_instance(node, f"{self.made[name]}.__call__", callee, given).atoms
        else:
            kept = self._kept_called(callee.atoms, node) | self._part_called(name, node)
            atoms = joined(given).atoms | callee.atoms | kept
        if name in self.parameters or self.is_step:
            atoms |= {f"call:{name}"}
        return Value(atoms, "tensor" if callee.kind == "module" else "unknown")

    def _run_by(self, dotted: str, value: Value) -> Value:
        """Return a value as the work of what was called: in a step of training it is told which part did what."""
        root, _, rest = dotted.partition(".")
        is_result = root in self.env and root not in self.names.handed and is_computed(self.env[root].atoms)
        if rest in torch_ops.RUN_NOTHING or is_result or value.kind in ("plain", "index"):
            return value
        return Value(value.atoms | {f"call:{dotted}"}, value.kind)

    def _method(self, node: ast.Call, func: ast.Attribute, given: list[Value]) -> Value:
        base, name = self._part(node, func), func.attr
        if name in torch_ops.PLAIN_METHODS:
            return PLAIN if name not in ("pop", "keys") else Value(base.atoms, "unknown")
        if name in torch_ops.LISTS:
            return Value(base.atoms, torch_ops.LISTS[name])
        made = self.class_of(func.value) if self.making is not None or self.made else ""
        if made and name not in GIVE_THEMSELVES and not (made[0] in "?|" and name in _ESCAPES):
            return self._of_instance(node, f"{made}.{name}", base, given)
        if name in torch_ops.SHAPE_ONLY:
            return Value(NOTHING, base.kind)
        if base.kind == "plain":
            return Value(joined(given).atoms, "plain")
        if name in _ESCAPES and base.kind != "module":
            return self._escape(node, name, base)
        if _gives_indices(name) or _unpacks(name):
            return INDEX
        if name in torch_ops.INDEX_VALUED and base.kind != "module":
            self._index_valued(node, name, base)
            return INDEX
        if name in torch_ops.PIECEWISE_CONSTANT and base.kind == "tensor":
            self.report(node, "GS402", name, base)
        return self._tensor_method(node, func, base, given)

    def _of_instance(self, node: ast.Call, target: str, base: Value, given: list[Value]) -> Value:
        """Return the value of a method of what a local name is known to be an instance of: ``tower.encode(x)``."""
        self._note_call(target, node)
        return Value(base.atoms | _through(node, target, given) | {f"call:{target}"}, "unknown")

    def _part(self, node: ast.Call, func: ast.Attribute) -> Value:
        """Return what a method is called on; of a part that ``self`` keeps note which method that is."""
        base = self.value(func.value)
        if base.kind == "module":
            self._kept_called(base.atoms, node, func.attr)
        return base

    def _tensor_method(self, node: ast.Call, func: ast.Attribute, base: Value, given: list[Value]) -> Value:
        name = func.attr
        if name == "requires_grad_" and _switches_off(node):
            self.report(node, "GS901", "requires_grad_(False)", base, FROZEN)
        if name in ("to", "type") and any(map(self._is_integer_type, (*node.args, *(k.value for k in node.keywords)))):
            self._index_valued(node, "long", base)
            return INDEX
        if name == "new_tensor" and given and carries(given[0]):
            return Value(self.report(node, "GS203", ".new_tensor()", given[0]), "tensor")
        if name in ("float", "to", "type_as", "double", "half") and isinstance(func.value, ast.Compare):
            self._hard_mask(func.value)
        if name in torch_ops.LIKE_ANOTHER and base.kind != "module":
            given = []  # a dtype, a device, a shape is taken of it
        value = joined([base, *given, *self._forward_of(func)])
        kind = "tensor" if base.kind in ("tensor", "module") else "unknown"
        return value if value.kind == kind else Value(value.atoms, kind)

    def _forward_of(self, func: ast.Attribute) -> list[Value]:
        """``self.part.forward(x)``, ``self.part.decode(x)`` run a module, like ``self.part(x)``."""
        part = self.names.dotted(func.value) if _runs(func.attr) else ""
        if part in self.parameters:
            self.runs.add(f"call:{part}")
        return [Value(frozenset({f"call:self.{part.split('.')[1]}"}), "tensor")] if part.startswith("self.") else []

    def _escape(self, node: ast.Call, name: str, base: Value) -> Value:
        rule = _ESCAPES[name]
        sure = base.kind == "tensor"
        if name in ("detach", "detach_"):
            if node.args or base.kind not in ("tensor", "unknown"):
                return base
            derivatives = (f"cut:{site.line}" for site in self.sites if site.rule == "GS207")
            return Value(self.report(node, rule, f".{name}()", base).difference(derivatives), "tensor")
        kind = {"sample": "tensor", "numpy": "unknown"}.get(name, "number")
        self.has_numbers = self.has_numbers or kind == "number"
        if not sure:
            return Value(base.atoms, "number" if kind == "number" else "unknown")
        return Value(self.report(node, rule, f".{name}()", base), kind)

    def apply(self, node: ast.Call, switch: Switch) -> Value:
        """Take note of a switch around a function; return what stands for the result."""
        raise NotImplementedError

    rules: ClassVar[dict[type, Callable[[Any, Any], Value]]] = {**Expressions.rules, ast.Call: call}


_MAKES_MODULE = re.compile(r"torch\.nn\.(?:modules\.)?(?!Parameter$|Buffer$)[A-Z]\w*$")
_CALL_THEIR_ARGUMENT = ("map", "checkpoint", "checkpointing_func", "checkpoint_func", "partial")
# What takes a function to be called at another time, for another purpose.
_KEEPS = re.compile(r"(?:^|[._])(?:register|subscribe|connect|append|add|callback|hook|wraps|Thread|Timer)|hook$")
_GIVES_INDICES = re.compile(
    r"^(?:get|compute|find|encode|encode_to|to|sample|predict)_(?!(?:\w+_)?from_)(?:\w+_)?(?:ind(?:ex|ices)|idx|ids|tokens)$|"
    r"^get_(?:\w+_)?codes$|"
    r"^index_quantize$|^tokenize$|^maximum_path$|^viterbi(?:_|$)|^monotonic_align"
)
# Called under an if, these are the other way than training: self.moe_infer(x), self.generate_step(x).
_INFERS = re.compile(r"(?:^|[._])(?:infer|inference|generate|stream)(?:_\w+)?$")
_UNPACKS = re.compile(r"^dequantize_(?:\d+bit|blockwise|int\d|nf4|fp[48])")  # packed integers in, a table's numbers out
_RESULT = re.compile(r"(?:^|:)((?:call|attr):[^:]*)$")
_RUNS = re.compile(r"^(?!batch_decode|encode_plus|decode_ids)(?:\w+_)?(?:forward|decode|encode)(?:_|$)")
# The same few names in every file.
_gives_indices, _unpacks, _runs, _keeps = (
    lru_cache(maxsize=4096)(each.search) for each in (_GIVES_INDICES, _UNPACKS, _RUNS, _KEEPS)
)


@lru_cache(maxsize=4096)
def _asks_for_indices(target: str) -> bool:
    return _GIVES_INDICES.search(target.rpartition(".")[2]) is not None


_INDEX_FUNCTIONS = frozenset({"linear_sum_assignment", "argsort", "argmax", "argmin"})
_ESCAPES = {
    "detach": "GS201", "detach_": "GS201", "item": "GS302", "tolist": "GS302", "numpy": "GS301", "sample": "GS205",
}  # fmt: skip


FROZEN = "frozen, and frozen is not blocked"


def _makes_anew(node: ast.Call, name: str) -> bool:
    """Tell whether torch makes a new tensor of what it is given; ``as_tensor`` of a tensor is that tensor."""
    is_listed = bool(node.args) and isinstance(node.args[0], (ast.List, ast.ListComp))
    return name in ("tensor", "from_numpy") or (name in ("as_tensor", "asarray") and is_listed)


def _switches_off(node: ast.Call) -> bool:
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    return len(given) == 1 and getattr(given[0], "value", None) is False


def _keeps_graph(node: ast.Call) -> bool:
    """Tell whether a derivative is, or may be, taken with a graph of its own."""
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    said = given.get("create_graph")
    return getattr(said, "value", None) is not False if said else None in given or len(node.args) > 4


def _is_reentrant(node: ast.Call) -> bool:
    """Tell whether a checkpoint is, or may be, the reentrant kind, which is what torch takes if nothing is said."""
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    said = given.get("use_reentrant")
    return getattr(said, "value", None) is True if said else None not in given and len(node.args) > 1


def _through(node: ast.Call, target: str, given: list[Value]) -> Atoms:
    """Return the atoms of a call's arguments, each marked with its way into the function called."""
    found: set[str] = set()
    starred = next((number for number, each in enumerate(node.args) if isinstance(each, ast.Starred)), len(given))
    for number, value in enumerate(given):
        if value.atoms:
            rest = number - len(node.args)
            way = (number if number < starred else "*") if rest < 0 else node.keywords[rest].arg or "*"
            found.update(
                atom
                if "arg:" in atom or "cut:" in atom or atom.startswith(("in:", "from:"))
                else f"arg:{target}:{way}:{atom}"
                for atom in value.atoms
            )
    return frozenset(found)
