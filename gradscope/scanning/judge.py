"""How grave each site is: severity, confidence and the words for it (``design``: error, warning, note).

An error is a forward pass, or the only way into a module, that computes without gradients. A warning is
an inference-only method beside a differentiable one, or what the source alone cannot decide. All else is
a note, with the reason why it is none of the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property

from gradscope.scanning.entries import ClassReport, Entries
from gradscope.scanning.facts import LOSS, NOTHING, Atoms, FileFacts, Site
from gradscope.scanning.intent import (
    are_decoded,
    is_table,
    meant_by_class,
    meant_by_module,
    meant_by_name,
    meant_by_result,
)
from gradscope.scanning.judgement import FROZEN, NOTHING_LIVE, Judgement, what, where
from gradscope.scanning.outputs import are_copies, are_figures
from gradscope.scanning.package import Package, Place
from gradscope.scanning.reach import FORWARDS, Chain, Reach, Use, source_of
from gradscope.scanning.steps import INDEXING, Steps
from gradscope.scanning.training import Loss, Training, Way

# Tensor operations whose result, given back by a forward pass, may be a cut that nobody meant.
FLOWING = frozenset({"GS201", "GS202", "GS203", "GS205", "GS207", "GS301"})

_LOSS_CLASS = re.compile(r"Loss|Criterion")
_LOSS_FUNCTION = re.compile(r"(?:^|_)loss(?:es)?(?:_|$)")
_IS_PREDICTION = re.compile(
    r"(?:\w+_)?(?:pred|preds|predictions?|predicted|logits?|outputs?|y_?hat|probs?|scores?|fake)$|pred_\w+$"
)
_IS_MODEL = re.compile(r"param:(?:\w+_)?(?:model|net|network|unet|vae)$")
GENERATES = re.compile(r"(?:generate(?:_.*)?|sample|(?:offline_)?inference|(?:validation|test|predict)_step)$")


class Judge:
    """Judges every site of a package."""

    def __init__(self, package: Package) -> None:
        self.package = package
        harmless: dict[tuple[Place, Site], str] = {}
        for facts in package.files.values():
            for site in facts.sites:
                place = Place(facts.module, site.function)
                why = site.harmless or (site.rule.startswith("GS10") and meant_by_class(place, package))
                if why:
                    harmless[place, site] = why
        self.harmless = harmless
        self.reach = Reach(package, harmless)
        self.entries = Entries(self.reach)
        self.training = Training(self.reach)
        self.steps = Steps(self.reach)
        self._note_meant()
        reach = self.reach
        self.regions = {place for place in reach.regions if reach.blockers(place) and not meant_by_name(place)}

    def _note_meant(self) -> None:
        """Add what is meant by its results, modules or class to the harmless, so that no method is blocked by it."""
        for place, sites in self.reach.regions.items():
            for site in sites if place.name else ():
                live = self.reach.live(site.depends | site.effects, place)
                why = self._meant(site, place, live) if live and (place, site) not in self.harmless else ""
                if why:
                    self.harmless[place, site] = why

    @cached_property
    def reports(self) -> list[ClassReport]:
        """The classes with a stopped method."""
        return self._class_reports(self.reach.leading_to(self.regions))

    @property
    def own_reports(self) -> list[ClassReport]:
        """Those of the code scanned."""
        return [report for report in self.reports if report.place.module not in self.package.outside]

    @cached_property
    def report_of(self) -> dict[Place, ClassReport]:
        """The same by class."""
        return {report.place: report for report in self.reports}

    @cached_property
    def _only_way(self) -> dict[tuple[Place, Site], Chain]:
        return self._only_ways()

    def judge(self, family: str = "GS") -> list[Judgement]:
        """Return every site of the code scanned, of the rules that begin like ``family``, judged."""
        return [
            self.judged(facts, site, Place(facts.module, site.function))
            for facts in self.package.own
            for site in facts.sites
            if site.rule.startswith(family)
        ]

    # --- what the classes say ---------------------------------------------------------------------

    def _class_reports(self, stopped: set[Place]) -> list[ClassReport]:
        reports = []
        for facts in self.package.files.values():
            for name, klass in facts.classes.items():
                owner = Place(facts.module, name)
                if not any(Place(facts.module, f"{name}.{method}") in stopped for method in klass.methods):
                    continue
                entries = self.entries.of(owner)
                if any(entry.chain for entry in entries):
                    is_module = self.package.is_module(owner)
                    reports.append(ClassReport(owner, is_module, entries, self.entries.clean_components(owner)))
        return reports

    def _only_ways(self) -> dict[tuple[Place, Site], Chain]:
        """Return the sites of module classes in which every public compute method is stopped."""
        found: dict[tuple[Place, Site], Chain] = {}
        for report in self.own_reports:
            closed = report.is_module and all(
                entry.status == "blocked" and entry.chain and not entry.chain.partly for entry in report.entries
            )
            if closed and self.entries.is_known(report.place) and not self._only_generates(report):
                for key, chain in self._sites_inside(report):
                    found.setdefault(key, chain)
        return found

    def _sites_inside(self, report: ClassReport) -> Iterator[tuple[tuple[Place, Site], Chain]]:
        """Yield the sites that a class comes to, each with the way there; who gives arrays or text trains nothing."""
        for chain in (entry.chain for entry in report.entries if entry.chain):
            for place, site in chain.sites if not self.reach.gives_data(chain.steps[0]) else ():
                if not self.reach.gives_data(place) and (
                    not _in_mixin(place) or chain.steps[0].name.endswith(FORWARDS)
                ):
                    yield (place, site), chain
        for place in self.entries.methods(report.place):
            is_step = self.entries.is_a_step(place.name.rpartition(".")[2], report.place)
            for site in self.reach.blockers(place) if not (is_step or self.reach.gives_data(place)) else ():
                if self.reach.owner(place) == report.place:
                    yield (place, site), Chain([place], [(place, site)])

    def _only_generates(self, report: ClassReport) -> bool:
        """Tell whether a class has no forward pass to train with, only ways to generate: its parts are trained."""
        return all(
            GENERATES.match(entry.place.name.rpartition(".")[2]) or self.reach.gives_data(entry.place)
            for entry in report.entries
        )

    # --- one site -----------------------------------------------------------------------------------

    def judged(self, facts: FileFacts, site: Site, place: Place) -> Judgement:
        """Return one site with all that is to be said of it."""
        found = None if site.harmless else self.steps.judged(facts, site, place)
        if found is not None:
            return found
        why = self.harmless.get((place, site), "")
        if why:
            return Judgement(facts, site, "note", "likely", f"{what(site)}: {why}.")
        if site.rule == "GS107":
            return Judgement(
                facts, site, "warning", "likely",
                f"{site.mechanism}: the switch stays on in the code that runs meanwhile, outside this function.",
            )  # fmt: skip
        if site.how == "class":
            return Judgement(
                facts, site, "warning", "likely",
                f"{what(site)} on a class: the parameters made in its constructor become inference tensors.",
            )  # fmt: skip
        if site.rule.startswith("GS10"):
            return self._region(facts, site, place)
        return self._operation(facts, site, place)

    def _region(self, facts: FileFacts, site: Site, place: Place) -> Judgement:
        if not site.function:
            return self._at_import(facts, site)
        live = self.reach.live(site.depends | site.effects, place)
        if not live and not (site.how == "call" and site.rule == "GS105"):
            return Judgement(facts, site, "note", "likely", f"{what(site)}: {NOTHING_LIVE}.")
        way = self.training.reached.get(place)
        only = self._only_way.get((place, site))
        is_dropped = site.how == "block" and not self.reach.is_given_back(site, place)
        # No gradient would get further without the switch; or none but one to an input is lost.
        ends_here = is_dropped or are_decoded(site.gives) or self._is_frozen(site, place, live)
        if only is not None and not (site.conditional or ends_here):
            through = only.steps[0].name.rpartition(".")[0]
            message = f"{where(site)}, and every public way through {through} leads here."
            return Judgement(facts, site, "error", "certain", message, only.steps)
        if way is not None:
            return self.in_forward(facts, site, place, way)
        meant = meant_by_name(place)
        if meant:
            return Judgement(facts, site, "note", "likely", f"{what(site)}: {meant}.")
        return self._beside(facts, site, place, live)

    def _meant(self, site: Site, place: Place, live: Atoms) -> str:
        if is_table(place) and not any(self._is_weight(atom, place) for atom in live):
            return "a positional table, computed from sizes and positions"
        if site.how == "block" and self._prepares_loss(site, place):
            return "it prepares targets or weights of a loss"
        # A forward pass that does nothing but run a teacher is stopped all the same.
        if place.name.rpartition(".")[2] not in FORWARDS or self.reach.flows(place, self.reach.owner(place)):
            run = (source_of(atom).removeprefix("call:") for atom in live if "call:" in atom)
            parts = (part for name in run for part in name.split("."))
            teacher = meant_by_module(parts, (atom.rpartition("attr:")[2] for atom in site.depends if "attr:" in atom))
            if teacher:
                return teacher
        return meant_by_result(site.gives)

    def _prepares_loss(self, site: Site, place: Place) -> bool:
        """Tell whether a block is part of a loss that itself lets a gradient through."""
        owner, _, name = place.name.rpartition(".")
        is_helper = name not in FORWARDS and bool(_LOSS_CLASS.search(owner))
        is_loss = bool(_LOSS_CLASS.search(owner) or _LOSS_FUNCTION.search(name))
        return is_helper or (is_loss and (site.conditional or self.reach.flows(place, self.reach.owner(place))))

    def _is_weight(self, atom: str, place: Place) -> bool:
        """Tell whether an atom is a module or parameter of the class itself, not an input or a method of its own."""
        owner = self.reach.owner(place)
        if owner is None or not atom.startswith(("attr:", "call:self.")):
            return False
        name = atom.rpartition(":")[2].removeprefix("self.")
        if "Sinusoid" in owner.name and self.package.attribute(owner, name) == "parameter":
            return False  # computed, and kept as a parameter for its device and dtype
        return self.package.method(owner, name) is None

    def _at_import(self, facts: FileFacts, site: Site) -> Judgement:
        if site.rule != "GS105" or site.how != "call" or site.conditional:
            return Judgement(facts, site, "note", "possible", f"{what(site)} at module level.")
        message = (
            "importing this module switches gradients off for the whole thread, and nothing switches them on again."
        )
        return Judgement(facts, site, "error", "certain", message)

    def in_forward(self, facts: FileFacts, site: Site, place: Place, way: Way, only: Use | None = None) -> Judgement:
        """Return a region that a forward pass comes to, judged by what that loses in it; ``only``: this one."""
        if site.conditional or place not in self.training.always_reached:
            entry = self._entry_name(way[0], place)
            message = f"{where(site)} when a condition known only at run time says so; {entry} computes with it."
            return Judgement(facts, site, "warning", "possible", message, way)
        if self.reach.gives_data(place) or are_decoded(site.gives):
            message = f"{where(site)} and gives arrays or text, into which no gradient gets anyway."
            return Judgement(facts, site, "warning", "likely", message, way)
        if not site.depends:
            message = f"{where(site)} and keeps what it computes on self."
            return Judgement(facts, site, "warning", "possible", message, way)
        outside = _outside_atoms(self.reach.live(site.depends, place))
        if len(way) > 1 and not outside and meant_by_name(place):
            return Judgement(facts, site, "note", "likely", f"{what(site)}: {meant_by_name(place)}.")
        if site.how == "block" and not self.reach.is_given_back(site, place):
            return self._not_given_back(facts, site, place)
        if site.how == "block" and self.reach.gets_past(site, place):
            return self._in_part(facts, site, place, way)
        if len(way) > 1:
            loss, way = self.training.loss(site.depends, place, only)
            if loss is Loss.NONE:
                why = f"no forward pass hands {place.name} anything that wants a gradient"
                return Judgement(facts, site, "note", "likely", f"{what(site)}: {why}.")
            if loss is Loss.PART:
                return self._in_part(facts, site, place, way)
        return self._lost(facts, site, place, way, outside)

    def _lost(self, facts: FileFacts, site: Site, place: Place, way: Way, live: Atoms) -> Judgement:
        message = f"{where(site)}: training through {self._entry_name(way[0], place)} loses the gradient here."
        if self._is_frozen(site, place, live):
            return Judgement(facts, site, "warning", "likely", f"{message} {FROZEN}", way)
        return Judgement(facts, site, "error", "likely", message, way)

    def _is_frozen(self, site: Site, place: Place, live: Atoms) -> bool:
        """Tell whether a block runs only modules that their class freezes."""
        return site.how == "block" and self.training.runs_what_is_frozen(_outside_atoms(live), place)

    def _not_given_back(self, facts: FileFacts, site: Site, place: Place) -> Judgement:
        why = f"nothing that {place.name} gives back carries a gradient from it"
        return Judgement(facts, site, "note", "likely", f"{what(site)}: {why}.")

    def _in_part(self, facts: FileFacts, site: Site, place: Place, way: Way) -> Judgement:
        if site.gives and are_figures(site.gives) and self.reach.is_beside_loss(site, place):
            why = f"it computes {', '.join(site.gives)}, figures beside a loss"
            return Judgement(facts, site, "note", "likely", f"{what(site)}: {why}.")
        message = f"{where(site)}; a gradient gets past it on another way, without the part that is lost here."
        return Judgement(facts, site, "warning", "possible", message, way)

    def _entry_name(self, entry: Place, place: Place) -> str:
        """Return the name of a forward pass as the class has it that the region is in: ``Child.forward``, inherited."""
        owner, home = self.reach.owner(place), self.reach.owner(entry)
        if owner is None or home is None or home not in self.package.mro(owner):
            return entry.name
        return f"{owner.name}.{entry.name.rpartition('.')[2]}"

    def _beside(self, facts: FileFacts, site: Site, place: Place, live: Atoms) -> Judgement:
        """A region in a function that no forward pass was seen to call."""
        name = place.name.rpartition(".")[2]
        owner = self.reach.owner(place)
        kinds = {source_of(atom).partition(":")[0] for atom in live}
        kinds |= {"call" for atom in live if _IS_MODEL.match(source_of(atom))}  # given to somebody who runs it
        runs_model = not kinds.isdisjoint(("call", "attr")) and not self._works_on_itself(place, owner, kinds)
        is_inner = place.name.rpartition(".")[0] in facts.functions
        report = self.report_of.get(owner) if owner else None
        if (name.startswith("_") and name not in FORWARDS) or is_inner or not (owner or runs_model):
            way = self._way_through(report, place, site) if report and not is_inner else None
            if way is not None:
                message = f"{where(site)}, and {way.steps[0].name} leads here: it is for inference only."
                return Judgement(facts, site, "warning", "likely", message, way.steps)
            return Judgement(facts, site, "note", "possible", f"{where(site)}; no forward pass was seen to call it.")
        entry = next((each for each in report.entries if each.place == place), None) if report else None
        advice = ""
        if entry and entry.alternatives:
            advice = f"Use {', '.join(entry.alternatives[:4])} where a gradient is wanted."
        elif report and report.clean:
            advice = f"Call the modules inside it: {', '.join(report.clean[:6])}."
        if not (entry or runs_model):
            return Judgement(facts, site, "note", "possible", f"{where(site)}; no model is run in it.")
        flows_beside = site.how == "block" and self.reach.flows(place, owner)
        if flows_beside and not self.reach.is_given_back(site, place):
            return self._not_given_back(facts, site, place)
        is_part = name in FORWARDS or flows_beside
        what = "what comes out of it carries no gradient" if is_part else "it is for inference only"
        return Judgement(facts, site, "warning", "likely", f"{where(site)}: {what}.", advice=advice)

    def _works_on_itself(self, place: Place, owner: Place | None, kinds: set[str]) -> bool:
        """Tell whether a module's method takes and gives no tensor: it changes its own weights."""
        function = self.package.function(place)
        gives = function is None or function.gives_value or function.kind == "generator"
        return owner is not None and self.package.is_module(owner) and not gives and "param" not in kinds

    def _way_through(self, report: ClassReport, place: Place, site: Site) -> Chain | None:
        """Return the way from a public method of an object that is no module (a predictor) to a method switched off.

        A block may compute a part of the result only, and a module is trained by its forward pass.
        """
        if report.is_module or site.how != "decorator":
            return None
        chains = (entry.chain for entry in report.entries if entry.chain)
        return next((chain for chain in chains if (place, site) in chain.sites), None)

    def _operation(self, facts: FileFacts, site: Site, place: Place) -> Judgement:
        if site.rule in ("GS501", "GS502"):
            return Judgement(facts, site, "warning", "possible", f"{site.mechanism}.")
        if site.rule == "GS602":
            return self._cached(facts, site, place)
        function = self.package.function(place)
        way = self.training.reached.get(place)
        given = function.returns if function is not None else NOTHING
        if LOSS in given and are_copies(site.gives):
            why = "a copy beside the loss, which keeps its gradient"
            return Judgement(facts, site, "note", "likely", f"{site.mechanism} in {site.function}: {why}.")
        if site.rule in INDEXING and self._starves_loss(site, place):
            names = ", ".join(sorted(name[6:] for name in _predictions(site)))
            message = f"{site.mechanism} in {site.function}: no gradient of this loss gets back to {names}."
            return Judgement(facts, site, "warning", "likely", message)
        if (
            site.rule in FLOWING and way is not None and f"cut:{site.line}" in given
            and self.reach.live(site.depends, place) and not meant_by_name(place)
        ):  # fmt: skip
            message = f"{site.mechanism} in {site.function}: its result is part of what {way[0].name} gives back."
            return Judgement(facts, site, "warning", "possible", message, way)
        return Judgement(facts, site, "note", "possible", f"{site.mechanism} in {site.function or 'the module body'}.")

    def _starves_loss(self, site: Site, place: Place) -> bool:
        """Tell whether a loss makes integers or hard decisions of a prediction and computes with nothing else of it."""
        owner, _, name = place.name.rpartition(".")
        is_loss = bool(_LOSS_CLASS.search(owner) and name in FORWARDS) or "loss" in name.lower()
        function, found = self.package.function(place), _predictions(site)
        if not is_loss or not found or function is None or not function.gives_value:
            return False
        return found.isdisjoint(self.reach.flowing(function.returns, place, self.reach.owner(place)))

    def _cached(self, facts: FileFacts, site: Site, place: Place) -> Judgement:
        """An inference tensor kept on self: of weight where a forward pass reads it elsewhere."""
        owner, name = self.reach.owner(place), site.gives[0].partition(".")[2]
        for reader, way in self.training.reached.items():
            function = self.package.function(reader)
            if any(step in self.reach.regions for step in way):
                continue  # read with gradients off as well: nothing is saved for a backward pass
            if reader != place and function and name in function.reads and self.reach.owner(reader) == owner:
                message = f"{site.mechanism}; {way[0].name} reads it, and autograd cannot save an inference tensor."
                return Judgement(facts, site, "warning", "possible", message, way)
        return Judgement(facts, site, "note", "possible", f"{site.mechanism}.")


def _predictions(site: Site) -> set[str]:
    """Return the parameters that a site computes with and that are predictions by their names."""
    sources = (source_of(atom) for atom in site.depends)
    return {source for source in sources if source.startswith("param:") and _IS_PREDICTION.match(source[6:])}


def _in_mixin(place: Place) -> bool:
    """Tell whether a method is a mixin's: what else its host offers is not in sight."""
    return place.name.rpartition(".")[0].endswith("Mixin")


def _outside_atoms(atoms: Atoms) -> Atoms:
    """Return the atoms that are about more than the function's own parameters: modules, attributes."""
    return frozenset(atom for atom in atoms if not source_of(atom).startswith("param:"))
