"""From a recording to the cuts: which sources lose their gradient, where, and to what.

What the numbers do (``propagation.py``) is compared with what autograd's own graph reaches. The cut is the
frontier: an operation that takes in a connected value and gives out an unconnected one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from gradscope.tracing.frames import code_name, source_site
from gradscope.tracing.propagation import Walks, is_flat, union, walk
from gradscope.tracing.recording import Loss, Operation, Recording, Refusal, Region, Site

_COMPARISONS = "eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ isclose bucketize searchsorted"
_INDICES = "argmax argmin argsort multinomial one_hot nonzero topk sort max min histc bincount"
_SCALARS = "item tolist __float__ __int__ __index__"
_COLLECTIVES = "all_gather all_reduce broadcast reduce all_gather_into_tensor"

# How an operation that stops the gradient by itself is called in the catalogue.
RULE_OF_OPERATION = {
    **dict.fromkeys(("detach", "detach_"), "GS201"),
    **dict.fromkeys(("data", "__set__"), "GS202"),
    **dict.fromkeys(("tensor", "new_tensor", "Parameter", "shared memory", "pickle", "__deepcopy__"), "GS203"),
    **dict.fromkeys(("load_state_dict", "as_tensor", "asarray", "Tensor", "as_subclass"), "GS203"),
    **dict.fromkeys(("sample",), "GS205"),
    **dict.fromkeys(_COLLECTIVES.split(), "GS206"),
    **dict.fromkeys(("numpy", "__array__"), "GS301"),
    **dict.fromkeys(_SCALARS.split(), "GS302"),
    **dict.fromkeys(_INDICES.split(), "GS401"),
    **dict.fromkeys(_COMPARISONS.split(), "GS402"),
    **dict.fromkeys(("long", "int", "short", "char", "byte", "bool", "to", "type"), "GS403"),
}
SWITCHES = frozenset({"no_grad", "inference_mode", "set_grad_enabled", "enable_grad"})
RULE_OF_REGION = {
    ("inference_mode", "decorator"): "GS101",
    ("no_grad", "decorator"): "GS102",
    ("inference_mode", "block"): "GS103",
    ("no_grad", "block"): "GS104",
}
_ADDITIONS = frozenset("add add_ sub sub_ __add__ __radd__ __sub__ __rsub__ __iadd__ __isub__ rsub".split())


@dataclass(slots=True)
class Cut:
    """One place where gradients end: a region or a single operation.

    ``partial`` are the sources that lose only one of their paths here, ``flat`` says that the operation
    has no useful derivative, ``escape`` that the numbers went through Python, where they are not followed.
    ``zero``, ``nonfinite`` and ``wrong`` are the sources whose gradient arrives and is that; ``words`` says more,
    and ``raises`` that the backward pass ends here with an exception. By finite differences: ``stepped`` sources
    matter in steps only, ``benign`` ones miss nothing by this cut, and ``certain`` says that ``wrong`` was shown.
    """

    site: Site
    rule: str
    sources: set[str] = field(default_factory=set)
    partial: set[str] = field(default_factory=set)
    chain: tuple[str, ...] = ()
    outer: Site | None = None
    module: str = ""
    flat: bool = False
    escape: bool = False
    zero: set[str] = field(default_factory=set)
    nonfinite: set[str] = field(default_factory=set)
    wrong: set[str] = field(default_factory=set)
    words: str = ""
    raises: bool = False
    stepped: set[str] = field(default_factory=set)
    benign: set[str] = field(default_factory=set)
    certain: bool = False

    @property
    def touched(self) -> set[str]:
        """Return every source that something happens to here."""
        return self.sources | self.partial | self.zero | self.nonfinite | self.wrong | self.benign


@dataclass(slots=True)
class Diagnosis:
    """What one run showed: a status per source, and the cuts in the order met."""

    statuses: dict[str, str]
    cuts: dict[Site, Cut]
    outside_cuts: dict[Site, Cut]
    live: set[int]
    losses: list[tuple[Operation, int]] = field(default_factory=list)
    surrogates: set[str] = field(default_factory=set)

    def needs(self, site: Site) -> bool:
        """Tell whether some source is lost only where this region is active.

        Then the source stays blocked as long as the region is entered, whatever else is removed.
        """
        inside = outside = 0
        for operation, lost in self.losses:
            if any(region.site == site for region in operation.regions):
                inside |= lost
            else:
                outside |= lost
        return bool(inside & ~outside)

    @property
    def blocked(self) -> set[str]:
        """Return the names of the sources whose gradient is lost."""
        return {name for name, status in self.statuses.items() if status == "blocked"}


def diagnose(recording: Recording) -> Diagnosis:
    """Return the status of every source and the cuts that explain the lost ones."""
    names = list(recording.leaves) + list(recording.outside)
    start = {**recording.leaves, **recording.outside}
    bits = {name: 1 << index for index, name in enumerate(names)}
    walks = walk(recording, start, bits)
    statuses = _statuses(recording, walks, bits)
    wanted = {status: _bits_of(statuses, status, bits) for status in ("blocked", "flows", "nondifferentiable")}
    losses = list(_frontier(recording, walks, wanted["blocked"]))
    cuts = _cuts(recording, losses, bits)
    _add_left(cuts, recording, walks, wanted["blocked"], bits)
    _add_flat(cuts, recording, walks, wanted["nondifferentiable"], bits)
    _add_escapes(cuts, recording, walks, wanted["blocked"], bits)
    surrogates = _add_partial(cuts, statuses, recording, walks, wanted["flows"], bits)
    _add_spoiled(cuts, recording, walks, bits)
    _add_losses(cuts, statuses, recording)
    outside = sum(bits[name] for name in recording.outside)
    return Diagnosis(
        statuses=statuses,
        cuts=cuts,
        outside_cuts=_cuts(recording, list(_frontier(recording, walks, outside)), bits),
        live=walks.live,
        losses=losses,
        surrogates=surrogates,
    )


# What autograd says when a forward pass offends it, the rule that this is, and where its cause lies: at the call
# itself, where an inference tensor was made, or where the gradient was lost before.
REFUSED_CALLS = (
    ("inference tensor", "GS601", "inference"),
    ("Can't call numpy() on Tensor that requires grad", "GS301", "here"),
    ("Can't export tensors that require gradient", "GS301", "here"),
    ("don't support automatic differentiation", "GS603", "here"),
    ("support the deepcopy protocol", "GS203", "here"),
    ("a leaf Variable that requires grad", "GS603", "here"),
    ("is being modified inplace", "GS603", "here"),
    ("modified by an inplace operation", "GS603", "here"),
    ("Can't detach views in-place", "GS201", "here"),
    ("only change requires_grad flags of leaf", "GS204", "here"),
    ("refusing to serialize non-leaf", "GS303", "here"),
    ("backward through the graph a second time", "GS603", "here"),
    ("does not require grad", "GS201", "before"),
    ("doesn't require gradient", "GS201", "before"),
    ("can't retain_grad on Tensor that has requires_grad=False", "GS201", "before"),
    ("not have been used in the graph", "GS201", "before"),
)


def is_autograds(error: BaseException) -> bool:
    """Tell whether an exception of a forward pass is autograd's refusal."""
    return any(words.lower() in str(error).lower() for words, _, _ in REFUSED_CALLS)


