"""What one file says, as small plain data: written by ``walk.py``, cached, joined by ``reach.py``.

Atoms tell what a result depends on. Whether one carries a gradient is only known once the classes of the
package are joined.

- ``param:x``: a parameter that may hold floats
- ``attr:x``: ``self.x`` was read
- ``call:self.x``, ``call:dotted.name``: the result of a call
- ``arg:self.x:0:param:y``: the first argument of such a call was ``y``
- ``cut:12``: what a detach or the like on line 12 gave out
- ``from:call:...``: the numbers of such a result, made a tensor anew: no gradient comes of them
- ``in:12``: what was computed in the block that begins on line 12
- ``off:...``: any of these, computed where gradients are switched off
- ``apart``: a part of the result is computed with gradients off and nothing else
- ``apart:self.x``: a part of the result is what such a call gives and nothing else
- ``data``: the result is said to be arrays or text, which no gradient is asked of
- ``loss``: a part of the result goes by the name of a loss
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

How: TypeAlias = Literal["decorator", "block", "call", "applied", "class"]
Atoms: TypeAlias = frozenset[str]

NOTHING: Atoms = frozenset()
APART = "apart"
DATA = "data"
LOSS = "loss"


@dataclass(frozen=True, slots=True)
class Site:
    """One place in the source that stops a gradient, or may.

    ``depends`` are the atoms of what comes out of it, ``effects`` those of what it stores on ``self``,
    ``gives`` the local names that are used after it; ``conditional`` says that a value known only at run
    time decides, ``harmless`` why it is no break. ``runs`` is what a block itself calls and reads of ``self``:
    what else it computes with was computed before.
    """

    rule: str
    line: int
    column: int
    end_line: int
    function: str
    mechanism: str
    how: How
    depends: Atoms = NOTHING
    effects: Atoms = NOTHING
    gives: tuple[str, ...] = ()
    conditional: bool = False
    harmless: str = ""
    runs: Atoms = NOTHING


class Call(NamedTuple):
    """A call as written, of what may be in the scan: its dotted target (``self.encode``, ``super().forward``).

    ``used`` says whether its value goes anywhere (a call as a statement of its own has an effect at most),
    ``sometimes`` in which mode alone it is made: ``training``, ``evaluation`` (also where an ``if`` decides whether
    inference is run), or ``either``, as a setting beside ``self.training`` says.
    """

    target: str
    used: bool = True
    sometimes: str = ""


@dataclass(slots=True)
class Function:
    """A function or method that was looked into.

    ``parameters`` are those that may hold floats or modules, ``signature`` are all by position (without
    ``self``), ``reads`` the attributes of ``self`` that it reads. Of the calls of other packages' functions
    and of builtins one is kept at most: they are two of three, lead nowhere, and only tell that it computes.
    ``backward`` is what it goes backward from, if it is a step of training; that counts as given out. ``steps`` are the
    optimizers whose ``step()`` it calls. ``gives`` are the classes of what it makes, for those alone that a model is
    got from (``makers.py``).
    """

    name: str
    line: int
    end_line: int
    parameters: tuple[str, ...] = ()
    signature: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()
    reads: frozenset[str] = frozenset()
    returns: Atoms = NOTHING
    gives_value: bool = False
    kind: str = ""
    backward: Atoms | None = None
    steps: tuple[str, ...] = ()
    gives: dict[str, str] = field(default_factory=dict)

    @property
    def goes_backward(self) -> bool:
        """Whether it is a step of training by itself."""
        return self.backward is not None


@dataclass(slots=True)
class Class:
    """A class: its bases as written, and what its attributes are.

    ``attributes`` maps a name to ``parameter``, ``buffer``, ``module``, ``weightless`` (a module without
    parameters), ``plain`` or the dotted name of the class it was made from. ``|A|B`` is a module that holds, or may
    be, any of these classes (a container, one of two ways), ``?build`` what a function of the scan makes
    (``makers.py`` has the notation). ``aliases`` maps names to the functions they stand for, of which a list may have
    several (``Net.run|Net.stop``).
    """

    name: str
    line: int
    bases: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    attributes: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


# What an attribute is that is of no class that is told.
NO_CLASS = frozenset({"", "plain", "parameter", "buffer", "module", "weightless"})


def classes_in(kind: str) -> list[str]:
    """Return the classes, and the functions that make one, in what ``Class.attributes`` says of an attribute."""
    return [] if kind in NO_CLASS else kind.strip("|").split("|")


@dataclass(slots=True)
class Ignore:
    """A comment ``# gradscope: ignore[...]``; without codes it is about every rule.

    ``first`` and ``last`` are the lines it is about: those of the statement it stands in, or of the one below.
    """

    line: int
    first: int
    last: int
    codes: tuple[str, ...]


class Frozen(NamedTuple):
    """What is frozen somewhere, on some way or always: its name, and the top-level class or function that says so."""

    name: str
    scope: str


class Optimizer(NamedTuple):
    """An optimizer that is made: its name, the top-level class or function it is made in, what it is to train.

    ``given`` maps the names of what it gets the parameters of (``encoder``, ``self.head``, ``self``) to what that is
    put into, where only the whole is handed over. ``filtered``: of these only what requires a gradient (adapters).
    """

    name: str
    scope: str
    given: dict[str, str]
    filtered: bool = False


@dataclass(slots=True)
class FileFacts:
    """Everything that is known of one file.

    ``headers`` are all top-level classes and their bases, ``tables`` what a model is got from by a key, and other names
    for functions that make one (``makers.py``). ``optimizers`` are only known of a file with a step of
    training.
    """

    path: str
    module: str
    imports: dict[str, str] = field(default_factory=dict)
    classes: dict[str, Class] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    wrappers: dict[str, str] = field(default_factory=dict)
    headers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tables: dict[str, dict[str, str]] = field(default_factory=dict)
    ignores: list[Ignore] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)
    parsed: bool = False
    skipped: str = ""
