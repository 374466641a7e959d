"""Detaches that training is made with: straight-through estimators, targets of a loss, a discriminator's own step."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from gradscope.scanning.facts import Atoms, Site

STRAIGHT_THROUGH = "part of a straight-through estimator"
SHIFT = "a shift by the largest value, which a softmax cancels"
COMPARED = "what a loss compares with is held still on purpose"
SHOWN = "the discriminator is trained by itself here, and not what it is shown"

DETACH_RULES = ("GS201", "GS202")
_COMPARES = re.compile(
    r"(?:^|[._])(?:\w*loss|criterion\w*|mse|bce|kl_?div|cross_entropy|cosine_similarity|smooth_l1|huber)$"
)
_JUDGES = re.compile(r"(?:^|[._])(?:\w*discriminators?|disc|critic|net_?D|D)$")
_LARGEST = ("amax", "max", "logsumexp")


@dataclass(slots=True)
class Pairs:
    """The two-sided comparisons of a function, and the discriminators that it runs: a detach is judged by the others.

    ``detached`` maps a detach, by line and column, to what is held still there and what that is compared with;
    ``passed_through`` are the pairs of straight-through estimators.
    """

    detached: dict[tuple[int, int], tuple[str, str]] = field(default_factory=dict)
    passed_through: set[frozenset[str]] = field(default_factory=set)
    shown: dict[tuple[int, int], str] = field(default_factory=dict)
    undetached: set[str] = field(default_factory=set)

    def settled(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites, those that are meant marked: ``mse(a.detach(), b)`` beside ``mse(a, b.detach())``."""
        pairs = {(other, held) for held, other in self.detached.values()}
        meant = {
            at: COMPARED for at, pair in self.detached.items()
            if pair in pairs or frozenset(pair) in self.passed_through
        }  # fmt: skip
        meant |= {at: SHOWN for at, judge in self.shown.items() if judge in self.undetached}
        return [
            replace(site, harmless=meant[site.line, site.column])
            if site.rule in DETACH_RULES and (site.line, site.column) in meant
            else site
            for site in sites
        ]

    def meant_in_sum(self, node: ast.BinOp) -> str:
        """Return why a detach in a sum or a difference is meant; nothing where nothing says so."""
        inner = _passed_straight_through(node)
        if isinstance(inner, ast.BinOp):
            self.passed_through.add(frozenset((ast.dump(inner.left), ast.dump(inner.right))))
        if inner is not None:
            return STRAIGHT_THROUGH
        held = without_detach(node.right)
        is_shift = isinstance(node.op, ast.Sub) and held is not node.right and _is_largest_of(held, node.left)
        return SHIFT if is_shift else ""

    def note(self, first: ast.expr, second: ast.expr, sites: Iterable[Site]) -> None:
        """Take note of the sites of a comparison."""
        for held, other in ((first, second), (second, first)):
            for site in sites_of(held, sites) if not is_detached(other) else ():
                self.detached[site.line, site.column] = ast.dump(without_detach(held)), ast.dump(other)

    def judged(self, sides: list[ast.expr], atoms: list[Atoms], sites: list[Site]) -> list[Site]:
        """Return the sites of two sides, marked where a model's work is compared with what is held still."""
        if not sides:  # it is no comparison
            return sites
        self.note(sides[0], sides[1], sites)
        meant: list[Site] = []
        for held, other in ((0, 1), (1, 0)):
            if is_computed(atoms[other]) and not is_detached(sides[other]):
                meant += sites_of(sides[held], sites)
        return [replace(site, harmless=COMPARED) if site in meant else site for site in sites]

    def note_shown(self, judge: str, sites: Sequence[Site]) -> None:
        """Take note that a discriminator is run on what was detached at these sites, or on what was not."""
        detaches = [site for site in sites if site.rule in DETACH_RULES]
        self.shown.update(((site.line, site.column), judge) for site in detaches)
        if not detaches:
            self.undetached.add(judge)


@lru_cache(maxsize=4096)  # the same few names in every file
def is_discriminator(dotted: str) -> bool:
    """Tell a discriminator by its name."""
    return _JUDGES.search(dotted) is not None


def compared(node: ast.Call, dotted: str) -> list[ast.expr]:
    """Return the two values that a call compares, by its name: ``F.mse_loss(a, b)``, ``self.criterion(a, to=b)``."""
    given = [*node.args, *(keyword.value for keyword in node.keywords)][:2]
    return given if len(given) == 2 and _COMPARES.search(dotted) else []


def is_computed(atoms: Atoms) -> bool:
    """Tell whether a value is the work of a model, and not just what a function was given."""
    return any(atom.startswith(("call:", "attr:")) for atom in atoms)


def sites_of(node: ast.expr, sites: Iterable[Site]) -> Iterator[Site]:
    """Yield the detaches that an expression ends in, of its sites."""
    if is_detached(node):
        yield from (site for site in sites if site.rule in DETACH_RULES and is_within(site, node))


def is_within(site: Site, node: ast.expr) -> bool:
    """Tell whether a site lies in an expression."""
    end = node.end_lineno or node.lineno
    if node.lineno != end:
        return node.lineno <= site.line <= end
    return site.line == end and node.col_offset < site.column <= (node.end_col_offset or 0)


def is_detached(node: ast.expr) -> bool:
    """Tell ``loss.clone().detach().mean()``."""
    return without_detach(node) is not node


def without_detach(node: ast.expr) -> ast.expr:
    """Return what is detached in ``z.detach().mean()``; a node without a detach as it is."""
    part = node
    while isinstance(part, (ast.Call, ast.Attribute)):
        if isinstance(part, ast.Attribute) and part.attr in ("detach", "item", "data"):
            return part.value
        part = part.func if isinstance(part, ast.Call) else part.value
    return node


def _is_largest_of(node: ast.expr, other: ast.expr) -> bool:
    """Tell ``x.amax(-1)`` and ``x.max(-1)[0]`` of something that is in the other expression."""
    if isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute) and node.attr == "values":
        node = node.value
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in _LARGEST:
        return False
    is_function = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
    base = node.args[0] if is_function and node.args else node.func.value
    return ast.dump(base) in ast.dump(other)


def _passed_straight_through(node: ast.BinOp) -> ast.expr | None:
    """Return what is detached in ``x + (q - x).detach()`` and its like: a difference, or what is also beside it."""
    for side, other in ((node.left, node.right), (node.right, node.left)):
        if isinstance(side, ast.Attribute) and side.attr == "data":
            inner: ast.expr = side.value
        elif isinstance(side, ast.Call) and isinstance(side.func, ast.Attribute) and side.func.attr == "detach":
            inner = side.func.value
        else:
            continue
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, (ast.Sub, ast.Add)):
            return inner
        # soft - soft.detach(): the same name on both sides
        if ast.dump(inner) in ast.dump(other):
            return inner
    return None