def crash_cuts(recording: Recording) -> dict[Site, Cut]:
    """Return what made autograd refuse a call of the forward pass."""
    pending, said = recording.pending, str(recording.error).lower()
    found = next(((rule, where) for words, rule, where in REFUSED_CALLS if words.lower() in said), None)
    if pending is None or found is None:
        return {}
    rule, where = found
    cuts: dict[Site, Cut] = {}
    if where == "inference":
        makers = {value: op for op in recording.operations for value in op.outputs}
        for value in pending.inputs:
            maker = makers.get(value)
            if maker is not None and recording.values[value].inference:
                _blamed(cuts, recording, maker)
    elif where == "before":
        before = dataclasses.replace(recording, sinks=pending.inputs, error=None)
        cuts = {site: cut for site, cut in diagnose(before).cuts.items() if cut.sources}
    if not cuts and pending.place is not None:
        if where == "inference" and any(recording.values[value].inference for value in pending.inputs):
            rule = "GS601" if any(recording.values[value].leaf for value in pending.inputs
                                  if recording.values[value].inference) else "GS602"  # fmt: skip
        cut = _cut_at(cuts, recording, pending)
        cut.rule, cut.words = rule, f"autograd refuses this call: {_first_line(recording.error)}"
    return cuts


def _first_line(error: BaseException | None) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# --- statuses ----------------------------------------------------------------------------------------


