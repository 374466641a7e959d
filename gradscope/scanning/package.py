"""The files of a scan joined: which class is an ``nn.Module``, which method a call means.

Names are resolved the way Python would (imports, re-exports, base classes in order), as far as the
source shows it; what cannot be resolved is left out, never guessed by its last name alone.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from functools import lru_cache
from typing import NamedTuple

from gradscope.scanning.facts import Call, Class, FileFacts, Function, classes_in
from gradscope.scanning.made import classes_made

# Classes of other packages that are modules; torch.nn.* is one anyway.
MODULE_BASES = frozenset(
    "Module LightningModule PreTrainedModel ModelMixin Sequential ModuleList ModuleDict PyTorchModelHubMixin "
    "GraphModule ScriptModule".split()
)
# Base classes that bring dozens of public methods which are no part of any model's computation.
FRAMEWORKS = MODULE_BASES | {"GenerationMixin", "PeftAdapterMixin", "PushToHubMixin", "DiffusionPipeline"}
DEEPEST = 12


class Place(NamedTuple):
    """A function or class of the scan: the module it is in and its qualified name there."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Package:
    """Answers questions that need more than one file.

    ``outside`` are the modules that no target holds: they were followed from one.
    """

    def __init__(self, files: Iterable[FileFacts], outside: frozenset[str] = frozenset()) -> None:
        self.files = {facts.module: facts for facts in files}
        self.outside = outside
        self._roots = {module.partition(".")[0] for module in self.files}
        self._children: dict[str, list[str]] = {}
        self._homes: dict[str, list[str]] = {}
        for module, facts in self.files.items():
            for name in facts.headers:
                self._homes.setdefault(name, []).append(module)
        classes = [klass for facts in self.files.values() for klass in facts.classes.values()]
        self._inner_classes = [
            Place(facts.module, name) for facts in self.files.values() for name in facts.classes if "." in name
        ]
        # What no class has need not be looked for in all bases of one: three of four names that are asked for.
        self._method_names = {name for klass in classes for name in (*klass.methods, *klass.aliases)}
        self._attribute_names = {name for klass in classes for name in klass.attributes}
        self._has_makers = False
        self._property_names: set[str] = set()
        self._inner_names: set[str] = set()  # of all functions made in functions, and of some more
        self._renamed: dict[str, set[str]] = {}
        for module in outside & self.files.keys():
            for name, meant in self.files[module].imports.items():
                last = meant.rpartition(".")[2]
                if last != name and name[0] != "*":
                    self._renamed.setdefault(last, set()).add(name)
        self._function_names: set[str] = set()  # also those that an import, or an assignment, gives to some
        for facts in self.files.values():
            self._function_names.update(name for name, meant in facts.imports.items() if not meant.endswith(f".{name}"))
            for function in facts.functions.values():
                self._has_makers = self._has_makers or bool(function.gives)
                scope, _, name = function.name.rpartition(".")
                self._function_names.add(name)
                if function.kind == "property":
                    self._property_names.add(name)
                if "." in scope or scope in facts.functions:
                    self._inner_names.add(name)
        self._starred = lru_cache(maxsize=None)(self._starred_in)
        self.class_of = lru_cache(maxsize=None)(self._class_of)
        self.has_base = lru_cache(maxsize=None)(self._has_base)
        self._bases = lru_cache(maxsize=None)(self._bases_of)
        self.is_module = lru_cache(maxsize=None)(self._is_module)
        self.mro = lru_cache(maxsize=None)(self._mro)
        self.callees = lru_cache(maxsize=None)(self._callees)
        self.attribute = lru_cache(maxsize=None)(self._attribute)
        self.find = lru_cache(maxsize=None)(self._find)
        self.method = lru_cache(maxsize=None)(self._method)
        self.methods = lru_cache(maxsize=None)(self._methods)
        self.find_class = lru_cache(maxsize=None)(self._find_class)
        self.made = lru_cache(maxsize=None)(self._made)
        self._of_self = lru_cache(maxsize=None)(self._owned)
        self._global = lru_cache(maxsize=None)(self._called)

    @property
    def own(self) -> list[FileFacts]:
        """The files of the targets, without those followed from them."""
        return [facts for facts in self.files.values() if facts.module not in self.outside]

    def function(self, place: Place) -> Function | None:
        """Return the fact of a function, where it was looked into."""
        facts = self.files.get(place.module)
        return facts.functions.get(place.name) if facts else None

    def _class_of(self, place: Place) -> Class | None:
        """Return the class that a method belongs to."""
        facts = self.files.get(place.module)
        owner = place.name.rpartition(".")[0]
        while facts and owner:
            if owner in facts.classes:
                return facts.classes[owner]
            owner = owner.rpartition(".")[0]
        return None

    # --- classes --------------------------------------------------------------------------------

    def _bases_of(self, place: Place) -> tuple[str, ...]:
        facts = self.files.get(place.module)
        if facts is None:
            return ()
        if place.name in facts.classes:
            return facts.classes[place.name].bases
        return tuple(self._imported(facts, base) for base in facts.headers.get(place.name, ()))

    def _imported(self, facts: FileFacts, dotted: str) -> str:
        root, _, rest = dotted.partition(".")
        return ".".join(filter(None, (facts.imports.get(root, root), rest)))

    def _is_module(self, place: Place, depth: int = 0) -> bool:
        if depth > DEEPEST:
            return False
        for base in self._bases(place):
            last = base.rpartition(".")[2]
            if last in MODULE_BASES or base.startswith(("torch.nn.", "nn.")):
                return True
            found = self.find_class(base, place.module)
            if found is not None and found != place and self._is_module(found, depth + 1):
                return True
        return False

    def _has_base(self, place: Place, names: frozenset[str], depth: int = 0) -> bool:
        """Tell whether a class or one of its bases goes by one of these names."""
        if depth > DEEPEST:
            return False
        for base in self._bases(place):
            if base.rpartition(".")[2] in names:
                return True
            found = self.find_class(base, place.module)
            if found is not None and found != place and self._has_base(found, names, depth + 1):
                return True
        return False

    def _find_class(self, dotted: str, module: str) -> Place | None:
        """Return where a class named from ``module`` is defined, if that is in the scan."""
        facts = self.files.get(module)
        if facts and (dotted in facts.headers or dotted in facts.classes):
            return Place(module, dotted)
        found = self.find(dotted, module)
        if found is not None:
            return found
        if "." in dotted and dotted.partition(".")[0] not in self._roots:
            return None  # another package's
        last = dotted.rpartition(".")[2]
        homes = self._homes.get(last, ())
        return Place(homes[0], last) if len(homes) == 1 else None

    def descendants(self, name: str) -> set[str]:
        """Return the names of the classes that derive from one of this name, with itself."""
        if not self._children:
            for facts in self.files.values():
                for child, bases in facts.headers.items():
                    for base in bases:
                        self._children.setdefault(base.rpartition(".")[2], []).append(child)
            for place in self._inner_classes:
                for base in self._bases(place):
                    self._children.setdefault(base.rpartition(".")[2], []).append(place.name)
        found = {name}
        pending = [name]
        while pending:
            for child in self._children.get(pending.pop(), ()):
                if child not in found:
                    found.add(child)
                    pending.append(child)
        return found

    def also_called(self, names: set[str]) -> set[str]:
        """Return the other names that files outside hand these classes on by: ``from .m3 import Embedder as Model``."""
        return set().union(*(self._renamed.get(name, ()) for name in names))

    def classes_called(self, names: set[str]) -> list[Place]:
        """Return the classes by these names, as ``descendants`` gives them: also those inside of others."""
        found = [Place(facts.module, name) for facts in self.files.values() for name in names & facts.headers.keys()]
        return found + [place for place in self._inner_classes if place.name in names]

    def _mro(self, place: Place) -> tuple[Place, ...]:
        order: list[Place] = []
        pending = [place]
        while pending and len(order) < 60:
            current = pending.pop(0)
            if current in order:
                continue
            order.append(current)
            found = (self.find_class(base, current.module) for base in self._bases(current))
            pending = [base for base in found if base is not None] + pending
        return tuple(order)

    def _method(self, owner: Place, name: str, after: Place | None = None) -> Place | None:
        """Return the method that ``owner().name`` means (``after``: as ``super()`` in that class sees it)."""
        return next(iter(self.methods(owner, name, after)), None)

    def _methods(self, owner: Place, name: str, after: Place | None = None) -> tuple[Place, ...]:
        """Return all functions that it may mean: a list of methods that is kept under a name has several."""
        if name not in self._method_names:
            return ()
        order = self.mro(owner)
        if after is not None and after in order:
            order = order[order.index(after) + 1 :]
        for place in order:
            facts = self.files.get(place.module)
            klass = facts.classes.get(place.name) if facts else None
            if klass is None or facts is None:
                continue
            if name in klass.methods:
                return (Place(place.module, f"{place.name}.{name}"),)
            meant = klass.aliases[name].split("|") if name in klass.aliases else ()
            found = tuple(each for one in meant if (each := self.find(one, place.module)) is not None)
            if found:
                return found
        return ()

    def _attribute(self, owner: Place, name: str) -> str:
        """Return what an attribute of a class is (see ``facts.Class``); empty where it is not known."""
        for place in self.mro(owner) if name in self._attribute_names else ():
            facts = self.files.get(place.module)
            klass = facts.classes.get(place.name) if facts else None
            if klass and klass.attributes.get(name):
                return klass.attributes[name]
        return ""

    def is_kept(self, owner: Place, name: str) -> bool:
        """Tell whether a class was seen to keep something under a name, in its constructor or its body."""
        return any(
            name in klass.attributes or name in klass.aliases
            for place in self.mro(owner)
            if (facts := self.files.get(place.module)) and (klass := facts.classes.get(place.name))
        )

    # --- names ----------------------------------------------------------------------------------

    def _find(self, dotted: str, module: str, depth: int = 0) -> Place | None:
        """Return the function or class that a dotted name means in ``module``, through re-exports."""
        facts = self.files.get(module)
        if facts is None or depth > 6 or not dotted:
            return None
        if dotted in facts.functions or dotted in facts.headers or dotted in facts.classes or dotted in facts.tables:
            return Place(module, dotted)
        root, _, rest = dotted.partition(".")
        if root in facts.imports and facts.imports[root] != root:
            dotted = ".".join(filter(None, (facts.imports[root], rest)))
            if dotted in facts.functions:  # run = torch.no_grad()(_run)
                return Place(module, dotted)
        else:
            for base in self._starred(module):
                found = self.find(dotted, base, depth + 1)
                if found is not None:
                    return found
        if dotted.partition(".")[0] not in self._roots:
            return None  # another package's
        head, tail = dotted, ""
        while head:
            if head in self.files and tail and (head != module or depth):
                return self.find(tail, head, depth + 1)
            head, _, last = head.rpartition(".")
            tail = f"{last}.{tail}" if tail else last
        return None

    def _starred_in(self, module: str) -> list[str]:
        """Return the modules that a file imports everything from."""
        imports = self.files[module].imports
        return [base for name, base in imports.items() if name[0] == "*" and base != module]

    def _callees(self, place: Place, owner: Place | None) -> list[tuple[Call, Place]]:
        """Return the calls of a function that mean a function of the scan; ``owner`` is the class of ``self``."""
        function = self.function(place)
        if function is None:
            return []
        found = []
        for call in (*function.calls, *self._properties(function, owner)):
            targets = self.targets(call.target, place, owner)
            is_one_of = self._has_makers and targets and self._is_one_of(call.target, place, owner)
            made = call._replace(sometimes=call.sometimes or "either") if is_one_of else call
            found += [(made, target) for target in targets if target != place]
        return found

    def _is_one_of(self, target: str, place: Place, owner: Place | None) -> bool:
        """Tell whether a call means one function or another, as what was made is of one class or another."""
        kind, _, method = target.rpartition(".")
        module = place.module
        if target.startswith("self.") and owner is not None:
            name, _, method = target[5:].partition(".")
            kind, module = self.attribute(owner, name), owner.module
        classes = self.made(kind, module) if "?" in kind[:2] or target[:1] == "|" else ()
        return len(classes) > 1 and len({self._run_by(klass, method or "__call__") for klass in classes}) > 1

    def _properties(self, function: Function, owner: Place | None) -> list[Call]:
        """Return the properties that a method reads: each is a call."""
        names = self._property_names & function.reads if owner else ()
        return [Call(f"self.{name}") for name in sorted(names) if owner and self.property(owner, name)]

    def property(self, owner: Place, name: str) -> Place | None:
        """Return the property of a class by this name, where it was looked into."""
        method = self.method(owner, name) if name in self._property_names else None
        function = self.function(method) if method else None
        return method if function is not None and function.kind == "property" else None

    def _local(self, name: str, place: Place) -> Place | None:
        """Return a function defined inside the one that names it, or beside it in the same outer one."""
        if name.rpartition(".")[2] not in self._inner_names:
            return None
        functions = self.files[place.module].functions
        scope = place.name
        while scope in functions:
            if f"{scope}.{name}" in functions:
                return Place(place.module, f"{scope}.{name}")
            scope = scope.rpartition(".")[0]
        return None

    def target(self, dotted: str, place: Place, owner: Place | None) -> Place | None:
        """Return the function that a call in ``place`` means, ``owner`` being the class of ``self``."""
        return next(iter(self.targets(dotted, place, owner)), None)

    def targets(self, dotted: str, place: Place, owner: Place | None) -> tuple[Place, ...]:
        """Return all functions that a call may mean: a container runs each of its parts."""
        if dotted.startswith("self."):
            return self._of_self(dotted, owner) if owner else ()
        if dotted[:1] in ("?", "|"):
            return self._of_made(dotted, place.module)
        found: Place | None = None
        if dotted.startswith("super()."):
            home = self.class_of(place)
            _, _, name = dotted.partition(".")
            found = self.method(owner, name, Place(place.module, home.name) if home else None) if owner else None
        elif dotted.endswith(".__call__") or dotted.rpartition(".")[2] in self._function_names:  # one of twenty
            found = self._local(dotted, place) or self._global(dotted, place.module)
        return () if found is None else (found,)

    def _owned(self, dotted: str, owner: Place) -> tuple[Place, ...]:
        first, _, rest = dotted.partition(".")[2].partition(".")
        if first not in self._method_names and first not in self._attribute_names:
            return ()
        found = self.methods(owner, first) if not rest else ()
        return found or self._through_attribute(owner, first, rest)

    def _called(self, dotted: str, module: str) -> Place | None:
        found = self.find(dotted, module)
        if found is None:
            return self.of_instance(dotted, module)
        # Constructors are made once, not in every pass.
        home = self.files[found.module]
        return None if found.name in home.headers or found.name in home.tables else found

    def of_instance(self, dotted: str, module: str) -> Place | None:
        """Return the method that ``Tower.encode`` means: a base class may have it; calling an instance runs it."""
        owner, _, name = dotted.rpartition(".")
        klass = self.find_class(owner, module) if owner.rpartition(".")[2][:1].isupper() else None
        if klass is None:
            return None
        if self.function(klass) is not None:  # a function with the name of a class
            return next(iter(self._of_made(dotted, module)), None)
        return self._run_by(klass, name)

    def _of_made(self, dotted: str, module: str) -> tuple[Place, ...]:
        """Return the methods that ``?load.encode`` may mean: of each class that ``load`` may give."""
        kind, _, name = dotted.rpartition(".")
        found = (self._run_by(klass, name) for klass in self.made(kind, module))
        return tuple(dict.fromkeys(each for each in found if each is not None))

    def _run_by(self, klass: Place, name: str) -> Place | None:
        return self.method(klass, name) or (self.method(klass, "forward") if name == "__call__" else None)

    def _through_attribute(self, owner: Place, name: str, method: str) -> tuple[Place, ...]:
        found = (self._run_by(klass, method or "__call__") for klass in self.classes_of(owner, name))
        return tuple(dict.fromkeys(each for each in found if each is not None))

    def classes_of(self, owner: Place, name: str) -> list[Place]:
        """Return the classes of the scan that an attribute may be of, or holds."""
        return [each for kind in classes_in(self.attribute(owner, name)) for each in self.made(kind, owner.module)]

    def _made(self, kind: str, module: str) -> tuple[Place, ...]:
        """Return the classes of the scan that a value may be of (``made.py``)."""
        return tuple(dict.fromkeys(classes_made(self, kind, module)))

    def makers_of(self, classes: Container[str]) -> set[str]:
        """Return the names of the functions that give out instances of these classes: ``build_tower``.

        One that is a single word is in every file, and not looked for.
        """
        return {
            function.name
            for facts in self.files.values()
            for function in facts.functions.values()
            if "_" in function.name and "." not in function.name and any(
                atom.startswith("call:") and atom[5:].rpartition(".")[2] in classes for atom in function.returns
            )
        }  # fmt: skip
