"""What training runs and the source does not tell of: models made by a function, of no class that it shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gradscope.scanning.facts import Call
from gradscope.scanning.instances import GIVE_THEMSELVES, loads_models
from gradscope.scanning.judge import Judge
from gradscope.scanning.made import maker_of
from gradscope.scanning.package import DEEPEST, Package, Place
from gradscope.scanning.reach import MODULE_API, Reach, Use


def makers_not_followed(judge: Judge, uses: Iterable[Use]) -> list[str]:
    """Return what gave the models that the code scanned runs in these functions, where no class is known of them."""
    found: dict[str, None] = {}
    reach = judge.reach
    for use in dict.fromkeys(uses):
        for place in reach.reachable(*use):
            function = judge.package.function(place)
            if function is None or place.module in judge.package.outside:
                continue
            owner = reach.owner_for(place, use[1])
            for call in function.calls:
                found.update(dict.fromkeys(_unknown(judge, call, place, owner)))
    return list(found)


def _unknown(judge: Judge, call: Call, place: Place, owner: Place | None) -> Iterator[str]:
    """Yield what gave the model that a call runs, if it leads nowhere."""
    kind, method = _split(judge, call.target, owner)
    if not kind.startswith(("?", "|")) or not call.used or method in MODULE_API or method in GIVE_THEMSELVES:
        return
    home = place.module if call.target.startswith(("?", "|")) else owner.module if owner else ""
    if not judge.package.made(kind, home):
        yield from (name for name in _others(judge.package, kind, home) if loads_models(name))


def _others(package: Package, kind: str, module: str, depth: int = 0) -> Iterator[str]:
    """Yield the functions of other packages that a value comes from, through functions of the code scanned."""
    roots = {facts.module.partition(".")[0] for facts in package.own}
    for name in filter(None, map(maker_of, kind.split("|"))) if depth < DEEPEST else ():
        place = package.find(name, module)
        own = package.function(place) if place is not None and place.module not in package.outside else None
        if own is not None and place is not None:
            for made in own.gives.values():
                yield from _others(package, made, place.module, depth + 1)
        elif "." in name and name.partition(".")[0] not in {*roots, "cls", "self"}:
            yield name


def _split(judge: Judge, target: str, owner: Place | None) -> tuple[str, str]:
    """Return what a call is made on, in the notation of ``makers.py``, and the method."""
    if target.startswith(("?", "|")):
        kind, _, method = target.rpartition(".")
        return kind, method
    if owner is None or not target.startswith("self."):
        return "", ""
    name, _, method = target[5:].partition(".")
    return judge.package.attribute(owner, name), method


def parts_not_followed(reach: Reach, entry: Place, owner: Place | None) -> list[str]:
    """Return what ``self`` keeps and an entry runs, and the source does not show: of no class that is scanned."""
    found: dict[str, None] = {}
    for place in reach.reachable(entry, owner):
        function, home = reach.package.function(place), reach.owner_for(place, owner)
        if function is None or home is None:
            continue
        for call in function.calls:
            name = call.target.removeprefix("self.")
            is_known = reach.package.targets(call.target, place, home) or reach.package.classes_of(home, name)
            if name == call.target or "." in name or is_known:
                continue
            if reach.package.attribute(home, name) != "module" and reach.computes(home, name):
                found[call.target] = None
    return list(found)