def _statuses(recording: Recording, walks: Walks, bits: dict[str, int]) -> dict[str, str]:
    data = union(walks.data, recording.sinks)
    smooth = union(walks.smooth, recording.sinks)
    reached = frozenset() if recording.left else recording.reached
    escaped = union(walks.smooth, [value for operation in recording.escapes for value in operation.inputs])
    statuses = {}
    for name in recording.leaves:
        bit = bits[name]
        if name in reached:
            statuses[name] = "flows" if smooth & bit or not data & bit else "nondifferentiable"
        elif smooth & bit:
            statuses[name] = "blocked"
        elif data & bit:
            statuses[name] = "nondifferentiable"
        else:
            statuses[name] = "blocked" if escaped & bit else "unused"
    return statuses


def _bits_of(statuses: dict[str, str], status: str, bits: dict[str, int]) -> int:
    return sum(bits[name] for name, found in statuses.items() if found == status)


def _named(lost: int, bits: dict[str, int]) -> set[str]:
    return {name for name, bit in bits.items() if bit & lost}


# --- frontiers ---------------------------------------------------------------------------------------


def _frontier(recording: Recording, walks: Walks, wanted: int) -> Iterator[tuple[Operation, int]]:
    """Yield the operations that lose the gradient of wanted sources, each with those (as a bit set)."""
    for operation in recording.operations if wanted else ():
        outputs = [value for value in operation.outputs if value in walks.live_smooth]
        if not outputs:
            continue
        arriving = 0
        for value in operation.inputs:
            arriving |= walks.linked[value] & walks.smooth[value]
        lost = arriving & union(walks.smooth, outputs) & ~union(walks.linked, operation.outputs) & wanted
        if lost:
            yield operation, lost


def _cuts(recording: Recording, losses: list[tuple[Operation, int]], bits: dict[str, int]) -> dict[Site, Cut]:
    cuts: dict[Site, Cut] = {}
    for operation, lost in losses:
        for cut in _blamed(cuts, recording, operation):
            cut.sources |= _named(lost, bits)
    return cuts


def _add_flat(cuts: dict[Site, Cut], recording: Recording, walks: Walks, wanted: int, bits: dict[str, int]) -> None:
    """Blame the operations without a useful derivative: removing a switch cannot help there."""
    for operation in recording.operations if wanted else ():
        outputs = walks.live.intersection(operation.outputs)
        if not outputs:
            continue
        lost = union(walks.smooth, operation.inputs) & ~union(walks.smooth, outputs) & wanted
        if lost and operation.place is not None:
            cut = _cut_at(cuts, recording, operation)
            cut.rule = "GS402" if is_flat(operation) else RULE_OF_OPERATION.get(operation.name, "GS401")
            cut.flat = True
            if operation.refusal is not None:
                cut.words, cut.raises = operation.refusal.message, operation.refusal.raises
            cut.sources |= _named(lost, bits)


def _add_left(cuts: dict[Site, Cut], recording: Recording, walks: Walks, wanted: int, bits: dict[str, int]) -> None:
    """Blame the calls by which the whole result left torch: whatever else is fixed, it has no gradient."""
    for operation in recording.left:
        lost = union(walks.smooth, operation.inputs) & wanted
        if lost and operation.place is not None:
            _cut_at(cuts, recording, operation).sources |= _named(lost, bits)


def _add_escapes(cuts: dict[Site, Cut], recording: Recording, walks: Walks, wanted: int, bits: dict[str, int]) -> None:
    """Blame the calls that took numbers into Python, where no other trace of a blocked source goes on."""
    left = wanted & ~union(walks.smooth, recording.sinks)
    for operation in recording.escapes if left else ():
        lost = union(walks.smooth, operation.inputs) & left
        if lost and operation.place is not None:
            cut = _cut_at(cuts, recording, operation)
            cut.escape = True
            cut.sources |= _named(lost, bits)


def _add_partial(
    cuts: dict[Site, Cut],
    statuses: dict[str, str],
    recording: Recording,
    walks: Walks,
    wanted: int,
    bits: dict[str, int],
) -> set[str]:
    """Note the sources whose gradient arrives on one path and is cut on another; return those with a surrogate."""
    surrogates: set[str] = set()
    consumers: dict[int, list[Operation]] = {}
    makers: dict[int, Operation] = {}
    losses = list(_frontier(recording, walks, wanted))
    if losses:
        for operation in recording.operations:
            for value in operation.inputs:
                consumers.setdefault(value, []).append(operation)
            for value in operation.outputs:
                makers[value] = operation
    for operation, lost in losses:
        if _is_straight_through(operation, consumers, makers):
            surrogates |= _named(lost, bits)
            continue
        names = {name for name in _named(lost, bits) if name in statuses}
        for cut in _blamed(cuts, recording, operation):
            cut.partial |= names
        for name in names:
            statuses[name] = "partial"
    return surrogates


def _add_spoiled(cuts: dict[Site, Cut], recording: Recording, walks: Walks, bits: dict[str, int]) -> None:
    """Blame the writes that changed what backward needs where autograd does not look: the gradient errs."""
    for operation in recording.operations:
        if operation.refusal is not None and operation.refusal.silent and walks.live.intersection(operation.outputs):
            for cut in _blamed(cuts, recording, operation):
                cut.wrong |= _named(union(walks.linked, operation.inputs), bits)


def _add_losses(cuts: dict[Site, Cut], statuses: dict[str, str], recording: Recording) -> None:
    """Blame the operations at which the backward pass lost a gradient that the graph promises."""
    for loss in recording.losses:
        what = loss.what.rpartition(" ")[2]
        names = {name for name in loss.sources if statuses.get(name) in ("flows", "partial", "zero")}
        cut = _cut_of_loss(cuts, recording, loss) if names else None
        if what == "zero":
            statuses.update(dict.fromkeys(names, "zero"))
        elif what in ("none", "raises"):
            statuses.update(dict.fromkeys(names, "blocked"))
        if cut is None:
            continue
        kept = {"zero": cut.zero, "nonfinite": cut.nonfinite}.get(what, cut.sources)
        kept |= names
        cut.raises = cut.raises or what == "raises"


def _cut_of_loss(cuts: dict[Site, Cut], recording: Recording, loss: Loss) -> Cut | None:
    operation = recording.operations[loss.operation] if loss.operation is not None else None
    if loss.what.startswith("hook"):
        place = next((recording.hooks[value] for value in operation.outputs if value in recording.hooks), None) \
            if operation is not None else next(
                (recording.hooks[recording.leaves[name]] for name in loss.sources
                 if recording.leaves.get(name) in recording.hooks), None)  # fmt: skip
        if place is not None:
            site = source_site(place, "register_hook")
            return cuts.setdefault(site, Cut(site, "GS606", chain=(code_name(place.code),)))
    if operation is None or operation.place is None:
        return None
    cut = _cut_at(cuts, recording, operation)
    rules = {"zero": "GS404", "nonfinite": "GS607", "hook zero": "GS606", "hook nonfinite": "GS606"}
    hooked = operation.name == "BackwardHookFunction"
    cut.rule = "GS606" if hooked else rules.get(loss.what, "GS501" if operation.custom else "GS502")
    return cut


def _is_straight_through(cut: Operation, consumers: dict[int, list[Operation]], makers: dict[int, Operation]) -> bool:
    """Tell ``x + (q - x).detach()`` and ``hard - soft.detach() + soft``: the gradient is meant to go around.

    Either the detached value is a difference of something that it is added back to, or it is taken off
    something that the original is added to.
    """
    source = makers.get(cut.inputs[0])
    subtracted = set(source.inputs) if source is not None and source.name in _ADDITIONS else set()
    subtracted.add(cut.inputs[0])
    for output in cut.outputs:
        users = consumers.get(output, [])
        further = [after for user in users if user.name in _ADDITIONS for out in user.outputs
                   for after in consumers.get(out, ())]  # fmt: skip
        for user in (*users, *further):
            if user.name in _ADDITIONS and subtracted.intersection(user.inputs):
                return True
    return False


# --- blame -------------------------------------------------------------------------------------------


def _blamed(cuts: dict[Site, Cut], recording: Recording, operation: Operation) -> list[Cut]:
    """Attribute a lost gradient to the regions that were active, outermost first, or to the call."""
    if operation.refusal is not None:
        cut = _cut_of_refusal(cuts, recording, operation, operation.refusal)
        return [cut] if cut is not None else []
    if not operation.regions:
        return [_cut_at(cuts, recording, operation)] if operation.place is not None else []
    found: list[Cut] = []
    outer: Site | None = None
    regions: Iterable[Region] = operation.regions
    for region in regions:
        rule = _rule_of(region.site)
        found.append(cuts.setdefault(region.site, Cut(region.site, rule, chain=region.chain, outer=outer)))
        outer = region.site
    return found


def _cut_of_refusal(cuts: dict[Site, Cut], recording: Recording, operation: Operation, refusal: Refusal) -> Cut | None:
    """Blame the write that spoiled what was saved; else the operation that autograd has no derivative for."""
    culprit = operation if refusal.write is None else recording.operations[refusal.write]
    if culprit.place is None:
        return None
    cut = _cut_at(cuts, recording, culprit)
    cut.rule, cut.words = refusal.rule, refusal.message
    cut.raises = cut.raises or refusal.raises
    return cut


def _cut_at(cuts: dict[Site, Cut], recording: Recording, operation: Operation) -> Cut:
    assert operation.place is not None
    site = source_site(operation.place, operation.name)
    rule = (
        _rule_of_custom(recording, operation)
        if operation.custom
        else RULE_OF_OPERATION.get(operation.name.partition(".")[0], "GS503")
    )
    cut = cuts.setdefault(site, Cut(site, rule, chain=(code_name(operation.place.code),)))
    cut.module = _module_path(recording, operation)
    return cut


def _rule_of_custom(recording: Recording, operation: Operation) -> str:
    if operation.name == "CheckpointFunction":
        return "GS604"
    inference = any(recording.values[value].inference for value in operation.outputs)
    return "GS601" if inference else "GS501"


def _rule_of(site: Site) -> str:
    if site.mechanism not in SWITCHES:  # torch's own function switches recording off
        return RULE_OF_OPERATION.get(site.mechanism, "GS104")
    how = "decorator" if site.how == "decorator" else "block"
    return RULE_OF_REGION.get((site.mechanism, how), "GS105")


def _module_path(recording: Recording, operation: Operation) -> str:
    named = [scope.module for scope in recording.ancestors(operation.scope) if scope.module]
    return named[-1] if named else ""
